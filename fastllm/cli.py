"""`fastllm-train VERB [MODEL] [--config run.yaml] [--preset NAME] [--section.key value ...]`.

Parses, builds the configuration, calls. What a verb does lies in `fastllm.run` and below; errors
become one line here, and an exit code: 2 for bad input, 1 for a failed run.
"""

import errno
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastllm import commands, config, run
from fastllm.config import RunError, UserError, nearest
from fastllm.dist import last_words
from fastllm.dist.launch import LaunchConfig, launch, parse
from fastllm.presets import PRESETS, preset

PROGRAM = last_words.PROGRAM


@dataclass(frozen=True)
class Verb:
    """One word (or two) of the command line."""

    summary: str
    config: type
    call: Callable[..., Any]
    model: bool = False
    """Takes a MODEL: a run folder, a Hugging Face folder, or what else the verb says."""
    preset: str | None = None
    """The preset that is in force without --preset."""


VERBS: dict[str, Verb] = {
    "demo": Verb("train a small model on text that is on every machine, in about three minutes",
                 run.RunConfig, run.demo, preset="demo"),
    "pretrain": Verb("train a model on text, new or --from MODEL: --data.path FILES --out DIR",
                     run.RunConfig, run.train),
    "sft": Verb("fine-tune on conversations, whole or an adapter: --from MODEL --data.path FILES",
                run.SftRun, run.train),
    "dpo": Verb("train on preferences (--loss.name dpo, ipo, kto, orpo, simpo): --from MODEL "
                "--data.path FILES", run.PreferenceRun, run.train),
    "reward": Verb("train a reward model on pairs of answers: --from MODEL --data.path FILES",
                   run.RewardRun, run.train),
    "import": Verb("write MODEL, a .gguf or PyTorch file, in Hugging Face layout: --out DIR",
                   commands.ImportRun, commands.import_model, model=True),
    "launch": Verb("start ranks of a command: [--nproc N] VERB ...; also on several nodes",
                   LaunchConfig, launch),
    "tokenizer train": Verb("train a byte-level BPE tokenizer: --data.path FILES --out FILE",
                            commands.TokenizerRun, commands.train_tokenizer),
    "data prepare": Verb("tokenise text once into memory-mapped files", commands.DataRun,
                         commands.data_prepare),
    "data stats": Verb("documents, tokens, lengths, packing efficiency", commands.DataRun,
                       commands.data_stats),
    "data preview": Verb("show packed rows as the model sees them, trained tokens in colour",
                         commands.DataRun, commands.data_preview),
    "eval": Verb("loss and bits per byte of MODEL on text (--data.path FILES), or its answers on a "
                 "task (--task.path FILES)", commands.EvalRun, commands.evaluate_model, model=True),
    "generate": Verb("continue a prompt: --prompt TEXT", commands.GenerateRun,
                     commands.generate_from_model, model=True),
    "chat": Verb("talk with MODEL in the terminal", commands.ChatRun, commands.chat_with_model,
                 model=True),
    "merge": Verb("fold an adapter (MODEL) into its base: --out DIR", commands.MergeRun,
                  commands.merge_adapter, model=True),
    "export": Verb("write MODEL in Hugging Face layout: --out DIR", commands.ExportRun,
                   commands.export_model, model=True),
    "info": Verb("this machine, versions, and which backend each op gets and why", commands.InfoRun,
                 commands.info),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _dispatch(arguments, debug)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        last_words.say(_one_line(error))
        return 2 if isinstance(error, UserError) or _disk_full(error) else 1


def _dispatch(arguments: list[str], debug: bool) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    words = 2 if " ".join(arguments[:2]) in VERBS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in VERBS:
        twins = [verb for verb in VERBS if verb.split()[0] == name]
        hint = f": use one of {', '.join(twins)}" if twins else nearest(name, list(VERBS))
        raise UserError(f"no command '{name}'{hint}; {PROGRAM} --help lists them")
    verb = VERBS[name]
    if name == "launch" and rest[:1] not in (["-h"], ["--help"]):
        return _launch(rest, debug)
    if "-h" in rest or "--help" in rest:
        _help(name, verb)
        return 0
    positional = []
    if verb.model:
        if not rest or rest[0].startswith("--"):
            raise UserError(f"{name} needs a model: {PROGRAM} {name} MODEL, a run folder or a "
                            "Hugging Face folder")
        positional, rest = [rest[0]], rest[1:]
    verb.call(*positional, _configure(verb, rest))
    return 0


def _launch(arguments: list[str], debug: bool) -> int:
    """The exit code of a command on many ranks. A mistake in its first words is said here, once."""
    settings, command = parse(arguments)
    words = 2 if " ".join(command[:2]) in VERBS else 1
    name = " ".join(command[:words])
    if name not in VERBS or name == "launch":
        raise UserError(f"launch: no command '{name}' to start{nearest(name, list(VERBS))}; as in: "
                        f"{PROGRAM} launch --nproc 2 pretrain ...")
    return launch(settings, [*command, *(["--debug"] if debug else [])])


def _configure(verb: Verb, arguments: list[str]) -> Any:
    """Layers, later ones winning: preset, --config file, a resumed run's own, the command line."""
    given = config.from_arguments(arguments)
    file, name = given.pop("config", None), given.pop("preset", verb.preset)
    layers = [preset(str(name))] if name else []
    layers += [config.from_yaml(str(file))] if file else []
    layer = config.merge(*layers, given)
    if issubclass(verb.config, run.RunConfig):
        layer = run.complete(layer, verb.config)
    return config.build(verb.config, layer)


def _overview() -> str:
    width = max(map(len, VERBS)) + 2
    lines = [f"usage: {PROGRAM} VERB [MODEL] [--config run.yaml] [--preset NAME] "
             "[--section.key value ...]", ""]
    lines += [f"  {name:<{width}}{verb.summary}" for name, verb in VERBS.items()]
    lines += ["", f"presets: {', '.join(PRESETS)}",
              f"{PROGRAM} VERB --help lists every setting of a verb; --debug shows tracebacks.",
              "", "first steps:", f"  {PROGRAM} demo",
              f"  {PROGRAM} pretrain --preset minimind-26m --data.path text.jsonl --out runs/first",
              f"  {PROGRAM} generate runs/first --prompt 'Once upon a time'",
              f"  {PROGRAM} sft --from MODEL --adapter.name lora --data.path chats.jsonl "
              "--out runs/sft", f"  {PROGRAM} chat runs/sft"]
    return "\n".join(lines)


def _help(name: str, verb: Verb) -> None:
    """Every setting with its meaning and default, drawn by tyro from the dataclasses."""
    import tyro

    base = preset(verb.preset) if verb.preset else {}
    if issubclass(verb.config, run.RunConfig):
        base = run.complete(base, verb.config)
    usage = f"{PROGRAM} {name}" + (" MODEL" if verb.model else "")
    tyro.cli(verb.config, prog=usage, args=["--help"],
             default=config.build(verb.config, base, joined=False),
             description=f"{verb.summary}. Also: --config FILE.yaml, --preset NAME "
                         f"({', '.join(PRESETS)}), --debug.",
             config=(tyro.conf.AvoidSubcommands,))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UserError):
        return f"error: {text}"
    if isinstance(error, RunError):
        return f"the run failed: {text}"
    if _disk_full(error):
        return f"error: the disk is full: {text}; make room, then --resume"
    return f"the run failed: {type(error).__name__}: {text} (--debug shows where)"


def _disk_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
