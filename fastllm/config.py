"""Strict configuration: YAML file + dotted overrides -> nested dataclasses, or one clear line.

Every module declares its own `XConfig` dataclass beside its code; `fastllm.run.RunConfig` composes
them. This file knows none of them. A layer (a YAML file, a preset, the command line) is a nested
dict; later layers win. Unknown keys, wrong types and impossible values raise `UserError`, naming
the key, the value and the nearest right one.
"""

import dataclasses
import difflib
import keyword
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

T = TypeVar("T")
NONE_WORDS = {"none", "null", "~"}


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do (exit code 2)."""


class RunError(Exception):
    """A run that failed through no fault of its input: one line, exit code 1."""


def environment(name: str, default: str | None = None) -> str | None:
    """The environment variable `name`: with dist/mesh, the only place that reads os.environ."""
    return os.environ.get(name, default)


def environment_with(changes: dict[str, str]) -> dict[str, str]:
    """The whole environment with some variables changed, for a process to be started."""
    return {**os.environ, **changes}


def cache_folder() -> Path:
    """Where what a machine need find out only once is kept: fastllm in $XDG_CACHE_HOME, which must
    be absolute, else in ~/.cache. Raises RuntimeError where a user has no home."""
    given = Path(environment("XDG_CACHE_HOME") or "")
    return (given if given.is_absolute() else Path("~/.cache").expanduser()) / "fastllm"


def from_yaml(path: str | Path) -> dict[str, Any]:
    """The nested dict in a YAML file. Raises UserError naming the file and the line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {_reason(error)}") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(data).__name__}")
    return normalise(data)


def from_arguments(arguments: list[str]) -> dict[str, Any]:
    """`['--train.lr', '1e-3', '--data.path', 'a', 'b', '--train.compile']` as a nested dict.

    A flag takes every value up to the next flag: none means true, several make a list. Also
    `--key=value`. Raises UserError for a value without a flag or a key given twice.
    """
    layer: dict[str, Any] = {}
    i = 0
    while i < len(arguments):
        flag = arguments[i]
        if not flag.startswith("--") or len(flag) < 3:
            raise UserError(f"unexpected argument '{flag}': options are written "
                            "--section.key value")
        key, equals, value = flag[2:].partition("=")
        values = [value] if equals else []
        i += 1
        while not equals and i < len(arguments) and not arguments[i].startswith("--"):
            values.append(arguments[i])
            i += 1
        path = [_name(part) for part in key.split(".")]
        node = layer
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(f"--{key}: '{part}' was given a value and a section at once")
        if path[-1] in node:
            raise UserError(f"--{key} is given twice")
        node[path[-1]] = True if not values else values[0] if len(values) == 1 else values
    return layer


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts into one, later layers winning key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key] = merge(merged[key], value)
            else:
                merged[key] = value
    return merged


def build(cls: type[T], layer: dict[str, Any], *, joined: bool = True) -> T:
    """An instance of the dataclass `cls` from a nested dict, every key and value checked.

    joined: check also rules that join several keys; else a key may be missing yet.

    Raises UserError in one line that names the first offending key, its value and the mend.
    A `validate()` method of `cls` runs last, for rules that join several keys.
    """
    shaped = _shape(cls, layer, ())
    try:
        config = pydantic.TypeAdapter(cls).validate_python(shaped)
    except pydantic.ValidationError as error:
        raise UserError(_first_line(cls, error)) from None
    for value in [*vars(config).values(), config] if joined else []:
        validate = getattr(value, "validate", None)
        if dataclasses.is_dataclass(value) and callable(validate):
            try:
                validate()
            except ValueError as error:
                raise UserError(str(error)) from None
    return config


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts and lists, ready for YAML or JSON."""
    return _plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """What is in force, as YAML that `from_yaml` + `build` read back to an equal config."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a config dataclass, sections included."""
    found = []
    for name, kind in _fields(cls).items():
        found.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            found += keys(typing.cast(type, kind), f"{prefix}{name}.")
    return found


def flag(key: str) -> str:
    """`train.batch_size` as people type it: `train.batch-size`."""
    return key.rstrip("_").replace("_", "-")


def _name(key: str) -> str:
    """`batch-size` as the field's name: `batch_size`; a word of Python's, such as from, has an
    underscore after it."""
    name = str(key).replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


def nearest(word: str, choices: list[str]) -> str:
    """' (did you mean X?)' for the closest choice, or the empty string."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def normalise(node: Any) -> Any:
    """Keys with underscores all the way down: YAML may write batch-size or batch_size."""
    if isinstance(node, dict):
        return {_name(key): normalise(value) for key, value in node.items()}
    return node


def _fields(cls: type) -> dict[str, Any]:
    """Field name -> type of a dataclass; Annotated and `X | None` wrappers of sections removed."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        options = [arg for arg in typing.get_args(kind) if dataclasses.is_dataclass(arg)]
        found[field.name] = options[0] if options else kind
    return found


def _shape(cls: type, layer: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The layer with unknown keys refused, and 'none' words and one-element lists put right."""
    fields = _fields(cls)
    shaped: dict[str, Any] = {}
    for key, value in normalise(layer).items():
        here = (*path, key)
        positive = key.removeprefix("no_")
        if key not in fields and fields.get(positive) is bool and value is True:
            shaped[positive] = False  # --model.no-qk-norm
            continue
        if key not in fields:
            dotted = flag(".".join(here))
            choices = [flag(".".join((*path, name))) for name in keys(cls)]
            raise UserError(f"unknown key {dotted}{nearest(dotted, choices)}")
        kind = fields[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise UserError(f"{flag('.'.join(here))} is a section: it takes keys, not "
                                f"'{value}'")
            section = typing.cast(type, kind)
            shaped[key] = {**_own_defaults(cls, key, section), **_shape(section, value, here)}
        else:
            shaped[key] = _value(kind, value)
    return shaped


def _own_defaults(cls: type, key: str, section: type) -> dict[str, Any]:
    """Where `cls` makes a section with other values than the section's own class does: those. They
    hold too where a layer sets only some of the section's keys."""
    spec = next(field for field in dataclasses.fields(cls) if field.name == key)
    if spec.default_factory in (section, dataclasses.MISSING):
        return {}
    made, usual = spec.default_factory(), section()  # type: ignore[misc]
    return {name: value for name, value in vars(made).items() if value != getattr(usual, name)}


def _value(kind: Any, value: Any) -> Any:
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union,
                                                                   types.UnionType) else (kind,)
    if isinstance(value, str) and value.lower() in NONE_WORDS and type(None) in options:
        return None
    takes_list = any(typing.get_origin(option) in (list, tuple) for option in options)
    if takes_list and isinstance(value, str | int | float) and not isinstance(value, bool):
        return [value]
    return value


def _first_line(cls: type, error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    # The location also holds the types of union members; only the names of fields are wanted.
    path, kind = [], cls
    for part in first["loc"]:
        if dataclasses.is_dataclass(kind) and part in _fields(kind):
            path.append(str(part))
            kind = _fields(kind)[str(part)]
    key = flag(".".join(path))
    value, message = first["input"], first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{key} is missing: give it a value"
    expected = first.get("ctx", {}).get("expected", "")
    hint = nearest(str(value), expected.replace("'", "").replace(" or ", ", ").split(", "))
    message = message[0].lower() + message[1:]
    return f"{key}: '{value}' is not possible: {message}{hint if expected else ''}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key.rstrip("_"): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
