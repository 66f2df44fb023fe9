"""Random tiny models of each family that `fastllm.patch` is held to, built offline."""

import torch
import transformers as hf

VOCAB = 97
DECODER = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
           "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
           "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEAD = {**DECODER, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}

FAMILIES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, DECODER),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {**DECODER, "sliding_window": 4}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, DECODER),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, HEAD),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, HEAD),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, HEAD),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, DECODER),
    "phi4": (hf.Phi3ForCausalLM, hf.Phi3Config, {**DECODER, "partial_rotary_factor": 0.5}),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig,
                {**DECODER, **EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig,
                  {**HEAD, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config,
             {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
              "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1,
              "eos_token_id": 2, "loss_type": "ForCausalLM"}),
    "bert": (hf.BertForMaskedLM, hf.BertConfig,
             {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout_prob": 0.0,
              "attention_probs_dropout_prob": 0.0}),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config,
           {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
            "num_heads": 4, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0}),
}


def build(family: str, dtype: torch.dtype = torch.float32, table=FAMILIES,
          **changes) -> torch.nn.Module:
    """The same weights at every call; larger than a fresh model's, so that every part tells."""
    model, config, options = table[family]
    torch.manual_seed(0)
    built = model(config(**{**options, **changes}))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return built.to(dtype).train()


def batch(masked: bool = False) -> dict[str, torch.Tensor]:
    """Ids and labels, some of them ignored; masked: padding at the end of the second row."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    if not masked:
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    mask[1, 6:], labels[1, 6:] = 0, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def step(model, **inputs):
    """The output, and the gradient of every parameter that has one, by name."""
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                 if parameter.grad is not None}
