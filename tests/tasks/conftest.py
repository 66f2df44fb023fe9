"""A tokenizer of single bytes and small models, made once for all tests of tasks."""

import json

import pytest
from task_models import make_model

from fastllm.data.tokenizer import TokenizerConfig, train_bpe


@pytest.fixture(scope="session")
def tokenizer():
    text = "Question: what is one and two? Answer: three, four 12 18 the a of\n\n"
    return train_bpe([text] * 4, TokenizerConfig(vocab_size=300))


@pytest.fixture(scope="session")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def write(tmp_path):
    """write(name, rows): a jsonl file of rows; a row that is a text is written as it is."""
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                                for row in rows), encoding="utf-8")
        return str(path)
    return write
