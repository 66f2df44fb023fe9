"""A hostile template reads nothing, and ends soon and in little memory."""

import time
import tracemalloc

import pytest

from fastllm.config import UserError
from fastllm.data.chat import BadRow
from fastllm.data.chat.template import ChatTemplate

from .templates import QWEN3

BIG = "{% set a = 'a' * 1000000 %}"
GROW = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}"


def grow(start, following, use):
    return GROW.replace("START", start).replace("NEXT", following) + use


READS = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "by subscript": "{{ ''['__class__']['__mro__'] }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "map": "{{ ['']|map(attribute='__class__')|first|tojson }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "namespace's own": "{% set ns = namespace(__class__=1) %}",
    "function": "{{ raise_exception.__globals__['json'] }}",
    "dict": "{{ dict.__call__.__globals__ }}",
    "self": "{{ self.__init__.__globals__ }}",
    "macro": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "from": "{% from '/etc/passwd' import x %}",
    "extends": "{% extends '/etc/passwd' %}",
    "block": "{% block a %}{% endblock %}",
    "change a list": "{{ messages.append(1) }}",
    "change a dict": "{{ messages[0].update({'role': 'x'}) }}",
    "a mark": "{{ '\\ufdd1' }}",
    "a written mark": "\ufdd1",
}
COSTS = {
    "loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "loops that pass over": "{% for a in range(99999) if 0 %}{% endfor %}" * 300,
    "calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
             "{{ f(50) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "literal output": "{% macro m() %}{% for i in range(99999) %}" + "x" * 99999
                      + "{% endfor %}{% endmacro %}{{ m()|length }}",
    "a range": "{{ range(10 ** 15)|list }}",
    "times": "{{ 'a' * 10 ** 12 }}",
    "times a list": "{{ ([0] * 100000) * 1000000 }}",
    "doubling": grow("'aaaaaaaa'", "ns.x + ns.x", "{{ ns.x }}"),
    "joining": grow("'aaaaaaaa'", "ns.x ~ ns.x", "{{ ns.x }}"),
    "numbers": grow("7 ** 100", "ns.x * ns.x", "{{ ns.x }}"),
    "power": "{{ 9 ** (9 ** 9) }}",
    "laughs": grow("['lol']", "[ns.x, ns.x]", "{{ ns.x }}"),
    "laughs in JSON": grow("['lol']", "{'a': ns.x, 'b': ns.x}", "{{ ns.x|tojson }}"),
    "hash": grow("('lol',)", "(ns.x, ns.x)", "{{ {ns.x: 1} }}"),
    "replace": BIG + "{{ a.replace('a', a) }}",
    "replace filter": BIG + "{{ a|replace('', a) }}",
    "join": BIG + "{{ a.join(a) }}",
    "join filter": BIG + "{{ range(99999)|join(a) }}",
    "join of a generator": BIG + "{{ ([none] * 99999)|map('default', a, true)|join }}",
    "list of a generator": BIG + "{{ (range(99999)|map('replace', '0', a)|list)|length }}",
    "center": "{{ 'a'|center(10 ** 10) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent with a name": "{{ '%((x)y)9999999999d' % {'(x)y': 1} }}",
    "percent with a star": "{{ '%*d'|format(999999999, 1) }}",
    "format a width": "{{ '{:{}}'.format(1, 999999999) }}",
    "format much": "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "indent": "{{ 'a\nb'|indent(9999999999) }}",
    "tojson": "{{ [[[1]]]|tojson(indent=999999999) }}",
    "round": "{{ 1.5|round(999999999, 'floor') }}",
    "sum": "{{ ([[1]] * 9999)|sum(start=[])|length }}",
    "batch": "{{ [1]|batch(999999999, 1)|list }}",
    "bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "strftime": "{{ strftime_now('%9999999d') }}",
    "slices": BIG + "{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}",
    "search": BIG + "{% for i in range(99999) %}{% if a ~ 'b' in a %}{% endif %}{% endfor %}",
    "split": BIG + "{% for i in range(99999) %}{% set b = a.split('a') %}{% endfor %}",
    "sort": BIG + "{{ ([a[2:], a[1:], a] * 999)|sort|length }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "a long sum": "{{ " + " + ".join(["1"] * 20000) + " }}",
    "a long chain": "{{ range(99999)" + "|map('string')" * 5000 + "|list|length }}",
    "too long": "x" * 300_000,
    "not a template": "{% if %}",
    "unclosed": "{{ messages",
}


@pytest.mark.parametrize("source", READS.values(), ids=READS.keys())
def test_nothing_is_read(source):
    """Refused, or rendered as nothing (an unknown name is empty text in jinja)."""
    message = {"role": "user", "content": "hello"}
    try:
        said = ChatTemplate(source, {}).render([message])
    except (UserError, BadRow) as error:
        said = str(error).removeprefix("the chat template, line 1: ").replace("unsafe", "")
    # A reason may name a type; it holds no list of classes, no file and no variables.
    assert "\n" not in said and len(said) < 120 and "root:" not in said and "{" not in said
    assert message == {"role": "user", "content": "hello"}


@pytest.mark.parametrize("source", COSTS.values(), ids=COSTS.keys())
def test_costs_are_bounded(source):
    before = time.thread_time()
    with pytest.raises((UserError, BadRow), match="the chat template") as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "hello"}])
    assert time.thread_time() - before < 4
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["output", "literal output", "doubling", "join filter", "split",
                                  "tojson"])
def test_memory_is_bounded(name):
    tracemalloc.start()
    try:
        with pytest.raises((UserError, BadRow)):
            ChatTemplate(COSTS[name], {}).render([{"role": "user", "content": "hello"}])
        assert tracemalloc.get_traced_memory()[1] < 500e6
    finally:
        tracemalloc.stop()


def test_the_line_is_named():
    source = "{{ bos_token }}\n\n{{ messages[0].content + 1 }}\n"
    with pytest.raises(BadRow, match="the chat template, line 3: TypeError"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "hello"}])
    with pytest.raises(UserError, match="the chat template, line 2: "):
        ChatTemplate("\n{% nonsense %}", {})
    with pytest.raises(BadRow, match="line 1: no such luck") as caught:
        ChatTemplate("{{ raise_exception('no such\nluck') }}", {}).render([])
    assert caught.value.kind == "template refuses"


def test_a_long_conversation_is_no_bomb():
    """The budget grows with what is rendered."""
    messages = [{"role": role, "content": "word " * 400} for role in ("user", "assistant")] * 1500
    assert len(ChatTemplate(QWEN3, {}).render(messages)) > 6_000_000
