"""The tokenizer in a GGUF file's metadata, as a `Tokenizer`.

Two kinds: "gpt2", byte-level BPE with its merges, and "llama", SentencePiece's BPE, whose merges
follow from the pieces' scores. Sources: llama.cpp's llama-vocab.cpp for what `tokenizer.ggml.pre`
and the defaults mean, SentencePiece's bpe_model.cc for the order of merges.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from fastllm.config import UserError
from fastllm.data.tokenizer import KNOWN, Tokenizer
from fastllm.importing.gguf_reader import File

_PREFIX = "tokenizer.ggml."
# tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"
# tokenizer.ggml.pre -> how text is split before BPE: "gpt2" is the rule inside ByteLevel, "digits"
# takes every digit by itself first, anything else is a pattern.
PRE_TOKENIZERS = {
    "default": "gpt2", "gpt-2": "gpt2", "gpt2": "gpt2", "olmo": "gpt2", "mpt": "gpt2",
    "smollm": "digits", "starcoder": "digits", "refact": "digits", "command-r": "digits",
    "codeshell": "digits", "exaone": "digits", "minerva-7b": "digits",
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2, "stablelm2": _QWEN2}
# These look a whole word up before they merge, and their documents begin with bos.
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3"}
_LONGEST_PIECE = 1000  # characters; finding a piece's halves takes the square of them
_SPACE = "▁"


def read_tokenizer(file: File, say: Callable[[str], object]
                   ) -> tuple[Tokenizer, str | None, list[int]]:
    """(the tokenizer, its chat template if it has one, what ends a turn other than eos).

    bos is kept only where the file says that documents begin with it: `Tokenizer` puts it there.
    Raises UserError for a kind or a `tokenizer.ggml.pre` that is not known, and for a vocabulary
    that contradicts itself.
    """
    reader = _Reader(file, say)
    try:
        return reader.read()
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for what it cannot hold
        raise UserError(f"{file.path}: tokenizers refuses its tokenizer: {error}") from error


class _Reader:
    def __init__(self, file: File, say: Callable[[str], object]) -> None:
        self.file, self.say = file, say
        self.kind = self._get("model", str)
        if self.kind not in ("gpt2", "llama"):
            self.refuse("model", f"'{self.kind}' is not supported; there are: gpt2 (byte-level "
                        "BPE), llama (SentencePiece BPE)")
        self.tokens: list[str] = self._get("tokens", list)
        if not self.tokens:
            self.refuse("tokens", "is empty")
        count = len(self.tokens)
        self.types: list[int] = self._numbers("token_type", [_NORMAL] * count)
        self.pre = self._get("pre", str, None)
        if self.kind == "llama":
            # A run of spaces is written as spaces there, and as SentencePiece's sign elsewhere.
            self.tokens = [token.replace(" ", _SPACE) if kind == _USER_DEFINED else token
                           for token, kind in zip(self.tokens, self.types, strict=True)]
        self.ids = {token: place for place, token in enumerate(self.tokens)}
        if len(self.ids) != count:
            twice = next(token for place, token in enumerate(self.tokens)
                         if self.ids[token] != place)
            self.refuse("tokens", f"holds {twice!r} twice")

    def refuse(self, key: str, why: str) -> NoReturn:
        raise UserError(f"{self.file.path}: {_PREFIX}{key} {why}")

    def _get(self, key: str, kind: type, *default: Any) -> Any:
        value = self.file.metadata.get(_PREFIX + key)
        if value is None and default:
            return default[0]
        if value is None:
            self.refuse(key, "is missing: the file holds no whole tokenizer")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.refuse(key, f"is of the wrong type, {type(value).__name__}")
        return value

    def _numbers(self, key: str, *default: list[Any]) -> list[Any]:
        """An array of one number a token."""
        value: Any = self.file.metadata.get(_PREFIX + key)
        if value is None and default:
            return default[0]
        if not hasattr(value, "tolist") or len(value) != len(self.tokens):
            self.refuse(key, f"is not an array of {len(self.tokens)} numbers, one for each token")
        return value.tolist()

    def read(self) -> tuple[Tokenizer, str | None, list[int]]:
        from tokenizers import AddedToken

        inner = self._byte_level() if self.kind == "gpt2" else self._sentencepiece()
        added = [AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
                 for token, kind in zip(self.tokens, self.types, strict=True)
                 # A run of spaces is reached by merges, as in Gemma's own tokenizer.
                 if kind in (_CONTROL, _UNKNOWN) or (
                     kind == _USER_DEFINED and not (self.kind == "llama" and _SPACE in token))]
        inner.add_special_tokens([token for token in added if token.special])
        inner.add_tokens([token for token in added if not token.special])
        eos = self._role("eos")
        if eos is None:
            self.refuse("eos_token_id", "is missing, and no token has a known name that ends "
                        "a document")
        bos = self._role("bos") if self._adds_bos() else None
        self._set_template(inner, bos, eos if self._get("add_eos_token", bool, False) else None)
        template = self.file.metadata.get("tokenizer.chat_template")
        turn = self._name("eot_token_id")
        return (Tokenizer(inner, bos=bos, eos=eos, pad=self._pad(eos)),
                template if isinstance(template, str) else None,
                [] if turn is None or turn == eos else [self.ids[turn]])

    # ---------------------------------------------------------------------------- vocabularies

    def _byte_level(self) -> Any:
        import tokenizers
        from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

        if self.pre not in PRE_TOKENIZERS:
            self.refuse("pre", f"{self.pre!r} is not supported, and how text is split follows "
                        f"from it; there are: {', '.join(PRE_TOKENIZERS)}")
        merges = []
        for merge in self._get("merges", list):
            left, space, right = merge.partition(" ")
            if not space or not {left, right, left + right} <= self.ids.keys():
                self.refuse("merges", f"holds {merge!r}, which is not two tokens that make a third")
            merges.append((left, right))
        inner = tokenizers.Tokenizer(models.BPE(
            vocab=self.ids, merges=merges, ignore_merges=self.pre in _WHOLE_WORDS))
        rule = PRE_TOKENIZERS[self.pre]
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False,
                                            use_regex=rule in ("gpt2", "digits"))
        first: list[Any] = []
        if rule == "digits":
            first = [pre_tokenizers.Digits(individual_digits=True)]
        elif rule != "gpt2":
            first = [pre_tokenizers.Split(Regex(rule), behavior="isolated")]
        inner.pre_tokenizer = pre_tokenizers.Sequence([*first, in_bytes])
        inner.decoder = decoders.ByteLevel()
        if self.pre == "qwen2":
            inner.normalizer = normalizers.NFC()  # Qwen's own rule, which GGUF does not record
        return inner

    def _sentencepiece(self) -> Any:
        import tokenizers
        from tokenizers import decoders, models, normalizers

        unknown = self._name("unknown_token_id")
        if unknown is None:
            unknown = next((token for token, kind in zip(self.tokens, self.types, strict=True)
                            if kind == _UNKNOWN), None)
        inner = tokenizers.Tokenizer(models.BPE(
            vocab=self.ids, merges=self._merges(), unk_token=unknown, fuse_unk=True,
            byte_fallback=True))
        prefix = self._get("add_space_prefix", bool, True)
        spaces = normalizers.Replace(" ", _SPACE)
        inner.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]
                                                ) if prefix else spaces
        steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        inner.decoder = decoders.Sequence(
            [*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
        return inner

    def _merges(self) -> list[tuple[str, str]]:
        """Pairs of pieces that make a third, the best score first, as SentencePiece takes them."""
        scores = self._numbers("scores")
        if str(self.file.metadata["general.architecture"]).startswith("gemma"):
            scores = [-place for place in range(len(scores))]  # Gemma's scores are not in order
        pairs = []
        usable = {token for token, kind in zip(self.tokens, self.types, strict=True)
                  if kind in (_NORMAL, _USER_DEFINED)}
        for token, score in zip(self.tokens, scores, strict=True):
            if token not in usable:
                continue
            if len(token) > _LONGEST_PIECE:
                self.refuse("tokens", f"holds a piece of {len(token)} characters")
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in usable and right in usable:
                    pairs.append((-score, -cut, left, right))
        # Among the ways to one piece the longest left half comes first, as in transformers.
        return [(left, right) for *_, left, right in sorted(pairs)]

    # --------------------------------------------------------------------- what tokens stand for

    def _name(self, key: str) -> str | None:
        """The token that a key gives the id of, None where there is no such key."""
        place = self._get(key, int, None)
        if place is None:
            return None
        if not 0 <= place < len(self.tokens):
            self.refuse(key, f"is {place}, outside the {len(self.tokens)} tokens")
        return self.tokens[place]

    def _role(self, role: str) -> str | None:
        named = self._name(f"{role}_token_id")
        return named or next((token for token in KNOWN[role] if token in self.ids), None)

    def _adds_bos(self) -> bool:
        """Where the file is silent, as llama.cpp: SentencePiece does, byte-level does not."""
        return self._get("add_bos_token", bool,
                         self.kind == "llama" or self.pre in _WHOLE_WORDS)

    def _pad(self, eos: str) -> str:
        """A token that pads and is not the one that ends a document, which has to be trained."""
        named = self._name("padding_token_id")
        if named is not None and named != eos:
            return named
        unused = [token for token, kind in zip(self.tokens, self.types, strict=True)
                  if kind in (_UNUSED, _CONTROL, _UNKNOWN)]
        found = next((token for token in [*KNOWN["pad"], *unused]
                      if token in self.ids and token != eos), None)
        if found is None:
            self.refuse("padding_token_id", f"is missing, and no special token other than "
                        f"{eos!r} could pad")
        why = "the file names none" if named is None else f"the file's, {named!r}, ends documents"
        self.say(f"padding token: {found!r} (id {self.ids[found]}); {why}")
        return found

    def _set_template(self, inner: Any, bos: str | None, eos: str | None) -> None:
        """What transformers puts around a text."""
        from tokenizers import processors

        if bos or eos:
            single = [token for token in (bos, "$A", eos) if token]
            inner.post_processor = processors.TemplateProcessing(
                single=single, pair=[*single, *("$B:1" if part == "$A" else part
                                                for part in single)],
                special_tokens=[(token, self.ids[token]) for token in (bos, eos) if token])
