"""Pickled weights: what torch wrote comes back to the bit, and nothing that hides in it runs."""

import json
import struct
import zipfile

import pytest
import torch

from fastllm.config import UserError
from fastllm.data.tokenizer import TokenizerConfig, train_bpe
from fastllm.importing import import_model
from fastllm.model import hf

QUIET = {"say": lambda line: None}


@pytest.fixture
def model(forge):
    return forge.scrambled()


@pytest.fixture
def folder(model, tmp_path):
    """config.json alone."""
    folder = tmp_path / "source"
    folder.mkdir()
    hf.save(model, folder)
    (folder / hf.WEIGHTS).unlink()
    return folder


def tensors(model):
    return {name: tensor.clone() for name, tensor in hf.hf_tensors(model)}


def same(folder, model):
    back = hf.load(folder)
    for (name, ours), (_, exact) in zip(hf.hf_tensors(back), hf.hf_tensors(model), strict=True):
        assert torch.equal(ours, exact.to(ours.dtype)), name
    return back


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pth", "x.pt"])
def test_a_single_file_or_its_folder(name, new, model, folder, tmp_path):
    content = tensors(model) if name != "x.pt" else {"step": 3, "state_dict": tensors(model)}
    torch.save(content, folder / name, _use_new_zipfile_serialization=new)
    for place, source in enumerate((folder, folder / name)):
        target = import_model(source, tmp_path / f"out{place}", **QUIET)
        assert same(target, model).embed_tokens.weight.dtype == torch.float32


def test_shards_by_their_index(model, folder, tmp_path):
    every = tensors(model)
    half = len(every) // 2
    names = {name: f"pytorch_model-{1 + (place >= half)}-of-2.bin"
             for place, name in enumerate(every)}
    for file in set(names.values()):
        torch.save({name: tensor.bfloat16() for name, tensor in every.items()
                    if names[name] == file}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert same(import_model(folder, tmp_path / "out", **QUIET),
                model).embed_tokens.weight.dtype == torch.bfloat16
    wrong = {**names, "model.norm.weight": names[next(iter(names))]}
    index.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(UserError, match=r"lacks tensor model\.norm\.weight"):
        import_model(folder, tmp_path / "out", **QUIET)
    index.write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    with pytest.raises(UserError, match="not the name of a file beside it"):
        import_model(folder, tmp_path / "out", **QUIET)


def test_tokenizer_and_template_come_along(model, folder, tmp_path):
    torch.save(tensors(model), folder / "pytorch_model.bin")
    said = []
    import_model(folder, tmp_path / "bare", say=said.append)
    assert len(said) == 1 and "no tokenizer.json" in said[0]
    tokenizer = train_bpe(["a b"] * 3, TokenizerConfig(vocab_size=262))
    tokenizer.save(folder)
    beside = folder / "tokenizer_config.json"
    beside.write_text(json.dumps({**json.loads(beside.read_text()), "chat_template": "{{ 1 }}"}))
    target = import_model(folder, tmp_path / "out", **QUIET)
    assert json.loads((target / "tokenizer_config.json").read_text())["chat_template"] == "{{ 1 }}"
    assert (target / "tokenizer.json").is_file()


class Bomb:
    """What a hostile pickle calls when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("new", [True, False])
def test_a_hostile_pickle_runs_nothing(new, model, folder, tmp_path):
    victim = tmp_path / "victim"
    torch.save({**tensors(model), "x": Bomb(victim)}, folder / "pytorch_model.bin",
               _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match="nothing in it was executed") as error:
        import_model(folder, tmp_path / "out", **QUIET)
    assert "\n" not in str(error.value) and "pytorch_model.bin" in str(error.value)
    assert not victim.exists() and not (tmp_path / "out").exists()
    # The bomb is real: torch's unguarded reader sets it off.
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert victim.exists()


def test_damaged_and_foreign_files_are_one_line(model, folder, tmp_path):
    path = folder / "pytorch_model.bin"

    def refuse(words):
        with pytest.raises(UserError, match=words) as error:
            import_model(folder, tmp_path / "out", **QUIET)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        assert not (tmp_path / "out").exists()

    torch.save(tensors(model), path)
    data = path.read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:cut])
        refuse("torch refuses it")
    path.write_bytes(b"not a pickle")
    refuse("torch refuses it")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", struct.pack("<Q", 7))
    refuse("torch refuses it")
    for content, words in (
            ([1, 2], "holds a list"), ({"a": 1}, "'a' is a int"),
            ({"a": torch.ones(2, dtype=torch.int64)}, "tensor a is torch.int64"),
            ({"a": torch.ones(1).expand(2**40)}, "repeats its elements"),
            ({"a": torch.ones(2, 2).to_sparse()}, "torch.sparse_coo"),
            ({**tensors(model), "b": torch.ones(2)}, "tensor b has no place"),
            ({**tensors(model), "model.norm.weight": torch.ones(2)},
             r"model\.norm\.weight is \(2,\)"),
            ({**tensors(model), "lm_head.weight": torch.ones(300, 64)}, "differs from")):
        torch.save(content, path)
        refuse(words)
    less = tensors(model)
    del less["model.layers.1.mlp.up_proj.weight"]
    torch.save(less, path)
    refuse(r"lacks tensor model\.layers\.1\.mlp\.up_proj\.weight \(96, 64\)")


def test_equal_tied_head_is_welcome_and_a_safetensors_folder_needs_nothing(
        model, folder, tmp_path):
    every = tensors(model)
    every["lm_head.weight"] = every["model.embed_tokens.weight"]
    torch.save(every, folder / "pytorch_model.bin")
    same(import_model(folder, tmp_path / "out", **QUIET), model)
    with pytest.raises(UserError, match="needs no import"):
        import_model(tmp_path / "out", tmp_path / "again", **QUIET)


def test_an_absurd_config_is_refused_before_a_model_is_laid_out(model, folder, tmp_path):
    torch.save(tensors(model), folder / "pytorch_model.bin")
    values = json.loads((folder / hf.CONFIG).read_text())
    (folder / hf.CONFIG).write_text(json.dumps({**values, "num_hidden_layers": 10**9}))
    with pytest.raises(UserError, match="num_hidden_layers is 1000000000"):
        import_model(folder, tmp_path / "out", **QUIET)
