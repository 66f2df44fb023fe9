"""Rows of files: every form that is read, every fault that is named, counts that add up."""

import json

import pytest

from fastllm.config import UserError, build
from fastllm.tasks import TaskConfig
from fastllm.tasks.normalizers import normalize
from fastllm.tasks.rows import read_items

ABC = ["one", "two", "three"]


def read(path, **settings):
    config = TaskConfig(path=[path], **settings)
    return read_items(config, config.path, "task.path")


@pytest.mark.parametrize(("fields", "right"), [
    ({"choices": ABC, "answer": 1}, 1),
    ({"choices": ABC, "answer": "B"}, 1),
    ({"choices": ABC, "answer": "two"}, 1),
    ({"choices": ABC, "answer": " 2 "}, 2),
    ({"choices": ABC, "answer": 0}, 0),
    ({"choices": ["3", "1", "2"], "answer": 1}, 1),     # a number is an index, whatever the texts
    ({"choices": {"text": ABC, "label": ["1", "2", "3"]}, "answerKey": "1"}, 0),
    ({"choices": {"text": ABC, "label": ["A", "B", "C"]}, "answerKey": "C"}, 2),
    ({"choices": {"text": ["B", "A"], "label": ["A", "B"]}, "answerKey": "A"}, 0),
    ({"choices": json.dumps(ABC), "answer": "C"}, 2),
    ({"choices": ["same", "same"], "answer": "same"}, 0),
])
def test_forms_of_an_answer(write, fields, right):
    (item,), _ = read(write("a.jsonl", [{"question": "Q", **fields}]))
    assert item.right == right and item.answers == (item.choices[right],)


def test_hellaswag(write):
    (item,), _ = read(write("a.jsonl", [{"ctx": "He ran", "endings": ABC, "label": "2"}]))
    assert item.plain and item.question == "He ran" and item.right == 2


GOOD = {"question": "Q", "choices": ABC, "answer": 1}
BAD = [
    ("{", "not valid JSON"),
    ("[1]", "expected an object, found a list"),
    ({**GOOD, "answer": 3}, "neither an index below 3"),
    ({**GOOD, "answer": -1}, "neither an index below 3"),
    ({**GOOD, "answer": "D"}, "nor one of A, B, C"),
    ({**GOOD, "answer": True}, "the answer is bool"),
    ({**GOOD, "answer": 1.0}, "the answer is float"),
    ({**GOOD, "answer": ""}, "no field 'answer' or 'answerKey' or 'label' with a value"),
    ({"question": "Q", "choices": ABC}, r"\(it has 'question', 'choices'\)"),
    ({**GOOD, "question": 7}, "field 'question' is int"),
    ({**GOOD, "question": "  "}, "field 'question' is empty"),
    ({**GOOD, "question": "a\0b"}, "NUL"),
    ('{"question": "\\ud800", "choices": ["a", "b"], "answer": 0}', "lone surrogate"),
    ({**GOOD, "choices": ["one"], "answer": 0}, "1 choices, expected 2 to 26"),
    ({**GOOD, "choices": ["x"] * 27}, "27 choices"),
    ({**GOOD, "choices": ["one", ""]}, "choice 1 is empty"),
    ({**GOOD, "choices": ["one", None]}, "choice 1 is NoneType"),
    ({**GOOD, "choices": 5}, "neither a list of texts"),
    ({**GOOD, "choices": "one, two"}, "not a JSON list"),
    ({**GOOD, "choices": {"text": ABC, "label": ["A", "B"]}}, "as many labels"),
    ({**GOOD, "choices": {"text": ABC, "label": ["A", "A", "B"]}}, "as many labels"),
    ({**GOOD, "choices": ["2", "1", "0"], "answer": "2"}, "may mean '2' or '0'"),
    ({**GOOD, "choices": ["B", "A"], "answer": "A"}, "may mean 'B' or 'A'"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_counted_and_named(write, row, reason):
    path = write("a.jsonl", [GOOD, row, "", GOOD])
    items, report = read(path)
    assert [item.where for item in items] == [f"{path}:1", f"{path}:4"]
    assert (report.records, report.used, report.num_rejected, report.num_skipped) == (4, 2, 1, 1)
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{reason}"):
        read(path, on_bad="error")
    with pytest.raises(UserError, match="no usable document"):
        read(write("b.jsonl", [row]))


@pytest.mark.parametrize(("row", "answers"), [
    ({"question": "Q", "answer": "x"}, ("x",)), ({"prompt": "Q", "target": 3}, ("3",)),
    ({"question": "Q", "answer": ["x", "y"]}, ("x", "y"))])
def test_forms_of_an_exact_row(write, row, answers):
    (item,), _ = read(write("a.jsonl", [row]), kind="exact")
    assert item.answers == answers


@pytest.mark.parametrize(("answer", "reason"), [
    ([], "the list of answers is empty"), ("none", "nothing is left of the answer 'none'"),
    ({"a": 1}, "the answer is dict"), (None, "no field 'answer' or 'target'"),
    ([True], "the answer is bool")])
def test_answers_that_no_text_could_match(write, answer, reason):
    path = write("a.jsonl", [{"question": "Q", "answer": answer}, {"question": "Q", "answer": "7"}])
    items, report = read(path, kind="exact", normalizer="number")
    assert len(items) == 1 and reason in report.reasons[0]


def test_csv_json_and_parquet(write, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    csv = tmp_path / "a.csv"
    csv.write_text('question,choices,answer\n"Q, 1","[""a"", ""b""]",B\n', encoding="utf-8")
    plain = tmp_path / "b.json"
    plain.write_text(json.dumps([{"question": "Q", "choices": ["a", "b"], "answer": 0}]), "utf-8")
    pq.write_table(pa.Table.from_pylist([
        {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]},
         "answerKey": "2"}]), tmp_path / "c.parquet")
    items, report = read(str(tmp_path))
    assert [item.right for item in items] == [1, 0, 1] and report.files == 3


def test_missing_files_are_named_by_the_tasks_own_settings(tmp_path):
    with pytest.raises(UserError, match=r"task\.path: no such file or folder"):
        read(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(UserError, match=r"task\.path is empty"):
        read_items(TaskConfig(), [], "task.path")


@pytest.mark.parametrize(("text", "normalizer", "wanted"), [
    (" The  Cat's an animal. ", "text", "cats animal"), ("theatre", "text", "theatre"),
    (" A b ", "none", "A b"),
    ("so 3 + 4 = 7.", "number", "7"), ("#### 1,200", "number", "1200"),
    ("5 apples\n#### 12\nand 3 more", "number", "12"), ("it costs $18.00", "number", "18"),
    ("-3", "number", "-3"), ("5-3", "number", "3"), ("1,2,3", "number", "3"), ("-0", "number", "0"),
    ("= -$1,234.50", "number", "-1234.5"), ("none", "number", ""), ("007", "number", "7"),
    ("1,234,567", "number", "1234567"), (".5", "number", "0.5"), ("100", "number", "100")])
def test_normalizers(text, normalizer, wanted):
    assert normalize(text, normalizer) == wanted


@pytest.mark.parametrize(("settings", "words"), [
    ({"kind": "exact", "letters": True}, "task.letters is for kind choice"),
    ({"chat": True}, "task.chat is for kind exact"),
    ({"normalizer": "text"}, "task.normalizer"), ({"stop": ["x"]}, "task.stop"),
    ({"temperature": 1.0}, "task.temperature"),
    ({"kind": "exact", "system": "x"}, "task.system needs task.chat"),
    ({"shots_path": ["x"]}, "task.shots is 0"), ({"kind": "exact", "stop": [""]}, "empty text"),
    ({"shots": -1}, "shots: '-1' is not possible"), ({"kind": "exakt"}, "did you mean exact"),
    ({"normaliser": "text"}, "did you mean normalizer")])
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(UserError, match=words):
        build(TaskConfig, {"path": ["x"], **settings})
