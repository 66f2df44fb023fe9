"""The end of a run: the weights that are kept, the summary, texts, model/ and adapter/."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastllm import adapters, checkpoint
from fastllm.config import RunError
from fastllm.data import EvalSet
from fastllm.generate import GenerateConfig, generate
from fastllm.model import Decoder, num_parameters
from fastllm.run.setup import write_json

if TYPE_CHECKING:
    from fastllm.run.session import Run


def end(run: "Run") -> dict[str, Any]:
    """The summary, after what only all ranks together can do for it."""
    last, written = None, None
    if run.finished:
        if len(run.held) and run.settings.eval.every:
            # A run resumed at its end trains no step, and so has no evaluation yet.
            last = run.trainer.last_evaluation or run.evaluate(run.model.eval())
        if run.settings.eval.load_best:
            last = _load_best(run, last)
        if run.zero and run.zero.stage == 3:
            # No rank can run the model alone: each draws the same tokens.
            written = _continuations(run)
            run.zero.reshard()
    summary: dict[str, Any] = {}

    def finish() -> None:
        run.write_dispatch()
        summary.update(_finish(run, last, written))

    run.world.first_alone("finish", finish)
    return summary


def _load_best(run: "Run", last: dict[str, Any] | None) -> dict[str, Any] | None:
    """Take the weights of the best evaluation, on every rank; returns that evaluation's record
    where this process made it, else a new one."""
    progress = run.trainer.progress
    if progress.best_step is None or progress.best_step == progress.step:
        return last
    name = f"step-{progress.best_step:08d}"
    saved = checkpoint.load(run.folder / "checkpoints" / name, run.world)
    run.trainer.load_weights(saved)
    run.say(f"the weights of step {progress.best_step} are the best: taken")
    return {"step": progress.best_step, **run.evaluate(run.model.eval())}


def _finish(run: "Run", last: dict[str, Any] | None,
            written: list[dict[str, str]] | None) -> dict[str, Any]:
    """The summary, with the last evaluation; where the run came to its end also what it is
    shown beside, continuations (those written already, in stage 3) and model/."""
    progress = run.trainer.progress
    summary: dict[str, Any] = {
        "steps": progress.step, "total_steps": run.total_steps, "tokens": progress.tokens,
        "skipped_steps": progress.skipped, "seconds": progress.seconds,
        "parameters": num_parameters(run.settings.model),
        "stopped_by": run.trainer.stopped_by, "ended_early": progress.ended_early,
        "best_step": progress.best_step, "finished": run.finished,
    }
    if run.zero:
        summary["sent_bytes"] = run.zero.sent_bytes  # by this rank, in this process
    joules = run.trainer.monitor.energy_joules()
    here = progress.tokens - run.tokens_before  # the monitor knows this process only
    if joules is not None and here:
        summary["joules_per_token"] = joules / here
    if run.finished:
        if last:
            summary |= {key: value for key, value in last.items() if key != "step"}
            summary |= run.stage.beside(run.held)
        summary["continuations"] = _continuations(run) if written is None else written
        summary |= _write_model(run)
    write_json(run.folder / "summary.json", summary)
    return summary


def _write_model(run: "Run") -> dict[str, Any]:
    """model/, and adapter/ where one was trained; returns what the summary says of it."""
    target, tokenizer = run.folder / "model", run.tokenizer
    if run.zero and run.zero.stage == 3:
        # No rank has the whole model; a checkpoint has, on the disk.
        saved = checkpoint.load(_newest_weights(run))
        run.stage.export_stored(saved, target, tokenizer)
    elif run.adapter is None:
        run.stage.export(run, target)
    else:
        return _write_adapter(run, target)
    return {}


def _newest_weights(run: "Run") -> Path:
    """The checkpoint whose weights are the model's."""
    progress = run.trainer.progress
    best = progress.best_step if run.settings.eval.load_best else None
    return run.folder / "checkpoints" / f"step-{best or progress.step:08d}"


def _write_adapter(run: "Run", target: Path) -> dict[str, Any]:
    """adapter/ in PEFT's format, and model/ with the adapter merged where it can be."""
    assert run.adapter is not None and isinstance(run.model, Decoder)
    folder = run.folder / "adapter"
    run.adapter.save(folder, base=str(Path(str(run.settings.from_)).absolute()))
    if not run.adapter.mergeable:
        return {}
    difference, bound = adapters.merge_check(run.adapter, _probe(run.held, run.device))
    print(f"merged into model/: logits differ by at most {difference:.3g} (bound {bound:.3g})")
    if not difference <= bound:
        raise RunError(f"merging the adapter changes logits by {difference:.3g}, more than "
                       f"{bound:.3g}: {folder} is written, model/ is not")
    run.stage.export(run, target)
    return {"merge_difference": difference}


def _continuations(run: "Run") -> list[dict[str, str]]:
    """What the model writes after each prompt."""
    settings = run.settings.eval
    room = run.settings.model.max_position_embeddings - settings.new_tokens
    prompts = [(text, ids) for text, ids in run.stage.prompts(run.held)
               if 0 < len(ids) < room] if settings.new_tokens else []
    if not prompts:
        return []
    drawn = GenerateConfig(max_new_tokens=settings.new_tokens, temperature=0.8, top_p=0.95,
                           seed=run.settings.train.seed)
    stop = run.stage.stop_ids(run.tokenizer)
    model: Any = run.model.eval()
    written = generate(model, [ids for _, ids in prompts], drawn, eos_token_ids=stop)
    return [{"prompt": text, "text": run.tokenizer.decode([i for i in ids if i not in stop])}
            for (text, _), ids in zip(prompts, written, strict=True)]


def _probe(held: EvalSet, device: torch.device) -> torch.Tensor:
    """Tokens (1, S) on which two forms of a model are compared."""
    dataset = held.dataset if len(held.dataset) else None
    ids = dataset.document(0)[:256].tolist() if dataset else list(range(16))
    return torch.tensor([ids], dtype=torch.int64, device=device)
