"""fastllm.presets: every preset builds a valid run of the shape that its name promises."""

import pytest

from fastllm import config, run
from fastllm.config import UserError
from fastllm.model import num_parameters
from fastllm.presets import PRESETS, preset

STAGES = {"minimind-sft": run.SftRun, "minimind-lora": run.SftRun,
          "minimind-dpo": run.PreferenceRun}


def build(name, **changes):
    cls = STAGES.get(name, run.RunConfig)
    return config.build(cls, run.complete(config.merge(preset(name), changes), cls),
                        joined=name not in STAGES)


def test_later_stages_keep_what_they_are_known_for():
    assert build("minimind-sft").optim.lr == 1e-5
    assert build("minimind-lora").adapter.rank == 16
    assert build("minimind-dpo").loss.beta == 0.15
    assert build("minimind-dpo").optim.lr == 1e-6  # not the 4e-8 that leaves the loss at ln 2
    assert build("minimind-dpo").optim.weight_decay == 0.0  # of the stage, beneath the preset


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in STAGES])
def test_builds_and_shares_one_vocabulary(name):
    settings = build(name)
    assert settings.tokenizer.vocab_size == settings.model.vocab_size


@pytest.mark.parametrize(("name", "millions"), [
    ("minimind-26m", 25.83), ("minimind-64m", 63.91), ("llama-1b", 1235.81), ("llama-8b", 8030.26)])
def test_parameters(name, millions):
    assert num_parameters(build(name).model) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_demo_is_between_5_and_10_million():
    assert 5e6 <= num_parameters(build("demo").model) <= 10e6


def test_a_flag_wins_over_a_preset():
    settings = build("minimind-26m", train={"batch_size": 3}, model={"dropout": 0.1})
    assert settings.train.batch_size == 3
    assert settings.model.hidden_size == 512
    assert settings.model.dropout == 0.1


def test_the_vocabulary_of_the_tokenizer_sets_the_models():
    layer = run.complete({"tokenizer": {"vocab_size": 1000}})
    assert config.build(run.RunConfig, layer).model.vocab_size == 1000


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean minimind-26m"):
        preset("minimind26m")
