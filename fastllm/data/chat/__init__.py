"""Conversations and preferences to token ids with a flag a token: trained or not.

row -> `formats` (one form, checked) -> `template` (text, in `sandbox`) -> `spans` (whose text) ->
`encode` (ids and flags).
"""

from fastllm.data.chat.encode import ChatConfig, ChatEncoder, Tokens
from fastllm.data.chat.formats import BadRow

__all__ = ["BadRow", "ChatConfig", "ChatEncoder", "Tokens"]
