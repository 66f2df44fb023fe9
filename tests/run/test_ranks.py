"""The stages after pretraining on two ranks: the losses of one."""

import pytest
import tuned

from fastllm import checkpoint


def trained(job, world, verb, folder, data, **changes):
    """A run of the command line on some ranks; its steps and evaluations."""
    one = job(world, None, verb, *tuned.arguments(folder, data, **changes))
    codes = one.codes(120)
    assert codes == [0] * world, one.text() + one.text(world - 1)
    return tuned.metrics(changes.get("out", folder / "run"))


@pytest.mark.parametrize(("verb", "make", "changes"), [
    ("sft", tuned.chats, {}),
    ("sft", tuned.chats, {"adapter.name": "lora", "adapter.rank": 4}),
    ("dpo", tuned.pairs, {}),
    ("dpo", tuned.pairs, {"adapter.name": "lora", "adapter.rank": 4}),
    ("reward", tuned.pairs, {}),
], ids=["sft", "sft-lora", "dpo", "dpo-lora", "reward"])
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_as_one(job, tmp_path, verb, make, changes, stage):
    """Two ranks of 2 rows against one of 4: the same samples, the same losses, the same model."""
    if stage == 3 and "adapter.name" in changes:
        pytest.skip("dist.zero 3 is refused with an adapter")
    data = make(tmp_path)
    alone, judged = trained(job, 1, verb, tmp_path, data, **changes,
                            **{"out": tmp_path / "one", "train.batch-size": 4})
    ranks, together = trained(job, 2, verb, tmp_path, data, **changes,
                              **{"out": tmp_path / "two", "dist.zero": stage,
                                 "eval.batch-size": 2})
    for key in ("loss", "tokens", "grad_norm", *(("accuracy", "margin") if verb != "sft" else ())):
        assert [step[key] for step in ranks] == pytest.approx([step[key] for step in alone],
                                                              rel=1e-5)
    for ours, theirs in zip(together, judged, strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)
    one, two = (checkpoint.load(checkpoint.steps(tmp_path / name / "checkpoints")[-1])
                for name in ("one", "two"))
    # Adam divides by the root of the squares: where a gradient is nearly nothing, rounding decides.
    for name, tensor in one.stream("model"):
        other = two.tensor("model", name)
        assert (tensor - other).abs().max() <= 1e-3 * max(1.0, float(tensor.abs().max())), name
    wanted = "adapter" if "adapter.name" in changes else "model"
    assert (tmp_path / "two" / wanted).is_dir()
