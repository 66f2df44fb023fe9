"""What the training commands do differently: their data, their loss, how they are judged, what they
leave behind. Everything else is `fastllm.run.session`, once."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastllm import adapters
from fastllm.adapters import Adapter, AdapterConfig
from fastllm.checkpoint import Checkpoint
from fastllm.config import UserError
from fastllm.data import EvalSet, Kind, Prepared, Rows, Tokenizer
from fastllm.data.collate import Batch
from fastllm.data.rows import SEQUENCES
from fastllm.evaluate import evaluate, evaluate_pairs, xz_bits_per_byte
from fastllm.export import export, export_checkpoint
from fastllm.model import Decoder, flops_per_token
from fastllm.model.reward import RewardModel
from fastllm.objectives import preference, pretrain, reward, sft
from fastllm.plan import Loss, MicroBatch
from fastllm.run.reference import reference_of
from fastllm.run.settings import PreferenceRun, RewardRun, RunConfig, SftRun, TuneConfig

if TYPE_CHECKING:
    from fastllm.run.session import Run

Prompt = tuple[str, list[int]]
"""What is shown of a prompt, and its tokens."""


class Stage:
    """Pretraining, and what the others change of it."""

    kind: Kind = "text"
    reads: Loss = "cross_entropy"

    def __init__(self, settings: RunConfig) -> None:
        self.settings = settings
        self._config: Any = settings.loss
        self.rows: Rows | None = None

    @property
    def look(self) -> Callable[[list[float]], str | None] | None:
        """Told the losses of the steps so far, what the person should hear of them, if anything."""
        return None

    @property
    def row_tokens(self) -> int:
        """Positions of a row of a batch."""
        return self.settings.train.seq_len * SEQUENCES[self.kind]

    @property
    def adapter(self) -> AdapterConfig | None:
        """None: every parameter is trained."""
        settings = self.settings
        adapted = isinstance(settings, TuneConfig) and settings.adapter.name != "none"
        return settings.adapter if adapted else None  # type: ignore[union-attr]

    def micro_batch(self, prepared: Prepared) -> MicroBatch:
        """What a rank's forward and backward take, for the plan of its memory. The documents are as
        many as fill it at their mean length, and each row's padding."""
        train, dataset = self.settings.train, prepared.train
        tokens, mean = train.batch_size * self.row_tokens, train.seq_len
        if prepared.pack:
            mean = min(mean, max(1, dataset.num_tokens // max(1, len(dataset))))
        return MicroBatch(tokens=tokens, longest=train.seq_len, loss=self.reads,
                          documents=tokens // mean + train.batch_size)

    def read(self, tokenizer: Tokenizer) -> Rows | None:
        """How the sources' records are read; None: as texts."""
        if self.kind != "text":
            assert isinstance(self.settings, TuneConfig)
            self.rows = Rows(self.kind, tokenizer, self.settings.chat)
        return self.rows

    def build(self, decoder: Decoder) -> nn.Module:
        """The module that is trained."""
        return decoder

    def assemble(self, decoder: Decoder, device: torch.device, dtype: torch.dtype
                 ) -> tuple[nn.Module, Adapter | None]:
        """The module that is trained, on the device in the dtype, and the adapter put on it."""
        model = self.build(decoder).to(device=device, dtype=dtype)
        if self.adapter is None:
            return model, None
        assert isinstance(model, Decoder)
        return model, adapters.apply(model, self.adapter, seed=self.settings.train.seed)

    def shape(self, dtype: torch.dtype) -> nn.Module:
        """`assemble` without a base and without memory."""
        meta = torch.device("meta")
        with meta:
            decoder = Decoder(self.settings.model)
        return self.assemble(decoder, meta, dtype)[0]

    def begin(self, run: "Run") -> dict[str, Any]:
        """Before the first step, with the model as it begins; returns what a resumed run must
        share beyond model and data."""
        return {}

    def loss(self, model: Any, batch: Batch) -> tuple[Any, ...]:
        """As the trainer wants it."""
        return pretrain.loss(model, batch, self._config)

    def evaluate(self, run: "Run", model: Any) -> dict[str, float]:
        """val_loss and more on the held-out documents."""
        return evaluate(model, run.held, run.held.num_bytes, device=run.device,
                        loss=pretrain.loss, world=run.world)

    def beside(self, held: EvalSet) -> dict[str, float]:
        """What the last evaluation is shown beside: a compressor, for texts."""
        if self.kind != "text":
            return {}
        return {"xz_bpb": xz_bits_per_byte(held.texts())}

    @property
    def flops_per_token(self) -> float:
        """Of a trained token, for MFU; a frozen base needs no gradients of its weights."""
        whole = flops_per_token(self.settings.model, self.settings.train.seq_len)
        return whole * 2 / 3 if self.adapter else whole

    def stop_ids(self, tokenizer: Tokenizer) -> set[int]:
        """Tokens that end what the model writes."""
        return {tokenizer.eos_id, *(self.rows.encoder.stop_ids if self.rows else ())}

    def prompts(self, held: EvalSet) -> list[Prompt]:
        """What the finished model continues: eval.prompts, or the beginnings of three held-out
        documents."""
        given = self.settings.eval.prompts
        tokenizer = held.tokenizer
        if self.rows:
            encoder = self.rows.encoder
            asked = [(prompt, encoder.prompt([{"role": "user", "content": prompt}]))
                     for prompt in given]
            return asked or [self._question(held, place) for place in
                             range(0, min(3 * held.dataset.group, len(held.dataset)),
                                   held.dataset.group)]
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        texts = given or [" ".join(text.decode("utf-8").split(" ")[:6]) for text in held.texts(3)]
        return [(text, [*start, *tokenizer.encode(text)]) for text in texts]

    def _question(self, held: EvalSet, place: int) -> Prompt:
        """A held-out conversation up to its first answer."""
        dataset = held.dataset
        ids = dataset.document(place)
        start = int(dataset.starts[place])
        assert dataset.trained is not None
        answer = dataset.trained[start + 1:start + len(ids)].argmax() + 1
        tokens = ids[:answer].tolist()
        return held.tokenizer.decode(tokens).strip(), tokens

    def export(self, run: "Run", folder: Path) -> None:
        """Write the trained model."""
        assert isinstance(run.model, Decoder | RewardModel)
        export(run.model, folder, tokenizer=run.tokenizer, stop_ids=self.stop_ids(run.tokenizer))

    def export_stored(self, saved: Checkpoint, folder: Path, tokenizer: Tokenizer) -> None:
        """The same from a checkpoint, where no rank has the whole model."""
        export_checkpoint(saved, self.settings.model, folder, tokenizer=tokenizer,
                          stop_ids=self.stop_ids(tokenizer))


class Sft(Stage):
    """Supervised fine-tuning: the loss of the answers' tokens alone."""

    kind: Kind = "chat"
    settings: SftRun

    def loss(self, model: Any, batch: Batch) -> tuple[Any, ...]:
        return sft.loss(model, batch, self._config)

class Preference(Stage):
    """DPO and its kin, on pairs; KTO on judged answers."""

    settings: PreferenceRun
    reads: Loss = "logprobs"

    @property
    def look(self) -> Callable[[list[float]], str | None] | None:
        return partial(preference.stuck, config=self.settings.loss)

    def __init__(self, settings: PreferenceRun) -> None:
        self.kind = "judged" if settings.loss.name == "kto" else "preference"
        super().__init__(settings)
        if settings.reference and not preference.needs_reference(settings.loss):
            raise UserError(f"--reference is given, and {settings.loss.name} has none: leave it "
                            "out")

    def begin(self, run: "Run") -> dict[str, Any]:
        if not preference.needs_reference(self.settings.loss):
            return {}
        values, key = reference_of(run, self.settings.reference)
        run.loader.packed.reference = run.held.packed.reference = values
        return {"reference": key}

    def loss(self, model: Any, batch: Batch) -> tuple[Any, ...]:
        return preference.loss_and_measures(model, batch, self._config)

    def evaluate(self, run: "Run", model: Any) -> dict[str, float]:
        return evaluate_pairs(model, run.held, device=run.device, world=run.world,
                              measure=partial(preference.measure, config=self.settings.loss))

class Reward(Stage):
    """A pairwise reward model."""

    kind: Kind = "preference"
    settings: RewardRun
    reads: Loss = "reward"

    def build(self, decoder: Decoder) -> nn.Module:
        return RewardModel(decoder)

    def loss(self, model: Any, batch: Batch) -> tuple[Any, ...]:
        return reward.loss_and_measures(model, batch, self._config)

    def evaluate(self, run: "Run", model: Any) -> dict[str, float]:
        return evaluate_pairs(model, run.held, device=run.device, world=run.world,
                              measure=partial(reward.measure, config=self.settings.loss))
    def prompts(self, held: EvalSet) -> list[Prompt]:
        return []

    def export_stored(self, saved: Checkpoint, folder: Path, tokenizer: Tokenizer) -> None:
        decoder = Decoder(self.settings.model, initialize=False)
        model = self.build(decoder.to(saved.layout["model"]["decoder.embed_tokens.weight"].dtype))
        assert isinstance(model, RewardModel)
        saved.fill("model", dict(model.named_parameters()))
        export(model, folder, tokenizer=tokenizer, stop_ids=self.stop_ids(tokenizer))


def stage_of(settings: RunConfig) -> Stage:
    """The stage that settings are of."""
    kinds: dict[type, type[Stage]] = {SftRun: Sft, PreferenceRun: Preference, RewardRun: Reward}
    return kinds.get(type(settings), Stage)(settings)
