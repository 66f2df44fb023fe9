"""A task from its files to its result."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastllm.config import UserError
from fastllm.data.chat import BadRow
from fastllm.data.sources import Progress
from fastllm.data.tokenizer import Tokenizer
from fastllm.generate import GenerateConfig, generate
from fastllm.model import Decoder
from fastllm.tasks.config import TaskConfig
from fastllm.tasks.normalizers import normalize
from fastllm.tasks.prompts import Shots, choice_prompt, exact_messages, exact_prompt
from fastllm.tasks.result import Metric, TaskResult
from fastllm.tasks.rows import Item, read_items
from fastllm.tasks.scoring import Continuation, loglikelihoods


class Encoder(Protocol):
    """The chat template of a model: a conversation to the tokens that an answer follows."""

    @property
    def stop_ids(self) -> Collection[int]:
        """The tokens that end an answer."""

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """The conversation's tokens, and the beginning of an answer."""


def run_task(model: Decoder, tokenizer: Tokenizer, config: TaskConfig, *,
             encoder: Encoder | None = None, eos_token_ids: Collection[int] = (),
             progress: Progress | None = None) -> TaskResult:
    """Ask the model every question of the task, on the device where its weights are.

    The same model, files and config give the same result.

    Args:
        encoder: for task.chat.
        eos_token_ids: tokens that end an answer, beside the tokenizer's eos and the encoder's.
        progress: told of the rows read and of the questions answered.

    Raises UserError for settings that contradict each other, files that cannot be read or hold no
    usable row, too few examples, and a question that the model cannot read.
    """
    try:
        config.validate()
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.chat and encoder is None:
        raise UserError("task.chat needs a chat template, and this model has none: leave it out")
    items, report = read_items(config, config.path, "task.path", progress)
    pool, shots_report = None, None
    if config.shots_path:
        pool, shots_report = read_items(config, config.shots_path, "task.shots-path", progress)
    shots = Shots(items, config, pool)
    asked = items[:config.limit]
    ask = _Asking(model, tokenizer, config, shots, progress)
    if config.kind == "choice":
        scores, samples = ask.choices(asked)
    else:
        stop = {tokenizer.eos_id, *eos_token_ids}
        scores, samples = ask.exact(asked, encoder if config.chat else None, stop)
    notes = []
    if ask.cut:
        first = ", ".join(ask.cut[:3]) + (", ..." if len(ask.cut) > 3 else "")
        notes.append(f"{len(ask.cut):,} prompts are longer than the model's {ask.room} and lost "
                     f"their beginning: {first}")
    if len(asked) < len(items):
        notes.append(f"the first {len(asked):,} of {len(items):,} questions (task.limit)")
    if shots.left_out:
        notes.append(f"{shots.left_out:,} rows of task.shots-path ask what the task asks and are "
                     "not used as examples")
    return TaskResult(
        name=config.name or Path(config.path[0]).stem, kind=config.kind, shots=config.shots,
        questions=len(asked), metrics={name: Metric.of(each) for name, each in scores.items()},
        truncated=len(ask.cut), report=report, shots_report=shots_report, notes=notes,
        samples=samples if config.samples else [])


Scores = dict[str, list[float]]
Samples = list[dict[str, Any]]


class _Asking:
    """Questions as tokens, and the model's answers as scores."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, config: TaskConfig, shots: Shots,
                 progress: Progress | None) -> None:
        self.model, self.tokenizer, self.config, self.shots = model, tokenizer, config, shots
        self.progress = progress
        self.start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self.room = model.config.max_position_embeddings - model.virtual_tokens
        self.cut: list[str] = []

    def choices(self, items: Sequence[Item]) -> tuple[Scores, Samples]:
        """acc and acc_norm of multiple choice; of equal likelihoods the first choice counts."""
        prompts, questions = [], []
        for index, item in enumerate(items):
            prompt, texts = choice_prompt(item, self.shots.of(index), self.config.letters)
            # Apart from the prompt, so that the border is where the choices part.
            ids = [self.tokenizer.encode_rest(text) for text in texts]
            context = self._fit(self.start + self.tokenizer.encode(prompt),
                                max(map(len, ids)) - 1, item)
            if not context or not all(ids):
                raise UserError(f"{item.where}: the prompt or a choice has no token in this "
                                "tokenizer: is it the model's?")
            prompts.append(prompt)
            questions.append([Continuation(context, each) for each in ids])
        found = loglikelihoods(self.model, questions, batch_tokens=self.config.batch_tokens,
                               done=self._told(len(items)))
        scores: Scores = {"acc": [], "acc_norm": []}
        samples: Samples = []
        for item, prompt, sums in zip(items, prompts, found, strict=True):
            sizes = [len((text if not self.config.letters else "A").encode("utf-8"))
                     for text in item.choices]
            per_byte = [each / size for each, size in zip(sums, sizes, strict=True)]
            chosen = sums.index(max(sums))
            by_byte = per_byte.index(max(per_byte))
            scores["acc"].append(float(chosen == item.right))
            scores["acc_norm"].append(float(by_byte == item.right))
            samples.append({
                "where": item.where, "prompt": prompt, "answer": item.choices[item.right],
                "predicted": item.choices[chosen], "right": chosen == item.right,
                "predicted_norm": item.choices[by_byte], "right_norm": by_byte == item.right,
                "loglikelihoods": sums})
        return scores, samples

    def exact(self, items: Sequence[Item], encoder: Encoder | None, eos: set[int]
              ) -> tuple[Scores, Samples]:
        """exact_match of what the model writes."""
        config = self.config
        stop = config.stop
        if stop is None:
            stop = ["Question:"] if encoder is None else []
        eos = eos if encoder is None else eos | set(encoder.stop_ids)
        prompts: list[list[int]] = []
        for index, item in enumerate(items):
            shots = self.shots.of(index)
            if encoder is None:
                ids = self.start + self.tokenizer.encode(exact_prompt(item, shots))
                prompts.append(self._fit(ids, config.max_new_tokens, item))
            else:
                try:
                    ids = encoder.prompt(exact_messages(item, shots, config.system))
                except BadRow as error:
                    raise UserError(f"{item.where}: {error.reason}") from None
                if len(ids) + config.max_new_tokens > self.room:
                    raise UserError(f"{item.where}: the conversation has {len(ids)} tokens; with "
                                    f"task.max-new-tokens {config.max_new_tokens} it is longer "
                                    f"than the model's {self.room}: lower one of them or "
                                    "task.shots")
                prompts.append(ids)
        drawn = GenerateConfig(max_new_tokens=config.max_new_tokens, seed=config.seed,
                               temperature=config.temperature)
        if self.progress:
            self.progress("answering", 0, len(items))
        rows = generate(self.model, prompts, drawn, eos_token_ids=eos,
                        batch_size=config.batch_size, until=_stopped(self.tokenizer, stop))
        if self.progress:
            self.progress("answering", len(items), len(items))
        scores: Scores = {"exact_match": []}
        samples: Samples = []
        for item, prompt, row in zip(items, prompts, rows, strict=True):
            text = self.tokenizer.decode([token for token in row if token not in eos])
            text = text[:min([at for one in stop if (at := text.find(one)) >= 0] or [len(text)])]
            said = normalize(text, config.normalizer)
            right = said in {normalize(answer, config.normalizer) for answer in item.answers}
            scores["exact_match"].append(float(right))
            samples.append({
                "where": item.where,
                "prompt": self.tokenizer.decode(prompt, skip_special_tokens=False),
                "answer": list(item.answers), "written": text, "predicted": said, "right": right})
        return scores, samples

    def _fit(self, context: list[int], after: int, item: Item) -> list[int]:
        """The context, without its beginning where what follows would not fit the model then."""
        over = len(context) + after - self.room
        if over <= 0:
            return context
        kept = len(context) - over
        if kept <= len(self.start):
            raise UserError(f"{item.where}: {after} tokens after the prompt leave no room for it "
                            f"in the model's {self.room}: shorten the answers or lower "
                            "task.max-new-tokens")
        self.cut.append(item.where)
        return self.start + context[over + len(self.start):]

    def _told(self, total: int) -> Callable[[int], None] | None:
        progress = self.progress
        if progress is None:
            return None
        return lambda done: progress("answering", done, total)


def _stopped(tokenizer: Tokenizer, stop: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Whether the newest token completed one of the texts. A token has at least one byte, so only
    as many tokens as the longest text has bytes are looked at (and a few that write nothing)."""
    if not stop:
        return None
    reach = max(len(text.encode("utf-8")) for text in stop) + 4

    def stopped(tokens: list[int]) -> bool:
        tail = tokenizer.decode(tokens[-reach:])
        return any(text in tail for text in stop)
    return stopped
