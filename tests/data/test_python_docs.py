"""The prose of the running Python: a few megabytes, the same each time, nothing imported for it."""

import ast
import inspect
import sys

import pytest

from fastllm.config import UserError
from fastllm.data import python_docs
from fastllm.data.accounting import Report
from fastllm.data.sources import DataConfig, find_files, read_documents


@pytest.fixture(scope="module")
def found():
    config, report, before = DataConfig(format="python-docs"), Report(), set(sys.modules)
    documents = list(read_documents(config, find_files(config, report), report))
    return documents, report, set(sys.modules) - before


def test_size_and_account(found):
    documents, report, _ = found
    assert report.text_bytes > 1_500_000
    assert report.documents == len(documents) > 1000
    assert report.records == report.used + report.num_skipped
    assert report.skipped["duplicate"] > 0


def test_nothing_is_imported(found):
    _, _, imported = found
    assert not {"turtle", "tkinter", "idlelib", "pydoc_data.topics", "antigravity"} & imported


def test_holds_topics_and_docstrings(found):
    import argparse
    import textwrap
    from pydoc_data.topics import topics

    documents, _, _ = found
    text = "\n".join(document.text for document in documents)
    for name in ("comparisons", "lambda", "try"):
        assert inspect.cleandoc(topics[name]) in text
    assert inspect.getdoc(textwrap.dedent) in text
    assert "class argparse.ArgumentParser(" in text
    assert inspect.getdoc(argparse.ArgumentParser) in text


def test_no_docstring_twice_and_order_is_fixed(found):
    documents, _, _ = found
    texts = [document.text for document in documents]
    assert len(set(texts)) == len(texts)
    names = [name for _, name in python_docs.source_files()]
    assert names[0] == python_docs.TOPICS
    assert names[1:] == sorted(names[1:], key=lambda name: name.split("/"))
    assert not any("test" in name.split("/") or "site-packages" in name for name in names)


def test_a_module(tmp_path):
    path = tmp_path / "m.py"
    path.write_text('''"""Module."""
if True:
    def f(a, *, b=1):
        """Does f.

        More:
            indented.
        """
        def inner():
            """Unseen."""
class C(Base):
    """Class."""
    def g(self): "Does g."
    class D:
        "Inner."
    def h(self): "Does g."
''')
    records = list(python_docs.read_module(path, "pkg/m.py", set()))
    texts = [record.text for record in records if record.text]
    assert texts == [
        "module pkg.m\n\nModule.\n\n\npkg.m.f(a, *, b=1)\n\nDoes f.\n\nMore:\n    indented.",
        "class pkg.m.C(Base)\n\nClass.\n\n\npkg.m.C.g(self)\n\nDoes g.\n\n\n"
        "class pkg.m.C.D\n\nInner.",
    ]
    assert [record.records for record in records if record.text] == [2, 3]
    assert [record.skipped for record in records if not record.text] == ["duplicate"]
    ast.parse(path.read_text())


def test_broken_python_is_rejected(tmp_path):
    (tmp_path / "m.py").write_text("def (:")
    [record] = python_docs.read_module(tmp_path / "m.py", "m.py", set())
    assert record.rejected == "not Python"


def test_a_python_without_its_library(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"carries no pydoc_data/topics\.py"):
        python_docs.source_files()


def test_takes_no_path():
    with pytest.raises(UserError, match=r"data\.path must be empty"):
        find_files(DataConfig(format="python-docs", path=["x"]), Report())
