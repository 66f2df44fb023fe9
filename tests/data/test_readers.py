"""Every malformed record is rejected with its line and its reason, and nothing else is lost."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllm.config import UserError
from fastllm.data.accounting import Report
from fastllm.data.sources import DataConfig, find_files, read_documents

GOOD = b'{"text": "good"}\n'
LONG = b'{"text": "' + b"x" * (10 << 20) + b'"}\n'

# name: (file, content, used, skipped, rejected, part of a rejection's `line: reason`)
CLASSES = {
    "truncated": ("a.jsonl", GOOD + b'{"text": "cut\n' + GOOD, 2, 0, 1, "2: not valid JSON"),
    "truncated last": ("a.jsonl", GOOD + b'{"text": "cut', 1, 0, 1, "2: not valid JSON"),
    "raw NUL": ("a.jsonl", GOOD + b'{"text": "a\0b"}\n', 1, 0, 1, "2: the text has a NUL"),
    "escaped NUL": ("a.jsonl", GOOD + b'{"text": "a\\u0000"}\n', 1, 0, 1, "2: the text has a NUL"),
    "BOM": ("a.jsonl", b"\xef\xbb\xbf" + GOOD, 1, 0, 0, ""),
    "BOM inside": ("a.jsonl", GOOD + b"\xef\xbb\xbf" + GOOD, 2, 0, 0, ""),
    "bad UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}\n', 1, 0, 1, "UTF-8 at byte 11 (0xff)"),
    "overlong UTF-8": ("a.jsonl", GOOD + b'{"text": "\xc0\x80"}\n', 1, 0, 1, "2: bad UTF-8"),
    "cut UTF-8": ("a.jsonl", GOOD + '{"text": "é'.encode()[:-1] + b"\n", 1, 0, 1, "2: bad UTF-8"),
    "surrogate": ("a.jsonl", GOOD + b'{"text": "\\ud800x"}\n', 1, 0, 1, "lone surrogate (U+D800)"),
    "surrogate pair": ("a.jsonl", b'{"text": "\\ud83d\\ude00"}\n', 1, 0, 0, ""),
    "deep nesting": ("a.jsonl", GOOD + b"[" * 200_000 + b"\n", 1, 0, 1, "2: nested too deeply"),
    "10 MB line": ("a.jsonl", LONG + GOOD, 2, 0, 0, ""),
    "not an object": ("a.jsonl", GOOD + b'"text"\n7\n[]\n', 1, 0, 3, "3: expected an object"),
    "wrong type": ("a.jsonl", GOOD + b'{"text": 5}\n', 1, 0, 1, "field 'text' is a number"),
    "null": ("a.jsonl", GOOD + b'{"text": null}\n', 1, 0, 1, "field 'text' is null"),
    "missing field": ("a.jsonl", GOOD + b'{"body": "x"}\n', 1, 0, 1, "no field 'text'"),
    "NaN": ("a.jsonl", GOOD + b'{"text": "x", "score": NaN}\n', 1, 0, 1, "NaN is not a JSON"),
    "huge number": ("a.jsonl", GOOD + b'{"n": ' + b"9" * 5000 + b"}\n", 1, 0, 1, "2: not valid"),
    "two objects": ("a.jsonl", GOOD + b'{"text": "a"} {"text": "b"}\n', 1, 0, 1, "Extra data"),
    "CRLF": ("a.jsonl", GOOD.replace(b"\n", b"\r\n") * 2, 2, 0, 0, ""),
    "no final newline": ("a.jsonl", GOOD + GOOD.strip(), 2, 0, 0, ""),
    "blank lines": ("a.jsonl", b"\n" + GOOD + b"  \n\n", 1, 3, 0, ""),
    "empty text": ("a.jsonl", GOOD + b'{"text": " \\n"}\n', 1, 1, 0, ""),
    "line separators": ("a.jsonl", '{"text": "a\u2028b\u0085c"}\n'.encode(), 1, 0, 0, ""),
    "list": ("a.json", b'[{"text": "a"},\n {"text": "b"}]', 2, 0, 0, ""),
    "list, bad element": ("a.json", b'[{"text": "a"},\n\n {"text": 1}]', 1, 0, 1, "3: field"),
    "list, cut": ("a.json", b'[{"text": "a"},\n {"text": ', 1, 0, 1, "2: not valid JSON"),
    "list, not closed": ("a.json", b'[{"text": "a"}', 1, 0, 1, "expected ',' or ']'"),
    "list, bad byte": ("a.json", b'[{"text": "a"}, {"text": "\xff"}]', 1, 0, 1, "lone surrogate"),
    "list, rest": ("a.json", b'[{"text": "a"}]\n{"text": "b"}', 1, 0, 1, "after the list's end"),
    "one object": ("a.json", b'{\n "text": "a"\n}\n', 1, 0, 0, ""),
    "objects a line": ("a.json", GOOD * 3, 3, 0, 0, ""),
    "csv": ("a.csv", b'id,text\n1,"a, ""b""\nc"\n2,d\n', 2, 0, 0, ""),
    "csv columns": ("a.csv", b"id,text\n1,a,b\n2,c\n", 1, 0, 1, "2: 3 columns, the header has 2"),
    "csv open quote": ("a.csv", b'id,text\n1,a\n2,"b\n3,c\n', 1, 0, 1, "3: not valid csv"),
    "csv bad byte": ("a.csv", b"id,text\n1,\xff\n2,b\n", 1, 0, 1, "2: bad UTF-8"),
    "csv empty": ("a.csv", b"id,text\n1,\n\n2,b\n", 1, 2, 0, ""),
    "tsv": ("a.tsv", b"\xef\xbb\xbfid\ttext\n1\ta, b\n", 1, 0, 0, ""),
    "txt bad byte": ("a.txt", b"a\n\xff\xfe\nb\n", 2, 0, 1, "2: bad UTF-8 at byte 1"),
    "txt NUL": ("a.txt", b"a\nb\0\n", 1, 0, 1, "2: the text has a NUL"),
}


def read(config):
    report = Report()
    documents = list(read_documents(config, find_files(config, report), report))
    return documents, report


@pytest.mark.parametrize("name", CLASSES)
def test_malformed(tmp_path, name):
    file, content, used, skipped, rejected, reason = CLASSES[name]
    path = tmp_path / file
    path.write_bytes(content)
    documents, report = read(DataConfig(path=[str(path)]))
    assert (report.used, report.num_skipped, report.num_rejected) == (used, skipped, rejected)
    assert report.records == used + skipped + rejected
    assert report.documents == len(documents)
    if rejected:
        assert any(f"{path}:" in line and reason in line for line in report.reasons)
        with pytest.raises(UserError) as error:
            read(DataConfig(path=[str(path)], on_bad="error"))
        assert str(error.value) == report.reasons[0]


def test_what_a_text_is(tmp_path):
    """The characters of the file, whatever the format that carries them."""
    text = 'é 春眠 😀\tquote " comma, \\ back\u2028line'
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}), "utf-8")
    (tmp_path / "b.json").write_text(json.dumps([{"text": text}], ensure_ascii=False), "utf-8")
    quoted = text.replace('"', '""')
    (tmp_path / "c.csv").write_text(f'text\r\n"{quoted}"\r\n', "utf-8")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    documents, _ = read(DataConfig(path=[str(tmp_path)]))
    assert [document.text for document in documents] == [text] * 4
    assert {document.num_bytes for document in documents} == {len(text.encode())}


def test_fields_are_joined(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n', "utf-8")
    documents, _ = read(DataConfig(path=[str(path)], text_fields=["question", "answer"]))
    assert [document.text for document in documents] == ["q\na"]


def test_too_long_a_line_is_not_held(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b'{"text": "' + b"x" * 5000 + b'"}\n' + GOOD)
    documents, report = read(DataConfig(path=[str(path)], max_record_bytes=1000))
    assert [document.line for document in documents] == [1, 3]
    assert report.rejected == {"too long": 1}
    assert report.reasons == [f"{path}:2: longer than 1,000 bytes"]


class TestTextFiles:
    def documents(self, tmp_path, content, **options):
        path = tmp_path / "a.txt"
        path.write_bytes(content.encode())
        documents, report = read(DataConfig(path=[str(path)], **options))
        lines = content.count("\n") + (not content.endswith("\n"))
        assert report.records == lines
        return [(document.line, document.text) for document in documents]

    def test_blank_lines(self, tmp_path):
        found = self.documents(tmp_path, "\n\na\nb\n\n \nc\n", txt_documents="blank-line")
        assert found == [(3, "a\nb"), (7, "c")]

    def test_line(self, tmp_path):
        found = self.documents(tmp_path, "a\n\n b\nc", txt_documents="line")
        assert found == [(1, "a"), (3, " b"), (4, "c")]

    def test_file_keeps_its_blank_lines(self, tmp_path):
        assert self.documents(tmp_path, "a\n\n\nb\n", txt_documents="file") == [(1, "a\n\n\nb")]

    def test_separator(self, tmp_path):
        content = "a\n\nb\n<|endoftext|>\n\n<|endoftext|>\nc\n"
        found = self.documents(tmp_path, content, txt_separator="<|endoftext|>")
        assert found == [(1, "a\n\nb"), (7, "c")]

    @pytest.mark.parametrize("blanks", [1, 2, 3])
    def test_auto_takes_the_widest_separator_with_a_hundred_documents(self, tmp_path, blanks):
        inner = "head\n" + "\n" * (blanks - 1) + "body\n"
        found = self.documents(tmp_path, ("\n" * blanks).join([inner] * 120))
        assert len(found) == 120
        assert found[0][1] == inner.rstrip("\n")

    def test_auto_leaves_a_small_text_whole(self, tmp_path):
        assert len(self.documents(tmp_path, "one\n\ntwo\n\nthree\n")) == 1

    def test_auto_cuts_a_long_text_at_line_ends(self, tmp_path):
        content = "".join(f"line {number} of a long text\n" for number in range(9000))
        found = self.documents(tmp_path, content)
        assert "\n".join(text for _, text in found) + "\n" == content
        assert 3 <= len(found) <= 4


class TestFiles:
    def test_missing_names_the_nearest(self, tmp_path):
        (tmp_path / "books.txt").write_text("x")
        with pytest.raises(UserError, match=r"no such file.*did you mean .*books\.txt"):
            read(DataConfig(path=[str(tmp_path / "boks.txt")]))

    def test_empty_file(self, tmp_path):
        (tmp_path / "a.txt").touch()
        with pytest.raises(UserError, match=r"a\.txt is empty"):
            read(DataConfig(path=[str(tmp_path / "a.txt")]))

    def test_unknown_ending(self, tmp_path):
        (tmp_path / "a.zip").write_text("x")
        with pytest.raises(UserError, match=r"set data\.format"):
            read(DataConfig(path=[str(tmp_path / "a.zip")]))

    def test_folder_without_text(self, tmp_path):
        with pytest.raises(UserError, match="file in"):
            read(DataConfig(path=[str(tmp_path)]))

    def test_no_path(self):
        with pytest.raises(UserError, match=r"data\.path is empty"):
            read(DataConfig())

    def test_unreadable(self, tmp_path):
        """A link to itself fails like a file without permission does, for root as well."""
        (tmp_path / "a.txt").symlink_to(tmp_path / "a.txt")
        with pytest.raises(UserError, match=r"a\.txt"):
            read(DataConfig(path=[str(tmp_path / "a.txt")]))

    def test_utf16(self, tmp_path):
        (tmp_path / "a.txt").write_text("text", "utf-16")
        with pytest.raises(UserError, match="UTF-16"):
            read(DataConfig(path=[str(tmp_path)]))

    def test_nothing_usable_is_an_error(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
        with pytest.raises(UserError, match=r"1 records reject.*a\.jsonl:1: no field.*set data"):
            read(DataConfig(path=[str(tmp_path)]))

    def test_missing_column(self, tmp_path):
        (tmp_path / "a.csv").write_text("id,body\n1,x\n")
        with pytest.raises(UserError, match=r"no column 'text' \(it has id, body\)"):
            read(DataConfig(path=[str(tmp_path)]))

    def test_folders_globs_and_order(self, tmp_path):
        for name in ("b/2.txt", "b/1.txt", "a.txt", ".hidden/x.txt", "note.pdf"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        documents, report = read(DataConfig(path=[str(tmp_path)]))
        assert [document.text for document in documents] == ["a.txt", "b/1.txt", "b/2.txt"]
        assert any("1 other files" in note for note in report.notes)
        paths = [str(tmp_path / "b" / "*.txt"), str(tmp_path / "b" / "1.txt")]
        documents, report = read(DataConfig(path=paths))
        assert [document.text for document in documents] == ["b/1.txt", "b/2.txt"]
        assert any("read once" in note for note in report.notes)


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": [1, 2, 3, 4], "text": ["a", None, " ", "春"]})
    pq.write_table(table, tmp_path / "a.parquet")
    documents, report = read(DataConfig(path=[str(tmp_path)]))
    assert [(document.line, document.text) for document in documents] == [(1, "a"), (4, "春")]
    assert (report.skipped, report.rejected) == ({"empty text": 1}, {"wrong type": 1})
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(UserError, match="not a readable parquet"):
        read(DataConfig(path=[str(tmp_path)]))


def test_deduplicate(tmp_path):
    (tmp_path / "a.txt").write_text("x\ny\n\nz\n\nx\ny\n")
    config = DataConfig(path=[str(tmp_path)], txt_documents="blank-line", deduplicate=True)
    documents, report = read(config)
    assert [document.text for document in documents] == ["x\ny", "z"]
    assert report.skipped == {"blank line": 2, "duplicate": 2}


def expected(line: bytes) -> str:
    """used, skipped or rejected, by a reading of the rules that shares no code with the reader."""
    try:
        text = line.removesuffix(b"\r").decode("utf-8")
        if not text.strip():
            return "skipped"
        assert "\0" not in text
        assert not any(word in text for word in ("NaN", "Infinity"))
        value = json.loads(text)["text"]
        value.encode("utf-8")
        assert isinstance(value, str)
        assert "\0" not in value
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        return "rejected"
    return "used" if value.strip() else "skipped"


def test_five_thousand_damaged_lines(tmp_path):
    """Random edits of good lines, each judged by an independent reading of the rules."""
    draw = random.Random(0)
    lines = []
    for number in range(5000):
        line = bytearray(json.dumps({"id": number, "text": "a é 春 \n \\ " * draw.randint(0, 3)},
                                    ensure_ascii=draw.random() < 0.5).encode())
        for _ in range(draw.choice([0, 0, 1, 1, 3])):
            at = draw.randrange(len(line))
            edit = draw.choice(["set", "cut", "drop", "null"])
            if edit == "set":
                line[at] = draw.choice([0, 0x22, 0x5C, 0x7B, 0xFF, 0xC3, 0x20, 0x0D, 0x65])
            elif edit == "cut":
                del line[max(at, 1):]
            elif edit == "drop":
                del line[at]
            else:
                line[at:at + 1] = b"null"
            line = line or bytearray(b"x")
        lines.append(bytes(line))
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    documents, report = read(DataConfig(path=[str(path)]))
    verdicts = [expected(line) for line in lines]
    assert report.records == len(lines)
    assert report.used == verdicts.count("used")
    assert report.num_skipped == verdicts.count("skipped")
    assert report.num_rejected == verdicts.count("rejected")
    assert min(verdicts.count(kind) for kind in ("used", "skipped", "rejected")) > 50
    lines_used = [number for number, verdict in enumerate(verdicts, 1) if verdict == "used"]
    assert [document.line for document in documents] == lines_used


PIECES = st.sampled_from([b'{"text": "x"}', b"\n", b"\r\n", b'"', b",", b"[", b"]", b"{", b"\\u",
                          b"\0", b"\xff", b"text", b"\xef\xbb\xbf", b" ", "春".encode(), b"NaN",
                          b"1e999"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=st.lists(PIECES | st.binary(max_size=6), min_size=1, max_size=30),
       ending=st.sampled_from(["txt", "jsonl", "json", "csv"]))
def test_any_bytes_are_accounted_for(tmp_path_factory, parts, ending):
    """Whatever a file holds: valid texts and an account that adds up, or a one-line UserError."""
    path = tmp_path_factory.mktemp("fuzz") / f"a.{ending}"
    path.write_bytes((b"text\nfirst\n" if ending == "csv" else b"") + b"".join(parts))
    config = DataConfig(path=[str(path)])
    try:
        report = Report()
        documents = list(read_documents(config, find_files(config, report), report))
    except UserError as raised:
        message = str(raised)
    else:
        message = ""
    assert "\n" not in message
    if message:
        assert str(path) in message or "no usable document" in message
        return
    assert report.records == report.used + report.num_skipped + report.num_rejected
    assert sum(len(document.text.encode("utf-8")) for document in documents) == report.text_bytes
    if ending in ("txt", "jsonl"):
        content = path.read_bytes()
        assert report.records == content.count(b"\n") + (not content.endswith(b"\n"))
