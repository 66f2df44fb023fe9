"""A small corpus and what is prepared from it, made once for all tests of data."""

import json
import random

import pytest

from fastllm.data import DataConfig, TokenizerConfig, prepare

WORDS = ["the", "a", "of", "time", "light", "stone", "river", "春", "眠", "不", "覺", "曉", "étude",
         "naïve", "😀", "42", "1789", "run,", "end.", "(x)", "---"]


def make_texts(count: int, seed: int = 0, longest: int = 120) -> list[str]:
    """Texts of very different lengths, a few far longer than any row of the tests."""
    draw = random.Random(seed)
    texts = []
    for number in range(count):
        size = draw.choice([1, 3, 8, 20, draw.randint(1, longest)])
        words = draw.choices(WORDS, k=size * (20 if number % 37 == 36 else 1))
        texts.append(f"{number} " + " ".join(words))
    return texts


def write_jsonl(path, texts):
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts():
    return make_texts(240)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts):
    """(DataConfig, TokenizerConfig) of the small corpus, with a cache of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    path = write_jsonl(folder / "small.jsonl", texts)
    data = DataConfig(path=[str(path)], cache_dir=str(folder / "cache"), holdout=0.1)
    return data, TokenizerConfig(vocab_size=320)


@pytest.fixture(scope="session")
def prepared(corpus):
    return prepare(*corpus)
