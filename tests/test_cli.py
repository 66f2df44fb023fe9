"""The command: each mistake is one clear line and exit code 2; the verbs work end to end."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny

from fastllm import cli


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command in this process."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished tiny run (and, beside it, its text and cache)."""
    folder = tmp_path_factory.mktemp("trained")
    assert cli.main(["pretrain", *tiny.arguments(folder)]) == 0
    return folder


def empty_file(folder):
    (folder / "empty.txt").touch()
    return folder / "empty.txt"


def broken_lines(folder):
    (folder / "bad.jsonl").write_text('{"text": \n{"txt": "x"}\n[1]\n', encoding="utf-8")
    return folder / "bad.jsonl"


MISTAKES = {
    "unknown key": (lambda f: {"train.lrr": 3}, ["train.lrr", "did you mean"]),
    "unknown section": (lambda f: {"optimm.lr": 3}, ["optimm", "did you mean optim"]),
    "wrong type": (lambda f: {"train.batch_size": "many"}, ["train.batch-size", "'many'"]),
    "impossible value": (lambda f: {"train.steps": -1}, ["train.steps", "'-1'"]),
    "impossible choice": (lambda f: {"schedule.name": "cosin"}, ["schedule.name", "cosine"]),
    "heads": (lambda f: {"model.num_attention_heads": 3}, ["num_attention_heads"]),
    "steps and epochs": (lambda f: {"train.epochs": 2}, ["train.steps", "train.epochs"]),
    "missing file": (lambda f: {"data.path": f / "absent.txt"}, ["absent.txt", "no such file"]),
    "empty file": (lambda f: {"data.path": empty_file(f)}, ["empty.txt", "empty"]),
    "malformed lines": (lambda f: {"data.path": broken_lines(f)}, ["bad.jsonl:1"]),
    "first bad line": (lambda f: {"data.path": broken_lines(f), "data.on_bad": "error"},
                       ["bad.jsonl:1"]),
    "sequence too long": (lambda f: {"train.seq_len": 65},
                          ["train.seq-len 65", "max-position-embeddings 64"]),
    "token beyond the model": (lambda f: {"tokenizer.vocab_size": 320}, ["320", "300"]),
    "no such preset": (lambda f: {"preset": "minimind-26"}, ["minimind-26", "minimind-26m"]),
    "no config file": (lambda f: {"config": f / "run.yaml"}, ["run.yaml", "No such file"]),
    "no GPU": (lambda f: {"train.device": "cuda"}, ["train.device cuda", "no GPU"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(mistake, tmp_path, capsys):
    changes, words = MISTAKES[mistake]
    if mistake == "no GPU" and __import__("torch").cuda.is_available():
        return
    code, _, err = run(capsys, "pretrain", *tiny.arguments(tmp_path, **changes(tmp_path)))
    assert code == 2
    assert err.count("\n") == 1, err
    for word in words:
        assert str(word) in err, err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["pretain"], ["pretain", "pretrain"]), (["data"], ["data prepare", "data stats"]),
    (["eval"], ["eval needs a model"]), (["generate", "nowhere"], ["no such model", "nowhere"]),
    (["generate", "."], ["is not a model", "checkpoints/"]), (["tokenizer", "train"], ["--out"]),
    (["pretrain", "stray"], ["stray"]), (["pretrain", "--resume"], ["--resume needs --out"]),
])
def test_mistakes_of_other_commands(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


def test_a_folder_that_holds_a_run_is_not_overwritten(trained, capsys):
    before = (trained / "run" / "metrics.jsonl").read_bytes()
    code, _, err = run(capsys, "pretrain", *tiny.arguments(trained))
    assert code == 2
    assert "already holds a run" in err
    assert (trained / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("key", "value"), [("model.hidden_size", 64), ("train.seq_len", 16),
                                            ("train.dtype", "fp16"), ("data.holdout", 0.2)])
def test_resuming_another_model_or_other_data_is_refused(trained, tmp_path, capsys, key, value):
    shutil.copytree(trained, tmp_path / "copy")
    arguments = tiny.arguments(tmp_path / "copy", **{key: value, "train.steps": 20})
    code, _, err = run(capsys, "pretrain", "--resume", *arguments)
    assert code == 2
    assert "cannot resume" in err
    assert key.split(".")[1] in err or "fingerprint" in err, err


def test_a_full_disk_is_one_line_and_the_run_resumes(tmp_path, capsys, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if (tmp_path / "run" / "checkpoints" / "step-00000004").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, err = run(capsys, "pretrain", *tiny.arguments(tmp_path))
    assert code == 2
    assert "No space left on device" in err
    assert err.count("\n") == 1
    monkeypatch.undo()
    code, out, _ = run(capsys, "pretrain", "--resume", "--out", tmp_path / "run")
    assert code == 0
    assert "at step 4" in out


def test_the_run_folder_holds_what_it_should(trained):
    folder = trained / "run"
    for name in ("config.yaml", "environment.json", "dispatch.json", "metrics.jsonl", "report.html",
                 "tokenizer.json", "summary.json", "model/config.json", "model/model.safetensors",
                 "model/tokenizer.json", "checkpoints/step-00000012/manifest.json"):
        assert (folder / name).is_file(), name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 13))
    evals = [line for line in lines if "val_bpb" in line]
    assert [line["step"] for line in evals] == [6, 12]
    assert evals[-1]["val_loss"] < evals[0]["val_loss"] < 5.8
    assert lines[0]["loss"] == pytest.approx(5.70, abs=0.1)  # ln 300: nothing is known yet
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    assert summary["val_bpb"] == pytest.approx(evals[-1]["val_bpb"], rel=1e-6)


def test_the_model_loads_in_transformers(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(trained / "run" / "model")
    ids = tokenizer("The value is", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=4)[0]).startswith("The value is")


def test_eval_generate_export_info(trained, tmp_path, capsys):
    code, out, _ = run(capsys, "eval", trained / "run", "--data.path", trained / "text.txt",
                       "--data.cache-dir", tmp_path, "--device", "cpu")
    assert code == 0
    assert "bits per byte" in out
    arguments = ["generate", trained / "run", "--prompt", "The", "--max-new-tokens", 5, "--seed", 1]
    code, first, _ = run(capsys, *arguments)
    assert code == 0
    assert first.startswith("The")
    assert run(capsys, *arguments)[1] == first
    code, _, _ = run(capsys, "export", trained / "run", "--out", tmp_path / "exported")
    assert code == 0
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == \
        (trained / "run" / "model" / "model.safetensors").read_bytes()
    code, out, _ = run(capsys, "info", "--device", "cpu")
    assert code == 0
    assert "rms_norm" in out


def test_data_and_tokenizer_commands(tmp_path, capsys):
    text = tiny.text(tmp_path)
    common = ["--data.path", text, "--data.cache-dir", tmp_path / "cache",
              "--tokenizer.vocab-size", 300]
    code, out, _ = run(capsys, "data", "prepare", *common)
    assert code == 0
    assert "0 rejected" in out
    for verb in ("stats", "preview"):
        code, out, _ = run(capsys, "data", verb, *common, "--train.seq-len", 64)
        assert code == 0
        assert out
    code, out, _ = run(capsys, "tokenizer", "train", "--out", tmp_path / "tokenizer.json", *common)
    assert code == 0
    assert (tmp_path / "tokenizer.json").is_file()


def test_help_is_readable(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for verb in cli.VERBS:
        assert verb in out
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--train.batch-size" in out
    assert "Rows of seq_len tokens in a micro-batch" in out


def test_an_unexpected_failure_is_one_line_and_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(cli.config, "build", lambda *_: 1 / 0)
    code, _, err = run(capsys, "info")
    assert code == 1
    assert err.count("\n") == 1
    assert "division by zero" in err
    code, _, err = run(capsys, "info", "--debug")
    assert "Traceback" in err


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "fastllm", "nonsense"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("fastllm-train: error: no command 'nonsense'")
