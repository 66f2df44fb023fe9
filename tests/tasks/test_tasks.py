"""Whole tasks: forced answers are found, examples never leak, results add up and repeat."""

import json
import math

import pytest
import torch
from rich.console import Console
from task_models import make_model, train_on

from fastllm.adapters import AdapterConfig, apply
from fastllm.config import UserError
from fastllm.tasks import Metric, TaskConfig, run_task
from fastllm.tasks.prompts import Shots, choice_prompt, exact_messages, exact_prompt
from fastllm.tasks.rows import Item, read_items

WORDS = ["one", "two", "three", "four"]
CHOICE_ROWS = [{"question": f"what is {number}?", "choices": WORDS, "answer": number % 4}
               for number in range(12)]
EXACT_ROWS = [{"question": f"say {number}", "answer": f"{number * 7} it is"}
              for number in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def taught(tokenizer):
    """A model that has seen the right answers until it knows them."""
    model = make_model(tokenizer, dropout=0.0)
    items = [Item("", row["question"], (WORDS[row["answer"]],), tuple(WORDS), row["answer"])
             for row in CHOICE_ROWS[:4]]
    start, end = [tokenizer.bos_id], [tokenizer.eos_id]
    sequences = []
    for item in items:
        prompt, texts = choice_prompt(item, [], False)
        sequences.append(start + tokenizer.encode(prompt) + tokenizer.encode(texts[item.right]))
    for row in EXACT_ROWS:
        prompt = exact_prompt(Item("", row["question"], (row["answer"],)), [])
        sequences.append(start + tokenizer.encode(prompt)
                         + tokenizer.encode(" " + row["answer"]) + end)
    train_on(model, sequences, 40)
    return model


def test_a_model_that_knows_the_answers_gets_them(taught, tokenizer, write):
    path = write("words.jsonl", CHOICE_ROWS[:4])
    result = run_task(taught, tokenizer, TaskConfig(path=[path], samples=True))
    assert result.metrics == {"acc": Metric(1.0, 0.0), "acc_norm": Metric(1.0, 0.0)}
    assert [sample["predicted"] for sample in result.samples] == WORDS
    assert result.name == "words" and result.questions == 4
    wrong = [{**row, "answer": (row["answer"] + 1) % 4} for row in CHOICE_ROWS[:4]]
    result = run_task(taught, tokenizer, TaskConfig(path=[write("b.jsonl", wrong)]))
    assert result.metrics["acc"].value == 0.0


@pytest.mark.parametrize(("normalizer", "value"), [("none", 1.0), ("text", 1.0), ("number", 1.0)])
def test_exact_match_of_a_model_that_knows(taught, tokenizer, write, normalizer, value):
    config = TaskConfig(kind="exact", path=[write("a.jsonl", EXACT_ROWS)], normalizer=normalizer,
                        max_new_tokens=24, samples=True)
    result = run_task(taught, tokenizer, config)
    assert result.metrics["exact_match"].value == value
    assert result.samples[0]["written"] == " 7 it is"
    assert result.samples[0]["predicted"] == ("7" if normalizer == "number" else "7 it is")
    cut = run_task(taught, tokenizer, TaskConfig(**{**vars(config), "stop": [" it", "unseen"]}))
    assert cut.samples[0]["written"] == " 7"
    assert cut.metrics["exact_match"].value == (1.0 if normalizer == "number" else 0.0)


def test_acc_norm_divides_by_bytes(model, tokenizer, write):
    rows = [{"question": "Q", "choices": ["é", "a much longer text of many words"], "answer": 0}]
    result = run_task(model, tokenizer, TaskConfig(path=[write("a.jsonl", rows)], samples=True))
    sample = result.samples[0]
    by_byte = [sample["loglikelihoods"][0] / 2, sample["loglikelihoods"][1] / 32]
    assert sample["right_norm"] == (by_byte[0] >= by_byte[1])
    assert sample["right"] and not sample["right_norm"]
    assert result.metrics["acc"].stderr is None


def test_the_prompt_and_the_border(model, tokenizer, write):
    path = write("a.jsonl", CHOICE_ROWS)
    config = TaskConfig(path=[path], shots=2, samples=True, limit=3)
    result = run_task(model, tokenizer, config)
    for sample in result.samples:
        *shots, question = sample["prompt"].split("\n\n")
        assert len(shots) == 2 and question.endswith("?\nAnswer:")
        for shot in shots:
            asked, answer = shot.split("\nAnswer: ")
            row = next(row for row in CHOICE_ROWS if f"Question: {row['question']}" == asked)
            assert answer == WORDS[row["answer"]]
    prompt, texts = choice_prompt(Item("", "Q", ("b",), ("a", "b"), 1), [], False)
    # Apart, the prompt and a choice have the tokens that they have together.
    assert tokenizer.encode(prompt) + tokenizer.encode(texts[0]) == tokenizer.encode(
        prompt + texts[0])
    prompt, texts = choice_prompt(Item("", "Q", ("b",), ("a", "b"), 1),
                                  [Item("", "P", ("d",), ("c", "d"), 1)], True)
    assert prompt == "Question: P\nA. c\nB. d\nAnswer: B\n\nQuestion: Q\nA. a\nB. b\nAnswer:"
    assert texts == [" A", " B"]
    plain = Item("", "He", ("ran",), ("ran", "sat"), 0, plain=True)
    assert choice_prompt(plain, [plain], False)[0] == "He ran\n\nHe"


def test_examples_from_the_same_file_never_hold_the_row_itself(write):
    rows = [*CHOICE_ROWS, {**CHOICE_ROWS[0], "question": " What  is 0?"}]  # row 0 once more
    config = TaskConfig(path=[write("a.jsonl", rows)], shots=5)
    items, _ = read_items(config, config.path, "task.path")
    chosen = [Shots(items, config).of(index) for index in range(len(items))]
    for item, shots in zip(items, chosen, strict=True):
        assert len({shot.where for shot in shots}) == 5
        assert item.key not in {shot.key for shot in shots}
    assert len({tuple(shot.where for shot in shots) for shots in chosen}) > 6
    assert chosen == [Shots(items, config).of(index) for index in range(len(items))]
    other = Shots(items, TaskConfig(path=config.path, shots=5, seed=1))
    assert chosen != [other.of(index) for index in range(len(items))]
    # With as many as there are, every other question is an example.
    every = Shots(items[:12], TaskConfig(path=config.path, shots=11)).of(3)
    assert {shot.key for shot in every} == {item.key for item in items[:12]} - {items[3].key}


def test_examples_from_a_file_are_the_same_for_all_and_never_a_question(model, tokenizer, write):
    pool = [*CHOICE_ROWS[:3], *({**CHOICE_ROWS[0], "question": f"and {n}?"} for n in range(4)), "{"]
    config = TaskConfig(path=[write("a.jsonl", CHOICE_ROWS)], shots=4, samples=True,
                        shots_path=[write("shots.jsonl", pool)])
    result = run_task(model, tokenizer, config)
    heads = {sample["prompt"].rpartition("\n\n")[0] for sample in result.samples}
    assert len(heads) == 1 and heads.pop().count("Question: and ") == 4
    assert any("3 rows of task.shots-path ask what the task asks" in note
               for note in result.notes)
    assert result.shots_report.num_rejected == 1
    with pytest.raises(UserError, match=r"task\.shots 5: task\.shots-path has 4 usable"):
        run_task(model, tokenizer, TaskConfig(**{**vars(config), "shots": 5}))


def test_too_few_other_rows(model, tokenizer, write):
    config = TaskConfig(path=[write("a.jsonl", CHOICE_ROWS)], shots=12)
    with pytest.raises(UserError, match=r"task\.shots 12 needs as many other questions"):
        run_task(model, tokenizer, config)


def test_results_repeat_and_do_not_depend_on_the_batch(model, tokenizer, write):
    path = write("a.jsonl", CHOICE_ROWS)
    one = run_task(model, tokenizer, TaskConfig(path=[path], shots=1, samples=True))
    assert run_task(model, tokenizer, TaskConfig(path=[path], shots=1, samples=True)) == one
    small = run_task(model, tokenizer, TaskConfig(path=[path], shots=1, batch_tokens=1))
    assert small.metrics == one.metrics
    drawn = {"kind": "exact", "path": [write("b.jsonl", EXACT_ROWS)], "temperature": 1.0,
             "max_new_tokens": 8, "samples": True}
    runs = [run_task(model, tokenizer, TaskConfig(**drawn, batch_size=size)) for size in (1, 3)]
    assert runs[0] == runs[1]


def test_long_prompts_lose_their_beginning_and_that_is_said(tokenizer, write):
    model = make_model(tokenizer, max_position_embeddings=64)
    rows = [{**row, "question": row["question"] * 20} for row in CHOICE_ROWS[:5]]
    result = run_task(model, tokenizer, TaskConfig(path=[write("a.jsonl", rows)]))
    assert result.truncated == 5
    assert "5 prompts are longer than the model's 64" in result.notes[0]
    assert "a.jsonl:1" in result.notes[0]
    short = {"question": "Q", "choices": ["x", "y" * 200], "answer": 0}
    with pytest.raises(UserError, match=r"b\.jsonl:1: .* leave no room"):
        run_task(model, tokenizer, TaskConfig(path=[write("b.jsonl", [short])]))
    exact = TaskConfig(kind="exact", path=[write("c.jsonl", EXACT_ROWS)], max_new_tokens=60)
    assert run_task(model, tokenizer, exact).truncated == 4


def test_a_prompt_that_is_cut_keeps_bos_and_its_end(tokenizer, write, monkeypatch):
    from fastllm.tasks import evaluation
    model, seen = make_model(tokenizer, max_position_embeddings=64), []
    real = evaluation.loglikelihoods
    monkeypatch.setattr(evaluation, "loglikelihoods", lambda model, questions, **kwargs: (
        seen.extend(questions), real(model, questions, **kwargs))[1])
    rows = [{**CHOICE_ROWS[0], "question": "zig zag " * 40}]
    run_task(model, tokenizer, TaskConfig(path=[write("a.jsonl", rows)]))
    context = seen[0][0].context
    whole = tokenizer.encode(f"Question: {rows[0]['question'].strip()}\nAnswer:")
    assert context[0] == tokenizer.bos_id and context[1:] == whole[-len(context) + 1:]
    assert max(len(one.inputs) for one in seen[0]) == 64


class FakeEncoder:
    """Roles as words, a turn's end as the tokenizer's <|im_end|>."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.stop_ids = frozenset([tokenizer.token_id("<|im_end|>")])

    def prompt(self, messages, tools=None):
        return [token for message in messages for token in [
            *self.tokenizer.encode(f"{message['role']}: {message['content']}"),
            *self.stop_ids]] + self.tokenizer.encode("assistant:")


def test_chat_prompts(tokenizer, write):
    model = make_model(tokenizer, dropout=0.0)
    encoder = FakeEncoder(tokenizer)
    sequences = []
    for row in EXACT_ROWS:
        item = Item("", row["question"], (row["answer"],))
        sequences.append(encoder.prompt(exact_messages(item, [], "be brief"))
                         + tokenizer.encode(" " + row["answer"]) + [*encoder.stop_ids])
    train_on(model, sequences, 40)
    config = TaskConfig(kind="exact", path=[write("a.jsonl", EXACT_ROWS)], chat=True,
                        system="be brief", max_new_tokens=24, samples=True)
    result = run_task(model, tokenizer, config, encoder=encoder)
    assert result.metrics["exact_match"].value == 1.0
    assert "<|im_end|>" in result.samples[0]["prompt"]
    with pytest.raises(UserError, match="needs a chat template"):
        run_task(model, tokenizer, config)
    with pytest.raises(UserError, match=r"a\.jsonl:1: the conversation has"):
        run_task(model, tokenizer, TaskConfig(**{**vars(config), "max_new_tokens": 500}),
                 encoder=encoder)
    shots = exact_messages(Item("", "Q", ("A",)), [Item("", "P", ("B", "C"))], None)
    assert shots == [{"role": "user", "content": "P"}, {"role": "assistant", "content": "B"},
                     {"role": "user", "content": "Q"}]


def test_standard_error():
    metric = Metric.of([1.0, 0.0, 0.0, 1.0, 1.0])
    assert metric.value == 0.6
    assert metric.stderr == pytest.approx(math.sqrt(0.6 * 0.4 / 4))
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    assert metric.stderr == pytest.approx(float(scores.std() / 5**0.5))
    assert Metric.of([1.0]) == Metric(1.0, None)


def test_json_and_table(model, tokenizer, write):
    path = write("a[b].jsonl", [*CHOICE_ROWS, "{"])
    told = []
    result = run_task(model, tokenizer, TaskConfig(path=[path], limit=2, samples=True),
                      progress=lambda *args: told.append(args))
    values = json.loads(json.dumps(result.to_dict()))
    assert values["metrics"]["acc"].keys() == {"value", "stderr"}
    assert values["report"]["records"] == 13 and values["report"]["used"] == 12
    assert set(values["samples"][0]) >= {"prompt", "answer", "predicted", "right"}
    assert told[-1] == ("answering", 2, 2)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.render())
    text = console.export_text()
    for words in ("a[b] (0-shot)", "acc_norm", "13 records = 12 used", "a[b].jsonl:13: not valid",
                  "the first 2 of 12 questions"):
        assert words in " ".join(text.split()), text
    assert not run_task(model, tokenizer, TaskConfig(path=[path])).samples


def test_a_tokenizer_with_a_space_of_its_own_gets_no_second(tokenizer, write, monkeypatch):
    """As SentencePiece's: a space goes before every text that begins, and none before the rest."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, normalizers, pre_tokenizers

    from fastllm.data.tokenizer import Tokenizer
    from fastllm.tasks import evaluation
    words = ["<s>", "</s>", "<pad>", "▁", "▁one", "▁two", "▁Question:", "▁Q", "▁Answer:", "<unk>"]
    inner = Inner(models.WordLevel({word: place for place, word in enumerate(words)}, "<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                             normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    ours = Tokenizer(inner, bos="<s>", eos="</s>", pad="<pad>")
    assert ours.encode("one") == [4] and ours.encode(" one") == [3, 4]
    seen = []
    monkeypatch.setattr(evaluation, "loglikelihoods", lambda model, questions, **_: (
        seen.extend(questions), [[0.0] * len(question) for question in questions])[1])
    rows = [{"question": "Q", "choices": ["one", "two"], "answer": 0}]
    run_task(make_model(ours), ours, TaskConfig(path=[write("a.jsonl", rows)]))
    assert [one.ids for one in seen[0]] == [[4], [5]]


def test_a_stop_text_ends_the_work_too(taught, tokenizer, write, monkeypatch):
    steps, forward = [], type(taught).forward
    monkeypatch.setattr(type(taught), "forward", lambda self, ids, **kwargs: (
        steps.append(1), forward(self, ids, **kwargs))[1])
    config = {"kind": "exact", "path": [write("a.jsonl", EXACT_ROWS[:1])], "max_new_tokens": 24}
    run_task(taught, tokenizer, TaskConfig(**config))
    whole = len(steps)
    run_task(taught, tokenizer, TaskConfig(**config, stop=[" it"]))
    assert len(steps) - whole < whole


@pytest.mark.parametrize("kind", ["choice", "exact"])
def test_virtual_tokens_take_their_room(tokenizer, write, kind):
    model = make_model(tokenizer, max_position_embeddings=64)
    apply(model, AdapterConfig(name="prompt", virtual_tokens=20))
    rows = [{"question": "zig zag " * 40, "answer": 0, "choices": ["a", "b"]}]
    config = TaskConfig(kind=kind, path=[write("a.jsonl", rows)], max_new_tokens=8)
    assert run_task(model, tokenizer, config).truncated == 1
