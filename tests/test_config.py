"""fastllm.config: layers, strictness, and one clear line for everything that is wrong."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from fastllm import config
from fastllm.config import UserError


@dataclass(kw_only=True)
class Train:
    steps: Annotated[int, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(gt=0)] = 8
    lr: float = 1e-3
    dtype: Literal["bf16", "fp32"] = "fp32"
    compile: bool = False
    paths: list[str] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.95)

    def validate(self) -> None:
        if self.steps == 13:
            raise ValueError("train.steps: 13 is not possible here")


@dataclass(kw_only=True)
class Run:
    name: str = "x"
    train: Train = field(default_factory=Train)


@dataclass(kw_only=True)
class Evaluation:
    train: Train = field(default_factory=lambda: Train(batch_size=2, compile=True))


def test_a_section_keeps_its_owners_defaults_where_it_is_set_in_part():
    found = config.build(Evaluation, {"train": {"lr": 0.5, "compile": False}}).train
    assert (found.batch_size, found.compile, found.lr) == (2, False, 0.5)
    assert config.build(Evaluation, {}).train.batch_size == 2


def build(*arguments: str) -> Run:
    return config.build(Run, config.from_arguments(list(arguments)))


def test_values_of_every_kind():
    run = build("--name", "y", "--train.steps", "5", "--train.lr=1e-4", "--train.dtype", "bf16",
                "--train.compile", "--train.paths", "a", "b", "--train.betas", "0.8", "0.9")
    assert run == Run(name="y", train=Train(steps=5, lr=1e-4, dtype="bf16", compile=True,
                                            paths=["a", "b"], betas=(0.8, 0.9)))
    assert build("--train.paths", "one").train.paths == ["one"]
    assert build("--train.steps", "none").train.steps is None
    assert build("--train.no-compile").train.compile is False


def test_dashes_and_underscores_are_one():
    assert build("--train.batch-size", "3") == build("--train.batch_size", "3")


def test_later_layers_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  batch-size: 2\n  lr: 1e-2\n", encoding="utf-8")
    layer = config.merge(config.from_yaml(file), config.from_arguments(["--train.lr", "5"]))
    run = config.build(Run, layer)
    assert (run.train.batch_size, run.train.lr) == (2, 5.0)


def test_what_is_in_force_reads_back(tmp_path):
    run = build("--train.steps", "7", "--train.paths", "a", "b")
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml(run), encoding="utf-8")
    assert config.build(Run, config.from_yaml(file)) == run


@pytest.mark.parametrize(("arguments", "words"), [
    (["--train.batchsize", "3"], ["train.batchsize", "train.batch-size"]),
    (["--tran.lr", "3"], ["tran", "train"]),
    (["--train.batch-size", "many"], ["train.batch-size", "many", "integer"]),
    (["--train.batch-size", "0"], ["train.batch-size", "'0'", "greater than 0"]),
    (["--train.steps", "-1"], ["train.steps", "greater than 0"]),
    (["--train.steps", "13"], ["train.steps", "13"]),
    (["--train.dtype", "bf61"], ["train.dtype", "bf61", "did you mean bf16"]),
    (["--train.lr", "fast"], ["train.lr", "fast"]),
    (["--train", "3"], ["train is a section"]),
    (["--train.lr", "1", "--train.lr", "2"], ["twice"]),
    (["stray"], ["stray", "--section.key value"]),
])
def test_errors_name_key_value_and_mend(arguments, words):
    with pytest.raises(UserError) as caught:
        build(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(("text", "words"), [
    ("a: [1", ["run.yaml:", "not valid YAML"]), ("- 1\n- 2\n", ["mapping", "list"]),
    ("train:\n  lr: !!python/object:os.system x\n", ["not valid YAML"]),
])
def test_bad_yaml(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        config.from_yaml(file)
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_yaml():
    with pytest.raises(UserError, match=r"cannot read config nowhere.yaml: No such file"):
        config.from_yaml("nowhere.yaml")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(
    ["--train.lr", "--train.steps", "--train.paths", "--name", "--train", "--train.betas", "1",
     "-1", "none", "--", "--train.lr=", "--.", "--train..lr", "--name.x"])), max_size=6))
def test_any_arguments_build_or_explain_themselves(arguments):
    try:
        run: Run | str = config.build(Run, config.from_arguments(arguments))
    except UserError as error:
        run = str(error)
    assert isinstance(run, Run) or run
