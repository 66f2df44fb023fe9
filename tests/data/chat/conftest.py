"""Small tokenizers that know the control tokens of the templates."""

import pytest

from fastllm.data.chat import ChatConfig, ChatEncoder
from fastllm.data.tokenizer import TokenizerConfig, train_bpe

SPECIAL = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>",
           "<end_of_turn>"]


@pytest.fixture(scope="session")
def tokenizer():
    words = "user assistant system model hello yes no what think\n"
    words += words.replace(" ", "\n")
    return train_bpe([words * 20] * 5, TokenizerConfig(vocab_size=420, special_tokens=SPECIAL))


@pytest.fixture
def encoder(tokenizer, tmp_path):
    """A function: an encoder under a template's text (None: the tokenizer's own) and settings."""
    def make(template=None, **settings):
        if template is not None:
            path = tmp_path / "chat.jinja"
            path.write_text(template, encoding="utf-8")
            settings["template"] = str(path)
        return ChatEncoder(tokenizer, ChatConfig(**settings))
    return make
