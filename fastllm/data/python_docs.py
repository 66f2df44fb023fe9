"""The prose that every Python brings along: the language reference topics and the docstrings.

Read from the running interpreter's own files: `pydoc_data/topics.py` is a literal dictionary and
the library's docstrings are found with `ast`. Nothing is imported, nothing is downloaded, and the
same Python gives the same documents in the same order. About 7,000 docstrings, 2 to 3 MB of text.
"""

import ast
import inspect
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastllm.config import UserError
from fastllm.data.readers import Record, bad_text

# Test code has no prose, lib2to3 left the library in 3.13, site-packages is not the library, and
# encodings holds a hundred copies of one generated module.
SKIPPED = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__",
           "pydoc_data", "encodings"}
TOPICS = "pydoc_data/topics.py"
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Block = tuple[int, str, str]


def source_files() -> list[tuple[Path, str]]:
    """(path, path inside the library) of the topics and every library module, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    topics = root / TOPICS
    if not topics.is_file():
        raise UserError(f"this Python carries no {TOPICS} under {root}; "
                        "set data.path to text of your own")
    modules = [
        path for path in root.rglob("*.py")
        if not any(part in SKIPPED or part.startswith(("config-", "_sysconfigdata"))
                   for part in path.relative_to(root).parts)
        and path.stat().st_size
    ]
    modules.sort(key=lambda path: path.relative_to(root).parts)
    return [(path, path.relative_to(root).as_posix()) for path in [topics, *modules]]


def read_module(path: Path, name: str, seen: set[str]) -> Iterator[Record]:
    """A record for each topic; of a library module, one for its own docstring and its functions'
    and one for each class. A record counts its docstrings; those in `seen` are skipped, since an
    override often repeats its base's words.
    """
    try:
        with tokenize.open(path) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the library's own string literals
            tree = ast.parse(stream.read())
    except (SyntaxError, ValueError) as error:
        yield Record(1, rejected="not Python", reason=f"not valid Python: {error}")
        return
    if name == TOPICS:
        yield from _topics(tree)
        return
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    classes = [node for node in _definitions(tree) if isinstance(node, ast.ClassDef)]
    functions = [node for node in _definitions(tree) if not isinstance(node, ast.ClassDef)]
    yield from _document(_blocks(tree, f"module {module}", module, functions), seen)
    for node in classes:
        yield from _document(_class_blocks(node, f"{module}."), seen)


def _definitions(node: ast.AST) -> Iterator[Definition]:
    """Classes and functions of a body, under `if` and `try` too, not inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _definitions(child)


def _blocks(
    node: ast.Module | ast.ClassDef, heading: str, prefix: str, functions: Sequence[Definition]
) -> Iterator[Block]:
    """(line, heading, docstring) of a module or class and then of its functions."""
    if text := ast.get_docstring(node, clean=True):
        yield 1 if isinstance(node, ast.Module) else node.lineno, heading, text
    for function in functions:
        if text := ast.get_docstring(function, clean=True):
            arguments = ast.unparse(function.args)  # type: ignore[union-attr]
            yield function.lineno, f"{prefix}.{function.name}({arguments})", text


def _class_blocks(node: ast.ClassDef, outer: str) -> Iterator[Block]:
    name = f"{outer}{node.name}"
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    inner = list(_definitions(node))
    methods = [child for child in inner if not isinstance(child, ast.ClassDef)]
    yield from _blocks(node, f"class {name}({bases})" if bases else f"class {name}", name, methods)
    for child in inner:
        if isinstance(child, ast.ClassDef):
            yield from _class_blocks(child, f"{name}.")


def _document(blocks: Iterator[Block], seen: set[str]) -> Iterator[Record]:
    """The blocks as one text. What cannot be in a text, and what was seen before, is left out."""
    parts: list[str] = []
    first = 0
    for line, heading, text in blocks:
        if fault := bad_text(text):
            yield Record(line, rejected=fault[0], reason=fault[1])
        elif text in seen:
            yield Record(line, skipped="duplicate")
        else:
            seen.add(text)
            first = first or line
            parts.append(f"{heading}\n\n{text}")
    if parts:
        yield Record(first, "\n\n\n".join(parts), records=len(parts))


def _topics(tree: ast.Module) -> Iterator[Record]:
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for key, value in sorted(ast.literal_eval(node.value).items()):
                yield Record(node.lineno, f"{key}\n\n{inspect.cleandoc(value)}")
