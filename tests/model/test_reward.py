"""Reward models: where the score is read, and folders that transformers reads to the same score."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastllm import export as exporting
from fastllm.config import UserError
from fastllm.export import export
from fastllm.model import Decoder, ModelConfig, hf
from fastllm.model.reward import RewardModel, load_reward

GEMMA = {"scale_embeddings": True, "rms_norm_offset": 1.0, "hidden_act": "gelu_pytorch_tanh"}
CASES = {"Llama": {}, "Llama untied": {"tie_word_embeddings": False},
         "Qwen2": {"attention_bias": True}, "Qwen3": {"qk_norm": True},
         "Mistral": {"sliding_window": 7}, "Gemma": GEMMA,
         "Gemma2": {**GEMMA, "sandwich_norms": True, "attn_logit_softcapping": 2.0,
                    "final_logit_softcapping": 3.0},
         "Gemma3Text": {**GEMMA, "sandwich_norms": True, "qk_norm": True}}


def make(**changes):
    config = ModelConfig(**{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40,
                            "num_hidden_layers": 2, "num_attention_heads": 4,
                            "num_key_value_heads": 2, "max_position_embeddings": 32,
                            "init_std": 0.2, **changes})
    generator = torch.Generator().manual_seed(0)
    return RewardModel(Decoder(config, generator=generator), generator=generator).eval()


class Words:
    """A tokenizer as far as an export asks: 64 tokens, the end also pads if told so."""

    bos_id, eos_id, eos_token, vocab_size = 1, 2, "e", 64

    def __init__(self, pad_id=0, vocab_size=64):
        self.pad_id, self.vocab_size = pad_id, vocab_size

    def save(self, folder):
        splitter = {"pattern": {"Regex": exporting._QWEN2_PATTERN}}
        (folder / "tokenizer.json").write_text(json.dumps({"pre_tokenizer": splitter}), "utf-8")
        (folder / "tokenizer_config.json").write_text("{}", "utf-8")


def theirs_of(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32).eval()


def texts():
    """Ids of three texts of different lengths, each with its end token 2."""
    generator = torch.Generator().manual_seed(2)
    return [torch.cat((torch.randint(3, 64, (size,), generator=generator), torch.tensor([2])))
            for size in (5, 11, 8)]


def packed_scores(model):
    """The three texts in one row, as they are trained: all but the last token of each."""
    inputs = [text[:-1] for text in texts()]
    bounds = torch.tensor([0, *(len(ids) for ids in inputs)]).cumsum(0).int()
    hidden = model(torch.cat(inputs)[None],
                   position_ids=torch.cat([torch.arange(len(ids)) for ids in inputs])[None],
                   cu_seqlens=bounds, max_seqlen=11)
    return model.scores(hidden, bounds)


@pytest.mark.parametrize("name", CASES)
def test_transformers_gives_the_text_without_its_end_the_same_score(name, tmp_path):
    model = make(**CASES[name])
    export(model, tmp_path / "model", tokenizer=Words())
    theirs = theirs_of(tmp_path / "model")
    assert type(theirs).__name__ == f"{name.split()[0]}ForSequenceClassification"
    values = json.loads((tmp_path / "model" / hf.CONFIG).read_text("utf-8"))
    assert values["architectures"] == [type(theirs).__name__]
    assert theirs.config.num_labels == 1 and theirs.config.id2label == {0: "REWARD"}
    rows = torch.nn.utils.rnn.pad_sequence([text[:-1] for text in texts()], batch_first=True)
    with torch.no_grad():
        ours, wanted = packed_scores(model), theirs(rows, attention_mask=(rows != 0).long()).logits
        ended = theirs(texts()[0][None]).logits
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, wanted.squeeze(-1), rtol=1e-5, atol=1e-5)
    assert (ended[0, 0] - ours[0]).abs() > 1e-3  # at the end token it is another number


def test_an_end_token_that_pads_is_not_read(tmp_path):
    model = make()
    export(model, tmp_path / "model", tokenizer=Words(pad_id=2))
    rows = torch.nn.utils.rnn.pad_sequence(texts(), batch_first=True, padding_value=2)
    with torch.no_grad():
        wanted = theirs_of(tmp_path / "model")(rows).logits.squeeze(-1)
        torch.testing.assert_close(packed_scores(model), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_folders_come_back_equal_from_either_side(name, tmp_path):
    model = make(**CASES[name])
    export(model, tmp_path / "ours")
    back = load_reward(tmp_path / "ours")
    assert back.config == hf.read_config(tmp_path / "ours")
    names = dict(model.named_parameters())
    assert names.keys() == dict(back.named_parameters()).keys() and "score.weight" in names
    assert not any("lm_head" in key for key in names)
    for key, parameter in back.named_parameters():
        assert torch.equal(parameter, names[key]), key
    theirs_of(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = load_reward(tmp_path / "theirs", dtype=torch.float64)
    assert again.score.weight.dtype == torch.float64
    assert torch.equal(again.score.weight.float(), model.score.weight)


def test_score_is_drawn_from_the_generator():
    first, second = make(hidden_size=512), make(hidden_size=512)
    assert torch.equal(first.score.weight, second.score.weight)
    assert first.score.weight.std().item() == pytest.approx(0.2, rel=0.1)
    torch.manual_seed(1)
    assert not torch.equal(RewardModel(first.decoder).score.weight, second.score.weight)


def test_dtype_and_files(tmp_path):
    export(make(), tmp_path / "model", dtype=torch.bfloat16, tokenizer=Words())
    assert {t.dtype for t in load_file(tmp_path / "model" / hf.WEIGHTS).values()} == {
        torch.bfloat16}
    values = json.loads((tmp_path / "model" / hf.CONFIG).read_text("utf-8"))
    assert (values["dtype"], values["pad_token_id"]) == ("bfloat16", 0)
    export(make(), tmp_path / "model")  # an earlier export is replaced, all of it
    assert not (tmp_path / "model" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        export(make(), tmp_path)
    with pytest.raises(UserError, match="65 tokens, more than"):
        export(make(), tmp_path / "new", tokenizer=Words(vocab_size=65))
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(UserError, match="is a file"):
        export(make(), tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes.txt"]


def test_language_models_and_reward_models_are_not_mistaken(tmp_path):
    model = make()
    export(model, tmp_path / "reward")
    (tmp_path / "model").mkdir()
    hf.save(Decoder(model.config), tmp_path / "model")
    with pytest.raises(UserError, match=r"lacks tensor score\.weight"):
        load_reward(tmp_path / "model")
    with pytest.raises(UserError, match=r"tensor score\.weight has no place"):
        hf.load(tmp_path / "reward")
