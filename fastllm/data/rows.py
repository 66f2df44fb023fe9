"""What a row of conversations or preferences becomes: token sequences that know what is trained.

    chat         one sequence: a conversation
    preference   two: the prompt with the chosen answer, and with the rejected one
    judged       two: the prompt with its answer, and with the answer of the row before (KTO's
                 estimate of how far the model has moved is made on answers that do not belong; the
                 first row, which has none before it, takes its own)
"""

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastllm.data.sources import Encoded, Rejected, RowEncoder
from fastllm.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastllm.data.chat import ChatConfig, Tokens

Kind = Literal["text", "chat", "preference", "judged"]
SEQUENCES: dict[Kind, int] = {"text": 1, "chat": 1, "preference": 2, "judged": 2}
"""Of a document of each kind."""
FORMAT = 2
"""Raised where prepared rows would come out otherwise: 2 holds out by prompt."""


class Row(NamedTuple):
    """The sequences of a row, and in judged data whether the answer is wanted."""

    sequences: "tuple[Tokens, ...]"
    desirable: bool = False


class Rows:
    """How the rows of a source are read."""

    def __init__(self, kind: Kind, tokenizer: Tokenizer, config: "ChatConfig") -> None:
        from fastllm.data.chat import ChatEncoder

        self.kind, self.tokenizer = kind, tokenizer
        self.encoder = encoder = ChatEncoder(tokenizer, config)
        key = json.dumps([FORMAT, kind, encoder.fingerprint])
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()

    def reader(self) -> RowEncoder:
        """A function of a row, to be called in the rows' order."""
        from fastllm.data.chat import BadRow

        make = {"chat": self._chat, "preference": self._pair, "judged": self._judge()}[self.kind]

        def encode(row: dict[str, Any]) -> Encoded | Rejected:
            try:
                made = make(row)
            except BadRow as error:
                return Rejected(error.kind, error.reason)
            return Encoded(made, sum(tokens.text_bytes for tokens in made.sequences))

        return encode

    def _chat(self, row: dict[str, Any]) -> Row:
        return Row((self.encoder.chat(row),))

    def _pair(self, row: dict[str, Any]) -> Row:
        return Row(self.encoder.pair(row))

    def _judge(self) -> Callable[[dict[str, Any]], Row]:
        from fastllm.data.chat import BadRow

        before: list[Any] = []

        def judge(row: dict[str, Any]) -> Row:
            tokens, desirable = self.encoder.judged(row)
            answer = before.pop() if before else row["completion"]
            before.append(row["completion"])
            try:
                other, _ = self.encoder.judged({**row, "completion": answer})
            except BadRow:  # such as a string's answer after a prompt of messages
                other = tokens
            return Row((tokens, other), desirable)

        return judge
