"""bench/under_tool.py: what a process leaves when it ends, and that it does end."""

import sys
import time

import under_tool


def test_what_overruns_is_killed_with_all_that_it_started(monkeypatch):
    monkeypatch.setattr(under_tool, "GRACE", 0.5)
    script = "import subprocess; subprocess.run(['sleep', '60'])"
    words = [sys.executable, "-c", f"print('begun', flush=True); {script}"]
    lines, began = [], time.monotonic()
    assert under_tool.watch(words, {}, 1.0, lines.append) is None
    assert lines == ["begun\n"] and time.monotonic() - began < 30, "the pipe is closed"


def test_what_was_under_way_is_what_a_process_died_of(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import json, os, sys
for number in json.load(open(sys.argv[2]))["cases"]:
    print('@says {"begin": %d, "part": "forward"}' % number, flush=True)
    print("printed", flush=True)
    if number == 1:
        os._exit(7)
    print('@says {"of": %d, "more": true}' % number, flush=True)
print('@says {"end": true}', flush=True)
""")
    heard = under_tool.Heard()
    assert heard.follow(str(script), {"cases": [0, 1, 2]}, 60, tmp_path, [], {}) == 7
    assert not heard.ended
    assert heard.became == {0: {"more": True}, 1: {"failed": "forward: ended with exit code 7"}}
    assert heard.follow(str(script), {"cases": [2]}, 60, tmp_path, [], {}) == 0
    assert heard.ended and heard.begun == 3 and heard.became[2] == {"more": True}
    assert heard.last == ["printed"] * 3
