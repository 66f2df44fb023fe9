"""TRL's SFTTrainer with LoRA adapters around a patched model."""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import fastllm

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128,
                                     num_hidden_layers=2, num_attention_heads=4))
print(fastllm.patch(model))

# A stand-in for AutoTokenizer.from_pretrained(...) that needs no network: words of numbers.
words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{str(n): n + 3 for n in range(61)}}
vocabulary = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>",
                                    eos_token="<eos>", unk_token="<unk>")
texts = [" ".join(str(n % 61) for n in range(start, start + 12)) for start in range(32)]

with tempfile.TemporaryDirectory() as folder:
    config = SFTConfig(folder, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-3,
                       logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
                       max_length=32, bf16=False)
    SFTTrainer(model, config, train_dataset=Dataset.from_dict({"text": texts}),
               processing_class=tokenizer,
               peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).train()
