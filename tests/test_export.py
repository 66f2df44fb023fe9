"""Exported folders: the same logits and tokens in transformers, and whole or not at all."""

import pytest
import torch
import transformers
from states import cut
from threads_as_ranks import everywhere, must

from fastllm import checkpoint, commands, config
from fastllm import export as module
from fastllm.config import UserError
from fastllm.data.tokenizer import TokenizerConfig, train_bpe
from fastllm.export import export, export_checkpoint
from fastllm.model import Decoder, ModelConfig, hf
from fastllm.run import RunConfig, open_model
from fastllm.trainer import TrainConfig

TEXT = "def f(x): return x\n  床前明月光，疑是地上霜。 naïve café 1234567"


def make(**changes):
    return Decoder(ModelConfig(**{
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "init_std": 0.1, **changes}))


def make_tokenizer(max_digits=3):
    return train_bpe([TEXT] * 3, TokenizerConfig(vocab_size=300, max_digits=max_digits))


@pytest.mark.parametrize(("changes", "kind"), [
    ({}, "LlamaForCausalLM"), ({"attention_bias": True}, "Qwen2ForCausalLM"),
    ({"qk_norm": True}, "Qwen3ForCausalLM")])
def test_transformers_loads_model_and_tokenizer(changes, kind, tmp_path):
    model = make(**changes).eval()
    tokenizer = make_tokenizer(max_digits=1 if kind.startswith("Qwen2") else 3)
    folder = export(model, tmp_path / "run" / "model", tokenizer=tokenizer,
                    chat_template="{{ messages[0].content }}{{ eos_token }}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == kind
    ids = tokenizer.encode(TEXT)
    assert words(TEXT)["input_ids"] == ids
    assert words.decode(ids) == TEXT
    assert len(words) == tokenizer.vocab_size
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (0, 1, 2)
    assert words.model_max_length == 128
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 1
    chat = words.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == f"hi{tokenizer.eos_token}"
    with torch.no_grad():
        batch = torch.tensor([ids])
        torch.testing.assert_close(theirs(batch).logits, model.logits(model(batch)),
                                   rtol=0, atol=1e-5)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("changes", [
    {}, {"attention_bias": True, "tie_word_embeddings": False}, {"qk_norm": True}])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_checkpoint_exports_as_the_whole_model_does(changes, dtype, tmp_path):
    model = make(**changes).half()
    tokenizer = make_tokenizer(max_digits=1)
    expected = export(model, tmp_path / "whole", tokenizer=tokenizer, dtype=dtype)
    whole = {"model": dict(model.named_parameters())}
    for ranks in (1, 3):
        path = must(everywhere(ranks, lambda world, ranks=ranks: checkpoint.save(
            tmp_path / str(ranks), 1, cut(whole, world.rank, ranks), {}, world)))[0]
        folder = export_checkpoint(checkpoint.load(path), model.config,
                                   tmp_path / f"export-{ranks}", tokenizer=tokenizer, dtype=dtype)
        assert content(folder) == content(expected)


def test_a_checkpoint_of_another_model_is_not_exported(tmp_path):
    saved = checkpoint.load(checkpoint.save(
        tmp_path, 1, {"model": dict(make().named_parameters())}, {}))
    for changes, name in (({"hidden_size": 16}, "embed_tokens.weight"),
                          ({"qk_norm": True}, "layers.0.self_attn.q_norm.weight"),
                          ({"num_hidden_layers": 1}, "layers.1")):
        with pytest.raises(UserError, match=f"tensor {name}"):
            export_checkpoint(saved, make(**changes).config, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_commands_take_a_run_that_has_checkpoints_alone(tmp_path, capsys):
    model, tokenizer = make().bfloat16(), make_tokenizer()
    run = tmp_path / "run"
    checkpoint.save(run / "checkpoints", 5, {"model": dict(model.named_parameters())}, {})
    (run / "config.yaml").write_text(config.to_yaml(RunConfig(
        model=model.config, train=TrainConfig(seq_len=64))))
    tokenizer.save(run / "tokenizer.json")
    expected = export(model, tmp_path / "whole", tokenizer=tokenizer)
    commands.export_model(str(run), commands.ExportRun(out=str(tmp_path / "exported")))
    assert content(tmp_path / "exported") == content(expected)
    assert capsys.readouterr().out == f"{tmp_path / 'exported'}\n"
    opened, _, _ = open_model(str(run), device=torch.device("cpu"), dtype=torch.float32)
    for name, parameter in opened.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name].float())


def test_export_replaces_an_earlier_export_and_leaves_nothing_beside_it(tmp_path):
    export(make(), tmp_path / "model", tokenizer=make_tokenizer())
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    second = make(qk_norm=True)
    export(second, tmp_path / "model", dtype=torch.bfloat16)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors"}
    back = hf.load(tmp_path / "model")
    assert back.config.qk_norm
    assert torch.equal(back.norm.weight, second.norm.weight.bfloat16())


def test_a_failure_half_way_leaves_the_earlier_export_as_it_was(tmp_path, monkeypatch):
    export(make(), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "sync", full)
    with pytest.raises(UserError, match="model: No space left on device"):
        export(make(qk_norm=True), tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        export(make(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is a file"):
        export(make(), tmp_path / "notes.txt")


@pytest.mark.parametrize(("changes", "words"), [
    ({"qk_norm": True, "attention_bias": True}, "none has both"),
    ({"vocab_size": 290}, "tokens, more than the model's vocab_size 290"),
    ({"attention_bias": True}, "Qwen2's rules.*max_digits 1"),
])
def test_what_cannot_be_exported_is_named_and_nothing_is_written(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export(make(**changes), tmp_path / "model", tokenizer=make_tokenizer())
    assert not list(tmp_path.iterdir())
