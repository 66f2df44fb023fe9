"""Jinja for templates that strangers wrote: no files, no Python, and an end to every loop.

A chat template comes with a downloaded model, so it is treated as hostile. Jinja's own sandbox
keeps it from Python's internals; here it also gets no loader, a short list of filters and methods,
and a budget. Every loop, call, filter, comparison and piece of output is charged for the
characters that it reads or makes, before it makes them where they could be many, and no value may
be larger than a cap. Work and memory are thus bounded; a deadline in CPU seconds stands behind.

What is rendered is what transformers' `apply_chat_template` renders (same options, extensions and
globals), except that `strftime_now` is a fixed day: prepared data must not depend on the calendar.
"""

import datetime
import json
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from functools import update_wrapper
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

# Noncharacters: Unicode gives them no meaning and keeps them for use inside a program. Text that
# holds one is refused, so none of these can be forged.
OPEN, CLOSE = "\ufdd1", "\ufdd2"
"""Around what {% generation %} encloses."""
GUARD, CUT = "\ufdd0", "\ufdd4"
"""Inside a spelled control token of a message; see `encode`."""
NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")

TODAY = datetime.datetime(2024, 7, 26)
"""What `strftime_now` formats: the day that Llama 3's template takes where it knows none."""
MAX_VALUE, MAX_WORK, STEP, ITEM = 4 << 20, 64 << 20, 64, 16
"""Characters in one value, and read or made in one rendering (both grow with the conversation);
the price in characters of one step of a loop, and of one item of a list or dict."""
MAX_DEPTH, MAX_SECONDS, MAX_BITS = 60, 2.0, 4096


class Limit(jinja2.TemplateError):
    """A template that asks for more than a conversation can need."""


class Budget:
    """What one rendering may still spend."""

    def __init__(self, characters: int) -> None:
        self.cap = MAX_VALUE + 4 * characters
        self.left = MAX_WORK + 100 * characters
        self.seconds = MAX_SECONDS + characters / 1e6
        self.deadline = time.thread_time() + self.seconds
        self.charges = 0

    def charge(self, work: int) -> None:
        self.left -= work + 8
        self.charges += 1
        if self.left < 0:
            raise Limit("the template does too much work")
        # Asking for the time is a system call; what one charge can cost is small or large itself.
        if (self.charges % 64 == 0 or work > 100_000) and time.thread_time() > self.deadline:
            raise Limit(f"the template runs for more than {self.seconds:.1f} seconds")

    def fits(self, size: int) -> None:
        """Raises Limit where a value of `size` characters is about to be made."""
        if size > self.cap:
            raise Limit(f"the template makes a value of more than {self.cap:,} characters")


def _length(value: Any) -> int:
    """Items or characters at the top level, 1 for what has none."""
    return len(value) if isinstance(value, str | list | tuple | dict | range) else 1


class _Namespace(Namespace):
    """transformers' `namespace`: no underscores, and a repr that does not walk what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` may be the name of an attribute too.
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


class _Dict:
    """`dict(...)` without the class dict, whose attributes are Python's internals."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _raise_exception(message: Any = "") -> None:
    raise jinja2.TemplateError(str(message)[:300])


def _strftime_now(form: str) -> str:
    # The width of a field in a format can be a thousand million.
    if len(form) > 64 or re.search(r"\d", form):
        raise Limit("strftime_now takes a short format without widths")
    return TODAY.strftime(form)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: leaves OPEN and CLOSE around what it encloses."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own way to say it)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers, so that a `set` inside stays inside there and here.
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


# What may be asked of a value. Everything else of a string, list or dict is Python's.
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset((
        "strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "partition", "rpartition",
        "startswith", "endswith", "lower", "upper", "title", "capitalize", "swapcase", "casefold",
        "find", "rfind", "index", "rindex", "count", "replace", "join", "isdigit", "isalpha",
        "isalnum", "isspace", "isupper", "islower", "isnumeric", "isdecimal", "isidentifier",
        "removeprefix", "removesuffix")),
    dict: frozenset(("get", "items", "keys", "values", "copy")),
    list: frozenset(("index", "count", "copy")),
    tuple: frozenset(("index", "count")),
    _Dict: frozenset(),
}
_FILTERS = frozenset(
    ("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
     "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower",
     "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select",
     "selectattr", "sort", "string", "sum", "title", "trim", "truncate", "unique", "upper",
     "urlencode", "wordcount"))
# Filters and tests that look at a value without walking it, those that walk its top level, and
# those of both that give back what they were given. Many templates ask `messages|length` in the
# loop over messages: measuring all of them each time would be quadratic.
_LOOK = frozenset((
    "length", "count", "first", "last", "default", "d", "odd", "even", "divisibleby", "defined",
    "undefined", "filter", "test", "none", "boolean", "false", "true", "integer", "float", "string",
    "mapping", "number", "sequence", "iterable", "callable", "sameas", "escaped"))
_TOP = frozenset(("list", "reverse", "items", "map", "select", "reject", "selectattr",
                  "rejectattr"))
_SAME = _LOOK | {"reverse"}


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
            separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as transformers writes it: no HTML escapes."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)
    # The guards must stay single characters, or they would end up in the text.
    return text.replace(r"\ufdd0", GUARD).replace(r"\ufdd4", CUT) if ensure_ascii else text


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, form: str) -> Any:
        _check_widths(form)
        return super().format_field(value, form)


def _check_widths(form: str) -> None:
    if re.search(r"\d{4}", form):
        raise Limit("the template formats with a width above 999")


class _Guards(NodeTransformer):
    """Puts the charges into a parsed template: jinja calls no hook of ours in these places."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        # Before the visit: it makes new nodes of what is inside.
        weight = _literals(node.body) if isinstance(node, _BODIES) else 0
        node = super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For):
            node.iter = _call("_each", node.iter)
        if isinstance(node, _BODIES):
            tick = nodes.ExprStmt(_call("_tick", nodes.Const(STEP + weight)))
            node.body = [tick.set_lineno(node.lineno), *node.body]
        elif isinstance(node, nodes.Compare):
            # Against a constant a list or dict is not walked to its depths.
            sides = [node.expr, *(operand.expr for operand in node.ops)]
            plain = len(sides) == 2 and any(isinstance(side, nodes.Const) for side in sides)
            node.expr = _call("_scan" if plain else "_read", node.expr)
            for operand in node.ops:
                operand.expr = _call("_scan" if plain else "_read", operand.expr)
        elif isinstance(node, nodes.Concat):
            node.nodes = [_call("_read", part) for part in node.nodes]
            return _call("_read", node)
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            node.node = _call("_scan", node.node)
        elif (isinstance(node, nodes.List | nodes.Dict)
              or (isinstance(node, nodes.Tuple) and node.ctx == "load")) and node.items:
            return _call("_read", node)
        elif isinstance(node, _REFUSED):
            raise jinja2.TemplateSyntaxError(
                f"{type(node).__name__.lower()} is not for chat templates", node.lineno)
        return node


_BODIES = (nodes.For, nodes.Macro, nodes.CallBlock)
_REFUSED = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block,
            nodes.ScopedEvalContextModifier)


def _call(name: str, value: Any) -> nodes.Filter:
    call = nodes.Filter(value, name, [], [], None, None)
    call.set_lineno(value.lineno or 1)
    return call


def _literals(body: Iterable[nodes.Node]) -> int:
    """Characters of plain text that one pass through `body` can write."""
    return sum(len(data.data) for node in body for data in [node, *node.find_all(nodes.Node)]
               if isinstance(data, nodes.TemplateData))


class Environment(ImmutableSandboxedEnvironment):
    """See the head of this file. `spend` sets the budget of what is rendered within it."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False,
                         finalize=pass_context(lambda _, value: self._read(value)),
                         extensions=[_Generation, jinja2.ext.loopcontrols], loader=None)
        self._budgets = threading.local()
        self.globals = {"range": self.globals["range"], "dict": _Dict(), "namespace": _Namespace,
                        "raise_exception": _raise_exception, "strftime_now": _strftime_now}
        filters: dict[str, Any] = self.filters
        self.filters = {name: self._charged(name, filters[name]) for name in _FILTERS}
        self.filters["tojson"] = self._charged("tojson", _tojson)
        tests: dict[str, Any] = self.tests
        self.tests = {name: self._charged(name, test) for name, test in tests.items()}
        self.filters |= {"_each": self._each, "_tick": self._tick, "_read": self._read,
                         "_scan": self._scan}

    def spend(self, characters: int) -> None:
        """A new budget, for a conversation of so many characters, in this thread."""
        self._budgets.now = Budget(characters)

    @property
    def _budget(self) -> Budget:
        return self._budgets.now

    def parse_guarded(self, source: str) -> nodes.Template:
        """The syntax tree with the charges in it. Raises jinja2.TemplateError."""
        tree = self.parse(source)
        for node in tree.find_all((nodes.Const, nodes.TemplateData)):
            text = node.value if isinstance(node, nodes.Const) else node.data
            if isinstance(text, str) and NONCHARACTERS.search(text):
                raise jinja2.TemplateSyntaxError("the template holds a noncharacter", node.lineno)
        return _Guards().visit(tree)

    # charges --------------------------------------------------------------------------------------

    def _tick(self, work: int) -> None:
        self._budget.charge(work)

    def _scan(self, value: Any) -> Any:
        self._budget.charge(_length(value))
        return value

    def _each(self, values: Any) -> Any:
        if hasattr(values, "__len__"):
            # Passing over an item that an `if` leaves out is work too, and no tick counts it.
            self._budget.charge(8 * len(values))
            return values
        return self._counted(values)

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._budget.charge(0)
            yield value

    def _read(self, value: Any) -> Any:
        self._budget.charge(self._measure(value))
        return value

    def _measure(self, value: Any) -> int:
        """Characters that the value would take written out, shared parts counted each time."""
        if isinstance(value, str):
            self._budget.fits(len(value))
            return len(value)
        return self._walk(value)[0]

    def _walk(self, value: Any) -> tuple[int, int, int]:
        """(characters, items, depth), written out; Limit where a cap is passed on the way."""
        size = items = deepest = 0
        stack: list[tuple[Any, int]] = [(value, 1)]
        while stack:
            value, depth = stack.pop()
            items += 1
            deepest = max(deepest, depth)
            if isinstance(value, str):
                size += len(value)
            elif isinstance(value, bool):
                size += 5
            elif isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise Limit("the template makes a number that is too large")
            elif isinstance(value, dict):
                stack += [(part, depth + 1) for pair in value.items() for part in pair]
            elif isinstance(value, list | tuple | KeysView | ValuesView | ItemsView):
                stack += [(inner, depth + 1) for inner in value]
            size += ITEM
            if depth > MAX_DEPTH:
                raise Limit(f"the template nests a value more than {MAX_DEPTH} deep")
            self._budget.fits(size + 8 * len(stack))
        return size, items, deepest

    # operators, calls, filters, tests -------------------------------------------------------------

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    self._budget.fits(max(self._measure(value), 1) * times)
            if isinstance(left, int) and isinstance(right, int):
                self._bits(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            self._check_percent(left, right)
        elif isinstance(left, str | list | tuple) and _length(right) + len(left) > MAX_VALUE:
            self._budget.fits(_length(right) + len(left))
        return self._read(super().call_binop(context, operator, left, right))

    def _bits(self, bits: int) -> None:
        if bits > MAX_BITS:
            raise Limit("the template makes a number that is too large")

    def _check_percent(self, form: str, values: Any) -> None:
        # The name in %(name)d may hold anything, so beside names any long number is refused.
        if re.search(r"%[^a-zA-Z%]*(\*|\d{4})", form) or "%(" in form:
            _check_widths("9999" if "%(" not in form or "*" in form else form)
        self._budget.fits(len(form) + form.count("%") * self._measure(values))

    def call(self, context: Any, obj: Any, /,  # type: ignore[override]
             *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        name = getattr(obj, "__name__", "")
        self._budget.charge(4 * STEP + (0 if owner is None else _length(owner)))
        if isinstance(owner, str) and name == "replace":
            self._before(name, (owner, *args), kwargs)
        elif isinstance(owner, str) and name == "join" and args:
            args = self._before(name, (args[0], owner), {})[:1]
        return self._read(super().call(context, obj, *args, **kwargs))

    def _before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Measures what a filter or a method of a string is about to make of its arguments."""
        # A generator would be used up by measuring it.
        args = tuple(list(self._counted(arg)) if name == "join" and isinstance(arg, Iterator)
                     else arg for arg in args)
        if name == "replace":
            text, old, new = (str(part) for part in (*args, "", "")[:3])
            self._budget.fits(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        elif name == "join":
            between = str(kwargs.get("d", (*args, "")[1]))
            self._budget.fits(self._measure(args[0]) + _length(args[0]) * len(between))
        elif name == "format":
            self._check_percent(str(args[0]), [*args[1:], *kwargs.values()])
        elif name == "indent":
            width = args[1] if len(args) > 1 else kwargs.get("width", 4)
            width = len(width) if isinstance(width, str) else width
            self._budget.fits(len(str(args[0])) + (str(args[0]).count("\n") + 1) * width)
        elif name == "round" and not -100 < (kwargs.get("precision", (*args, 0)[1])) < 100:
            raise Limit("the template rounds to more than 100 places")
        elif name == "sum" and not isinstance(kwargs.get("start", (*args, 0, 0)[2]), int | float):
            raise Limit("the template sums what is not numbers")
        elif name == "tojson":
            size, items, depth = self._walk(args[0])
            indent = kwargs.get("indent", (*args, None, None)[2]) or 0
            wide = indent if isinstance(indent, int) else len(indent)
            separators = kwargs.get("separators", (*args, None, None, None)[3]) or ()
            self._budget.fits(size + items * (wide * depth + sum(map(len, separators))))
        return args

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test whose arguments and result are measured."""
        passed = getattr(function, "jinja_pass_arg", None) is not None

        def charged(*args: Any, **kwargs: Any) -> Any:
            front, rest = (args[:1], args[1:]) if passed else ((), args)
            for value in () if name in _LOOK else (*rest, *kwargs.values()):
                (self._scan if name in _TOP else self._read)(value)
            self._budget.charge(0)
            rest = self._before(name, rest, kwargs)
            rest = tuple(self._counted(value) if isinstance(value, Iterator) else value
                         for value in rest)
            made = function(*front, *rest, **kwargs)
            return made if name in _SAME else self._read(made)

        return update_wrapper(charged, function)

    # attributes -----------------------------------------------------------------------------------

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        known = isinstance(obj, LoopContext | Macro | Namespace | Undefined)
        return known and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` by a formatter that measures; None for anything else."""
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or getattr(value, "__name__", "") != "format":
            return None

        def form(*args: Any, **kwargs: Any) -> str:
            each = self._measure([*args, *kwargs.values()])
            self._budget.fits(len(owner) + owner.count("{") * (each + 999))
            return _Formatter(self).vformat(owner, args, kwargs)

        return form
