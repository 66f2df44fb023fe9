"""The settings of a task, and what its prompts look like.

    kind choice             kind choice, letters          kind exact

    Question: {shot}        Question: {shot}              Question: {shot}
    Answer: {its answer}    A. {choice}                   Answer: {its answer}
                            B. {choice}
    Question: {question}    Answer: {letter}              Question: {question}
    Answer:                                               Answer:
                            Question: {question}
                            A. {choice}
                            B. {choice}
                            Answer:

Rows with `ctx` and `endings` (HellaSwag's) are plain text instead: the context is the prompt as it
stands, and the shots are contexts with their right endings, a blank line apart.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

Normalizer = Literal["none", "text", "number"]


@dataclass(kw_only=True)
class TaskConfig:
    """A task: rows of questions with known answers, and how a model is asked them."""

    kind: Literal["choice", "exact"] = "choice"
    """choice: the likeliest of a row's choices; exact: the text that the model writes."""
    name: str | None = None
    """What the results are called; none: the first file's name."""
    path: list[str] = field(default_factory=list)
    """Files, folders and globs of rows. choice: `question`, `choices` (or `ctx`, `endings`) and
    `answer` (or `answerKey`, `label`): an index from 0, a letter or the text. exact: `question`
    (or `prompt`) and `answer` (or `target`): a text, a number, or a list of which any is right."""
    format: Literal["auto", "jsonl", "json", "csv", "parquet"] = "auto"
    """auto goes by the file's ending. A csv cell holds its list of choices as JSON."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Solved examples before each question."""
    shots_path: list[str] = field(default_factory=list)
    """Rows that the examples are drawn from, the same ones for every question; rows that ask what
    the task asks are left out. Empty: other rows of the task's own files, drawn for each question.
    """
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the examples drawn, and of tokens drawn with a temperature."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Questions that are asked: the first so many; none: all."""
    letters: bool = False
    """choice: list the choices with letters, and take the letter's likelihood for the choice's."""
    normalizer: Normalizer = "none"
    """exact: what is compared. none: the text without the space around it; text: lower case without
    punctuation, articles and extra space (SQuAD); number: the last number, after #### where there
    is one (GSM8K)."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 256
    """exact: tokens of an answer at most."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """exact: 0 takes the likeliest token always."""
    stop: list[str] | None = None
    """exact: texts that end an answer and are not part of it; none: "Question:", and nothing with
    task.chat, where a turn has an end of its own."""
    chat: bool = False
    """exact: questions as turns of a conversation, in the model's chat template."""
    system: str | None = None
    """With task.chat: the system message."""
    on_bad: Literal["skip", "error"] = "skip"
    """A row that cannot be used is counted and left out, or ends the run."""
    max_record_bytes: Annotated[int, Field(gt=0)] = 64 << 20
    """A longer row is rejected."""
    batch_tokens: Annotated[int, Field(gt=0)] = 8192
    """choice: tokens that run together, more where one question has more."""
    batch_size: Annotated[int, Field(gt=0)] = 32
    """exact: questions of one length that run together."""
    samples: bool = False
    """Keep each question's prompt, answer and what the model said in the result."""

    def validate(self) -> None:
        """Raises ValueError for settings that contradict each other."""
        if self.kind == "exact" and self.letters:
            raise ValueError("task.letters is for kind choice: in exact the model writes its "
                             "answer; leave it out")
        if self.kind == "choice":
            for name, given in (("chat", self.chat), ("stop", self.stop is not None),
                                ("normalizer", self.normalizer != "none"),
                                ("temperature", self.temperature > 0)):
                if given:
                    raise ValueError(f"task.{name} is for kind exact: a choice is scored by its "
                                     "likelihood and nothing is written; leave it out")
        if self.system is not None and not self.chat:
            raise ValueError("task.system needs task.chat: only a conversation has a system "
                             "message")
        if self.shots_path and not self.shots:
            raise ValueError("task.shots-path is given and task.shots is 0: say how many")
        if self.stop is not None and "" in self.stop:
            raise ValueError("task.stop holds an empty text, which would end every answer at once")
