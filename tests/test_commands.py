"""The commands around a model that is trained: looking at rows, scoring, importing."""

import json
import math

import pytest
import torch
import tuned

from fastllm import cli
from fastllm.run import open_model


def run(*words):
    assert cli.main([*map(str, words), "--debug"]) == 0


def test_preview_brackets_what_is_not_trained(tmp_path, capsys):
    data = tuned.chats(tmp_path, 1)
    run("data", "preview", "--kind", "chat", "--from", tuned.base(), "--data.path", data,
        "--data.holdout", 0, "--data.cache-dir", tmp_path / "cache", "--rows", 1)
    row, = (json.loads(line) for line in data.read_text().splitlines())
    out = capsys.readouterr().out.replace("\n", "")
    question, answer = (message["content"] for message in row["messages"])
    assert f"⟧{answer}<|im_end|>⟦" in out
    assert f"user{question}<|im_end|>" in out


def test_kinds_of_data_need_a_tokenizer(tmp_path, capsys):
    assert cli.main(["data", "stats", "--kind", "preference", "--data.path",
                     str(tuned.pairs(tmp_path))]) == 2
    assert "--kind preference needs --from MODEL or --tokenizer.path" in capsys.readouterr().err


def test_prepared_rows_are_opened_again_and_by_their_kind_only(tmp_path, capsys):
    words = ["--from", tuned.base(), "--data.cache-dir", tmp_path / "cache"]
    run("data", "prepare", "--kind", "chat", *words, "--data.path", tuned.chats(tmp_path))
    folder = capsys.readouterr().out.split("prepared: ")[1].split()[0]
    run("data", "stats", "--kind", "chat", *words, "--data.path", folder)
    assert "40 conversations" not in capsys.readouterr().err
    assert cli.main(["data", "stats", "--data.path", folder]) == 2
    assert "holds prepared chat data" in capsys.readouterr().err


def test_eval_of_answers_alone(tmp_path):
    """The loss of a chat is that of its trained tokens, in the file and by hand."""
    data, out = tuned.chats(tmp_path, 6), tmp_path / "results.json"
    run("eval", tuned.base(), "--kind", "chat", "--data.path", data, "--data.cache-dir",
        tmp_path / "cache", "--seq-len", 64, "--out", out, "--device", "cpu", "--dtype", "fp32")
    found = json.loads(out.read_text())
    assert found["perplexity"] == pytest.approx(math.exp(found["val_loss"]))
    from fastllm.data.chat import ChatConfig, ChatEncoder

    model, tokenizer, _ = open_model(str(tuned.base()), device=torch.device("cpu"))
    encoder, nats, count = ChatEncoder(tokenizer, ChatConfig()), 0.0, 0
    for line in data.read_text().splitlines():
        tokens = encoder.chat(json.loads(line))
        ids = torch.tensor([tokens.ids])
        with torch.no_grad():
            logps = model.logits(model(ids))[0, :-1].double().log_softmax(-1)
        for place, wanted in enumerate(tokens.trained[1:]):
            if wanted:
                nats -= float(logps[place, tokens.ids[place + 1]])
                count += 1
    assert found["val_tokens"] == count
    assert found["val_loss"] == pytest.approx(nats / count, rel=1e-5)


def test_eval_of_a_task(tmp_path, capsys):
    rows = [{"question": f"colour {n}", "choices": ["red", "green", "blue"], "answer": n % 3}
            for n in range(6)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "results.json"
    run("eval", tuned.base(), "--task.path", tmp_path / "task.jsonl", "--task.shots", 1, "--out",
        out, "--device", "cpu")
    found = json.loads(out.read_text())
    assert found["questions"] == 6 and 0 <= found["metrics"]["acc"]["value"] <= 1
    assert "acc" in capsys.readouterr().out
    assert cli.main(["eval", str(tuned.base()), "--task.path", "a", "--data.path", "b"]) == 2
    assert "one at a time" in capsys.readouterr().err


def test_chat_answers_a_line_from_a_pipe(monkeypatch, capsys):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("red green\n"))
    run("chat", tuned.base(), "--max-new-tokens", 4, "--temperature", 0, "--device", "cpu")
    model, tokenizer, base = open_model(str(tuned.base()), device=torch.device("cpu"))
    from fastllm.data.chat import ChatConfig, ChatEncoder
    from fastllm.generate import GenerateConfig, generate

    encoder = ChatEncoder(tokenizer, ChatConfig())
    ids, = generate(model, [encoder.prompt([{"role": "user", "content": "red green"}])],
                    GenerateConfig(max_new_tokens=4, temperature=0),
                    eos_token_ids={tokenizer.eos_id, *encoder.stop_ids, *base.stop_ids()})
    assert tokenizer.decode(ids).strip() in capsys.readouterr().out


def test_import_is_the_one_door_for_pickles(tmp_path, capsys):
    model, _, _ = open_model(str(tuned.base()), device=torch.device("cpu"))
    from fastllm.model import hf

    folder = tmp_path / "theirs"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tuned.base() / name).read_bytes())
    torch.save({name: tensor.clone() for name, tensor in hf.hf_tensors(model)},
               folder / "pytorch_model.bin")
    assert cli.main(["generate", str(folder)]) == 2
    assert "fastllm-train import" in capsys.readouterr().err
    run("import", folder, "--out", tmp_path / "ours")
    again, _, _ = open_model(str(tmp_path / "ours"), device=torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(),
                                                 strict=True))
