"""README.md and the pages of docs/ with tables say what the result files say."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("bench_readme", ROOT / "bench" / "readme.py")
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)
by_page = pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)


@by_page
def test_every_table_comes_from_its_result_file(page):
    text = page.read_text(encoding="utf-8")
    assert readme.SECTION.search(text), f"{page.name} has no generated table"
    assert readme.render(text) == text


@by_page
def test_no_measured_figure_is_typed_by_hand(page):
    """Outside the generated tables no speed, time or ratio is stated."""
    text = readme.SECTION.sub("", page.read_text(encoding="utf-8"))
    assert not re.findall(r"\d+(?:\.\d+)?\s?(?:x faster|tokens/s|TFLOP|GFLOP|GB/s|ms\b)", text)


@by_page
def test_a_changed_figure_is_noticed(page):
    text = page.read_text(encoding="utf-8")
    for section in readme.SECTION.finditer(text):
        changed = text.replace(section[0], re.sub(r"\d(?=[^\n]*\|\n)", "7", section[0]))
        if "|" in section[0]:
            assert readme.render(changed) == text != changed
