"""Byte-level BPE: trained here or read from any tokenizer.json. Every UTF-8 text round-trips.

Special tokens exist as ids only: text that spells `<|eos|>` is encoded as the characters it is, so
data cannot end a document or begin a turn. Source of the pre-tokenisation: the rule of GPT-4 and
Llama 3 (contractions, letters with one leading mark, up to three digits, punctuation, space).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pydantic

from fastllm.config import UserError
from fastllm.data.accounting import Report
from fastllm.data.sources import (
    DataConfig,
    Progress,
    find_files,
    held_out,
    read_documents,
)

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, "<|im_start|>", "<|im_end|>")

# What a tokenizer.json from elsewhere calls its special tokens, tried in this order when neither
# the config nor a tokenizer_config.json beside it says.
KNOWN = {
    "bos": (BOS, "<s>", "<|begin_of_text|>", "<bos>"),
    "eos": (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>"),
    "pad": (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>"),
}


@dataclass(kw_only=True)
class TokenizerConfig:
    """A tokenizer to train on the data, or the path of one that exists."""

    path: str | None = None
    """A tokenizer.json, or the folder that holds it; none: train one on the data."""
    model: Literal["bpe"] = "bpe"
    """The kind of tokenizer to train: byte-level BPE."""
    vocab_size: Annotated[int, pydantic.Field(gt=0)] = 8192
    """Tokens to train, the special ones included. A small text may support fewer: that is said."""
    special_tokens: list[str] = field(default_factory=list)
    """More special tokens, after <|bos|> <|eos|> <|pad|> <|im_start|> <|im_end|> (ids 0 to 4)."""
    max_digits: Annotated[int, pydantic.Field(ge=1, le=3)] = 3
    """Longest run of digits in one token: 3 as in Llama 3, 1 as in Qwen."""
    max_token_bytes: Annotated[int, pydantic.Field(ge=2)] = 32
    """Longest token to learn, in bytes: keeps rulers such as ====== from filling the vocabulary."""
    train_bytes: Annotated[int, pydantic.Field(gt=0)] = 256 << 20
    """Train on about this much text; of more, on a sample of documents chosen by their hash."""
    bos_token: str | None = None
    """The token that begins a document, where tokenizer.json has no known name for it."""
    eos_token: str | None = None
    """The token that ends a document, likewise."""
    pad_token: str | None = None
    """The token that pads, likewise. It must not be the one that ends a document."""


class Control(NamedTuple):
    """A token that only a chat template may write; `special`: `encode` never makes it of text.

    lstrip and rstrip: the token takes the whitespace before or after it with it.
    """

    id: int
    special: bool
    lstrip: bool
    rstrip: bool


class Tokenizer:
    """A thin face of a `tokenizers.Tokenizer`.

    bos_id is None where the tokenizer has no such token; eos_id and pad_id always exist and differ.
    `notes` are things about it that the user should read. `chat_template` is the jinja text that
    came with it; it is no part of the fingerprint, since text is encoded the same without.
    """

    def __init__(self, inner: Any, *, bos: str | None, eos: str, pad: str,
                 chat_template: str | None = None) -> None:
        self._inner = inner
        # Not kept in tokenizer.json: it belongs to how we read data, not to the vocabulary.
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self.bos_token, self.eos_token, self.pad_token = bos, eos, pad
        self.bos_id: int | None = self._id(bos) if bos is not None else None
        self.eos_id = self._id(eos)
        self.pad_id = self._id(pad)
        self.notes: list[str] = []
        self.chat_template = chat_template
        if self.eos_id == self.pad_id:
            raise UserError(f"the tokenizer's pad and eos tokens are the same ({eos!r}); "
                            "set tokenizer.pad_token to another of its tokens")

    def _id(self, token: str) -> int:
        found = self._inner.token_to_id(token)
        if found is None:
            raise UserError(f"the tokenizer has no token {token!r}; see tokenizer.bos_token, "
                            "tokenizer.eos_token, tokenizer.pad_token")
        return found

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: the fewest rows that an embedding must have."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the vocabulary, merges, rules and the three tokens."""
        parts = [self._inner.to_str(), self.bos_token, self.eos_token, self.pad_token]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name (such as `<|im_end|>`), None if there is no such token."""
        return self._inner.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no bos, no eos, and special tokens in it as plain characters."""
        return self._inner.encode(text, add_special_tokens=False).ids

    @cached_property
    def controls(self) -> dict[str, Control]:
        """Spelling -> token: the special ones, and added ones in the shape of `<|name|>`.

        A tokenizer may have the latter as ordinary tokens (DeepSeek's `<｜User｜>`), which `encode`
        makes of any text. Tokens of one character are left out: such a text is ordinary text.
        """
        return {token.content: Control(number, token.special, token.lstrip, token.rstrip)
                for number, token in self._inner.get_added_tokens_decoder().items()
                if len(token.content) > 1
                and (token.special or re.fullmatch(r"<[|｜].*[|｜]>", token.content, re.DOTALL))}

    @cached_property
    def prefix(self) -> Literal["first", "always"] | None:
        """Where a space is put before text, as SentencePiece does: never (None), at the beginning
        of the whole text, or also after every special token."""
        return _prefix(json.loads(self._inner.to_str()))[1]

    @cached_property
    def _bare(self) -> Any:
        """The same tokenizer without the rule of `prefix`."""
        import tokenizers

        rules, prefix = _prefix(json.loads(self._inner.to_str()))
        if prefix is None:
            return self._inner
        bare = tokenizers.Tokenizer.from_str(json.dumps(rules))
        bare.encode_special_tokens = True
        return bare

    def encode_rest(self, text: str) -> list[int]:
        """`encode` of a text that continues another: no space is put before it."""
        return self._bare.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids. A cut through a character gives U+FFFD there."""
        return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def count_bytes(self, text: str) -> int:
        """UTF-8 bytes of a text: the denominator of bits per byte."""
        return len(text.encode("utf-8"))

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer to `path`, or to tokenizer.json in it where it is not a .json name.

        Beside a file called tokenizer.json goes a tokenizer_config.json with the names of bos, eos
        and pad and the chat template, so that `load_tokenizer` and transformers' AutoTokenizer
        find the same.
        """
        target = Path(path) if Path(path).suffix == ".json" else Path(path) / "tokenizer.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        self._inner.save(str(target))
        if target.name != "tokenizer.json":
            return
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast",
                                  "eos_token": self.eos_token, "pad_token": self.pad_token,
                                  "clean_up_tokenization_spaces": False}
        if self.bos_token is not None:
            config["bos_token"] = self.bos_token
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        target.with_name("tokenizer_config.json").write_text(text, "utf-8")


def _prefix(rules: dict[str, Any]) -> tuple[dict[str, Any], Literal["first", "always"] | None]:
    """(a tokenizer.json without its rules that put a space before text, where those put it)."""
    found: list[Literal["first", "always"]] = []

    def without(step: Any) -> Any:
        if not isinstance(step, dict):
            return step
        kind = step.get("type")
        if kind == "Prepend":
            found.append("always")
            return None
        if kind == "Metaspace":
            scheme = step.get("prepend_scheme", "always")
            if scheme != "never":
                found.append("first" if scheme == "first" else "always")
            return {**step, "prepend_scheme": "never"}
        if kind == "ByteLevel" and step.get("add_prefix_space"):
            found.append("always")
            return {**step, "add_prefix_space": False}
        for name in ("normalizers", "pretokenizers"):
            if name in step:
                parts = [without(part) for part in step[name]]
                step = {**step, name: [part for part in parts if part is not None]}
        return step

    rules = {**rules, "normalizer": without(rules.get("normalizer")),
             "pre_tokenizer": without(rules.get("pre_tokenizer"))}
    return rules, "always" if "always" in found else found[0] if found else None


def _read_beside(path: Path) -> tuple[dict[str, str], str | None]:
    """(bos, eos, pad as a tokenizer_config.json beside the tokenizer names them; chat template).

    A chat_template.jinja goes before the template in the config, as in transformers.
    """
    config = path.with_name("tokenizer_config.json")
    values: Any = {}
    if config.is_file():
        try:
            values = json.loads(config.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{config} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"{config} holds no JSON object; write one, or remove the file")
    named = {}
    for role in KNOWN:
        token = values.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            named[role] = token
    return named, _template_beside(path.with_name("chat_template.jinja"), config, values)


def _template_beside(file: Path, config: Path, values: dict[str, Any]) -> str | None:
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8 text; convert it, or remove it") from None
    template = values.get("chat_template")
    if isinstance(template, list):
        template = next((item.get("template") for item in template
                         if isinstance(item, dict) and item.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise UserError(f"{config}: chat_template is neither a string nor a list of templates with "
                        "names; give one in chat.template")
    return template


def load_tokenizer(path: str | Path, config: TokenizerConfig | None = None) -> Tokenizer:
    """Reads a tokenizer.json, or the one in a folder. UserError where it is missing or broken."""
    import tokenizers

    config = config or TokenizerConfig()
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(f"tokenizer.path: no such file: {file}")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for what it cannot parse
        raise UserError(f"{file} is not a tokenizer.json: {error}") from error
    named, chat_template = _read_beside(file)

    def pick(role: str, asked: str | None, unlike: str | None = None) -> str | None:
        if asked is not None:
            return asked
        choices = ([named[role]] if role in named else []) + list(KNOWN[role])
        return next((token for token in choices
                     if token != unlike and inner.token_to_id(token) is not None), None)

    eos = pick("eos", config.eos_token)
    if eos is None:
        raise UserError(f"{file}: no token ends a document; set tokenizer.eos_token")
    pad = pick("pad", config.pad_token, unlike=eos)
    if pad is None:
        raise UserError(f"{file}: no token other than {eos!r} can pad; set tokenizer.pad_token")
    return Tokenizer(inner, bos=pick("bos", config.bos_token), eos=eos, pad=pad,
                     chat_template=chat_template)


def _pattern(max_digits: int) -> str:
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return rf"{words}|\p{{N}}{{1,{max_digits}}}|{rest}"


def train_bpe(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Trains a byte-level BPE. The same texts and config give the same tokenizer, bit for bit."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    specials = list(dict.fromkeys([*SPECIAL_TOKENS, *config.special_tokens]))
    if config.vocab_size < 256 + len(specials):
        raise UserError(f"tokenizer.vocab_size is {config.vocab_size}; byte-level BPE needs at "
                        f"least {256 + len(specials)} (256 bytes, {len(specials)} special tokens)")
    inner = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_pattern(config.max_digits)), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=specials, show_progress=False,
        min_frequency=2, max_token_length=config.max_token_bytes,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    inner.train_from_iterator(texts, trainer=trainer)
    tokenizer = Tokenizer(inner, bos=BOS, eos=EOS, pad=PAD)
    note_short_vocabulary(tokenizer, config)
    return tokenizer


def note_short_vocabulary(tokenizer: Tokenizer, config: TokenizerConfig) -> None:
    """Says so in the notes where the text was too small for the vocabulary that was asked for."""
    if tokenizer.vocab_size < config.vocab_size:
        tokenizer.notes.append(
            f"the text supports {tokenizer.vocab_size:,} tokens, not the {config.vocab_size:,} "
            "asked for (no pair of tokens is left that occurs twice)")


def train_tokenizer(
    data: DataConfig, config: TokenizerConfig, progress: Progress | None = None
) -> tuple[Tokenizer, Report]:
    """Trains on the documents of `data` that are not held out, and returns the account of them.

    Holds at most about `train_bytes` of text. Which documents of a larger source are taken depends
    on their hashes alone (from the upper end: the held-out ones lie at the lower).
    """
    report = Report()
    files = find_files(data, report)
    size = sum(file.path.stat().st_size for file in files)
    lowest = max(0, 2**64 - int(min(1.0, config.train_bytes / max(size, 1)) * 2.0**64))
    hashes: list[int] = []
    kept: list[tuple[int, str]] = []
    for document in read_documents(data, files, report, progress, "reading for the tokenizer"):
        hashes.append(document.hash)
        if document.hash >= lowest:
            kept.append((document.hash, document.text))
    every = np.array(hashes, dtype=np.uint64)
    held = set(every[held_out(every, data.holdout)].tolist())
    texts = [text for key, text in kept if key not in held]
    if not texts:
        raise UserError("no document is left to train the tokenizer on; see tokenizer.train_bytes")
    if progress:
        progress("training the tokenizer", 0, None)
    tokenizer = train_bpe(texts, config)
    report.notes += tokenizer.notes
    return tokenizer, report
