"""The chat template in force: which one it is, and the text that it makes of messages.

Sources: the ChatML format of OpenAI; the way of Hermes and Qwen 2.5 to write tools and calls.
"""

from pathlib import Path
from typing import Any

import jinja2

from fastllm.config import UserError
from fastllm.data.chat.formats import BadRow
from fastllm.data.chat.sandbox import ITEM, Environment, Limit
from fastllm.data.tokenizer import Tokenizer

MAX_TEMPLATE = 256 << 10
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and ' }}
    {{- 'arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n' if message.content or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def template_source(asked: str | None, tokenizer: Tokenizer) -> str:
    """The jinja text in force; see ChatConfig.template. Raises UserError where there is none."""
    has_chatml = None not in (tokenizer.token_id(IM_START), tokenizer.token_id(IM_END))
    if asked == "chatml" and not has_chatml:
        raise UserError(f"chat.template is chatml, but the tokenizer has no tokens {IM_START} and "
                        f"{IM_END}; give a .jinja file that uses its own")
    if asked is None and tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if asked == "chatml" or (asked is None and has_chatml):
        return CHATML
    if asked is None:
        raise UserError("the tokenizer has no chat template; set chat.template to a .jinja file "
                        f"(or to chatml, with a tokenizer that has {IM_START} and {IM_END})")
    path = Path(asked).expanduser()
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"chat.template: {path} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"chat.template: cannot read {path} ({error.strerror}); give a .jinja "
                        "file, or chatml") from None


def _size(value: Any) -> int:
    """Characters of a value that was read from JSON, with the sandbox's price for each item."""
    if isinstance(value, dict):
        return ITEM + sum(_size(key) + _size(part) for key, part in value.items())
    if isinstance(value, list):
        return ITEM + sum(map(_size, value))
    return ITEM + (len(value) if isinstance(value, str) else 8)


class ChatTemplate:
    """A compiled template. `marks`: it says itself which text is the assistant's (generation).

    Raises UserError, with the template's line, for text that is not a template or wants more than
    the sandbox gives.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        if len(source) > MAX_TEMPLATE:
            raise UserError(f"the chat template has {len(source):,} characters; at most "
                            f"{MAX_TEMPLATE:,} are read")
        self._environment = Environment()
        self._variables = variables
        try:
            tree = self._environment.parse_guarded(source)
            self._template = self._environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template, line {error.lineno}: {error.message}") from None
        # Deep nesting breaks the compiler in several ways, and none of them is our user's concern.
        except Exception as error:
            raise UserError(f"the chat template does not compile: {_line(error)}") from None
        self.marks = tree.find(jinja2.nodes.ExtensionAttribute) is not None

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *,
               add_generation_prompt: bool = False) -> str:
        """The text of messages, with the sandbox's marks in it.

        Raises BadRow where the template refuses the messages, `kind` "template limit" where it
        asks for too much.
        """
        self._environment.spend(_size(messages) + _size(tools or []))
        try:
            context = self._template.new_context({
                **self._variables, "messages": messages, "tools": tools, "documents": None,
                "add_generation_prompt": add_generation_prompt})
            return "".join(self._template.root_render_func(context))
        except (Limit, MemoryError, RecursionError) as error:
            raise BadRow("template limit", self._where(error)) from None
        except jinja2.TemplateError as error:
            raise BadRow("template refuses", self._where(error)) from None
        # A template is a program: it can raise anything that Python can.
        except Exception as error:
            raise BadRow("template fails", self._where(error)) from None

    def _where(self, error: BaseException) -> str:
        """One line: the template's line where it stopped, and why."""
        line, trace = 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_globals is self._template.root_render_func.__globals__:
                line = self._template.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        return f"the chat template, line {line}: {_line(error)}"


def _line(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    said = " ".join(str(error).split())[:300]
    plain = isinstance(error, jinja2.TemplateError)
    return said if plain and said else f"{type(error).__name__} {said}".strip()
