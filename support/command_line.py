"""The command line: flags over a config file over a preset, into one Config.

A run's settings are found in this order, each one over the one before it: the defaults in
config.py; the preset; the file named by --config, or the config of the run that --resume continues;
the flags.
"""

import argparse
import os
import textwrap
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from support.adapters import adapter_options, learning_rate
from support.checkpoint import checkpoints, find_model, refuse_model
from support.config import (
    OBJECTIVE_COLUMNS,
    PRESETS,
    Config,
    check_place,
    check_text,
    resolve_path,
)
from support.config_file import read_config_file
from support.errors import UserError, as_sentence, check_choice, quoted
from support.foreign_options import explain_foreign_option

Choices = dict[str, typing.Iterable[str]]
Extra = dict[str, str | None]

DASHES = ("-", "–", "—")  # the last two are what an editor makes of the first


METAVARS = {int: "N", float: "X", string_to_bool: "true|false"}  # by type
WIDTH = 79  # of --help, in any terminal
# The concerns of --help: the first option of each.
SECTIONS = {
    "preset": "The run",
    "model": "Model",
    "dataset": "Questions",
    "rollouts_per_step": "Rollout",
    "reward": "Rewards",
    "objective": "Objective (docs/objectives.md)",
    "train_batch_size": "Update",
    "eval_interval": "Evaluation, checkpoints, samples",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring, each default, and nothing beyond column 79."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=WIDTH)

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Without breaking token-mean in two."""
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`--run_dir NAME`, and not `--run-dir` too, which argparse also takes."""
        if action.nargs == 0:
            return action.option_strings[-1 if action.dest == "help" else 0]
        return f"{action.option_strings[0]} {self._format_args(action, '')}"

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest in OBJECTIVE_COLUMNS:
            return f"{action.help} (default: the objective's own)"
        return super()._get_help_string(action) if action.default is not None else action.help


class RunHelpFormatter(HelpFormatter):
    """Of a command that looks at a run: its defaults are those of the run."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest == "model":
            return "a run folder, a checkpoint or a model (default: the newest run in runs/)"
        return action.help


class Parser(HfArgumentParser):
    """argparse, with its errors as one sentence instead of a page of usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(as_sentence(message))


def parse_config(
    argv: list[str],
    description: str | None = None,
    choices: Choices | None = None,
    of_run: bool = False,
    **extra: str,
) -> tuple[Config, Extra]:
    """Read the command line.

    Args:
        argv: the arguments after the program's name.
        description: the command's docstring, for --help.
        choices: for --help, the names that an option takes.
        of_run: the command looks at a run, whose settings are its defaults.
        extra: further flags of the command, name to help; each one takes a string.
    Returns:
        the run's Config; and the values of the extra flags and of `resume`: the run folder to
        continue, or None.
    Raises:
        UserError: for unknown names, impossible values and contradictions.
    """
    given = read_flags(build_parser(description, choices or {}, of_run, extra), argv)
    for name in ("config", "resume", *extra):
        check_text(given.get(name) or "", f"--{name}", path=name != "question")
    for name in PATHS & given.keys():
        given[name] = given[name] and os.path.expanduser(given[name])  # --model=~/m, say
    if given.get("config") == "":
        raise UserError("--config is empty; give it the config.yaml of a run, or leave it out.")
    resume = run_to_resume(given)
    if resume:
        given["run_dir"] = resume
    settings = read_settings(given, resume)
    flags = {name: value for name, value in given.items() if name in CONFIG_FIELDS}
    before = dict(settings)
    settings |= adapter_settings(settings, flags) | smaller_batch(settings, flags)
    config = Config(**{**settings, **flags})
    for name in [*flags, *(settings.keys() - flags.keys())] if resume else ():
        after = getattr(config, name)
        check_change(resume, name, before.get(name, after), after)
    return config, {"resume": resume, **{name: given.get(name) for name in extra}}


PATHS = {"config", "resume", "base", "model", "run_dir", "dataset", "eval_dataset"}
CONFIG_FIELDS = {field.name for field in fields(Config)}


def build_parser(
    description: str | None, choices: Choices, of_run: bool, extra: dict[str, str]
) -> Parser:
    """Every option of Config, by concern, and first the others of a command."""
    parser = Parser(
        Config,
        description=refilled(description or ""),
        usage="%(prog)s [options]",
        allow_abbrev=False,
        formatter_class=RunHelpFormatter if of_run else HelpFormatter,
    )
    for action in list(parser._actions):
        action.metavar = METAVARS.get(action.type, "NAME")
        if action.dest in SECTIONS:
            group = parser.add_argument_group(SECTIONS[action.dest])
        if action.dest != "help":
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)
    for action in parser._actions:
        if action.type is string_to_bool:  # `--mask_truncated` alone is true, as the other switches
            action.nargs, action.const = "?", True
        if action.dest == "micro_batch_size":
            action.type = number_or_auto
        if action.option_strings[0].startswith("--no_"):
            action.help = f"the same as --{action.dest} false"
        if action.dest in choices:
            action.help += f": {', '.join(choices[action.dest])}"  # names of objectives/
    parser.add_argument("--config", help="a saved config.yaml to start from, instead of a preset")
    about = "continue the run in this folder (or in --run_dir) from its newest checkpoint"
    about = argparse.SUPPRESS if of_run else about
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN_DIR", help=about)
    for name, text in extra.items():
        parser.add_argument(f"--{name}", help=text)
    return parser


def refilled(text: str) -> str:
    """A docstring within WIDTH columns: its commands keep their lines, paragraphs are filled."""
    pieces = []
    for paragraph in text.strip().split("\n\n"):
        if not paragraph.startswith("    "):
            pieces.append(textwrap.fill(" ".join(paragraph.split()), WIDTH))
            continue
        lines = []
        for line in paragraph.splitlines():
            what, _, about = line.strip().partition("  ")
            if len(line) <= WIDTH:
                lines.append(line)
                continue
            for indent, part in (("    ", what), ("        ", about.strip())):
                lines += textwrap.wrap(
                    part, WIDTH, initial_indent=indent, subsequent_indent="        "
                )
        pieces.append("\n".join(lines))
    return "\n\n".join(pieces)


def read_flags(parser: Parser, argv: list[str]) -> dict[str, Any]:
    """Only what stands on the command line, without the defaults."""
    absent = object()
    blank = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    namespace, unknown = parser.parse_known_args(argv, blank)
    if unknown:
        explain_foreign_option(unknown[0])
        if not unknown[0].startswith(DASHES):
            raise UserError(
                f"I do not know what to do with {unknown[0]!r}; every setting is a flag, as in "
                "--steps 10."
            )
        flags = [flag for action in parser._actions for flag in action.option_strings]
        check_choice(unknown[0].split("=")[0], flags, "flag", listed="--help")
    return {name: value for name, value in vars(namespace).items() if value is not absent}


def run_to_resume(given: dict[str, Any]) -> str | None:
    """The run folder that --resume names, looked at; None without that flag."""
    resume = given.get("resume")
    if resume is None:
        return None
    resume = resume or given.get("run_dir") or ""
    if not resume:
        raise UserError("Say which run to continue: --resume runs/NAME.")
    if given.get("config"):
        raise UserError(
            "--resume takes the config of the run that it continues; leave out --config."
        )
    if Path(resume, "trainer_state.pt").is_file():
        raise UserError(
            f"{resume} is a checkpoint; --resume takes the folder of its run: "
            f"{Path(resume).parent}."
        )
    if not Path(resume, "config.yaml").is_file():
        raise UserError(f"There is no run to resume in {resume}: it has no config.yaml.")
    refuse_model(Path(resume))
    if Path(given.get("run_dir", resume)).resolve() != Path(resume).resolve():
        raise UserError(
            f"--resume goes on in the folder {resume}; leave out --run_dir {given['run_dir']}."
        )
    return resume


def read_settings(given: dict[str, Any], resume: str | None) -> dict[str, Any]:
    """The settings below the flags: of the preset, or of the config file."""
    file = given.get("config")
    file = Path(resume, "config.yaml") if resume else Path(file) if file else None
    settings = read_config_file(file) if file else {}
    preset = given.get("preset", settings.get("preset", "gsm8k"))
    if file and preset != settings.get("preset", preset):
        raise UserError(
            f"{file} was made from the preset {settings['preset']}; leave out --preset {preset}."
        )
    if not file:
        settings = PRESETS[check_choice(preset, PRESETS, "preset")]
    elif not resume:
        settings.pop("run_dir", None)  # a run that is repeated gets a folder of its own
    if given.get("objective", settings.get("objective")) != settings.get("objective"):
        # Another row, and the whole of it.
        settings = {k: v for k, v in settings.items() if k not in OBJECTIVE_COLUMNS}
    return {**settings, "preset": preset}


def smaller_batch(settings: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The optimizer step of a preset, where flags make the rollout smaller than it."""
    names = ("rollouts_per_step", "group_size", "train_batch_size")
    sizes = [{**settings, **flags}.get(name, getattr(Config, name)) for name in names]
    if "train_batch_size" in flags or not flags.keys() & set(names) or sizes[0] * sizes[1] < 1:
        return {}
    return {"train_batch_size": min(sizes[0] * sizes[1], sizes[2])}


def adapter_settings(settings: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """What a model that is the folder of an adapter decides; and the learning rate of adapters.

    That of a preset or a config file is meant for all weights or for adapters, as it says itself.
    Where the flags choose the other one, it is ten times as high, or a tenth.
    """
    model = flags.get("model", settings.get("model", ""))
    check_text(model, "--model", path=True)
    found = adapter_options(model) if model else {}
    if found and is_of_a_run(Path(resolve_path(model), "config.yaml")):
        found["quantize"] = quantize_of(model)
    for name in found.keys() & flags.keys():
        if flags[name] != found[name]:
            raise UserError(
                f"{model} holds an adapter with --{name} {shown(found[name])}, and goes on with "
                f"it; leave out --{name} {shown(flags[name])}."
            )
    before = settings.get("adapter_rank", 0) > 0
    after = {**settings, **found, **flags}.get("adapter_rank", 0) > 0
    if before != after:
        found["lr"] = learning_rate(settings.get("lr", Config.lr), adapted=after)
    return found


def quantize_of(model: str) -> str:
    """Whether the model of a run was trained beside weights in 4 bits."""
    saved = Path(resolve_path(model), "config.yaml")
    return read_config_file(saved).get("quantize", "none") if is_of_a_run(saved) else "none"


def shown(value: Any) -> str:
    """A setting as it is typed."""
    return " ".join(value) if isinstance(value, list) else str(value)


def check_change(resume: str, name: str, before: Any, after: Any) -> None:
    """Say that a run which is resumed goes on with another setting; UserError if it cannot."""
    if name == "model" and before != after:
        raise UserError(
            f"The run in {resume} trains {before}; to begin with another model, or with a "
            "checkpoint of this run, start a new run with --model and without --resume."
        )
    if name in ("adapter_rank", "adapter_alpha", "adapter_targets", "quantize") and before != after:
        raise UserError(
            f"The run in {resume} has --{name} {shown(before)}, which cannot be changed on resume; "
            f"leave out --{name} {shown(after)}, or start a new run."
        )
    if name != "run_dir" and before != after:
        auto = "the objective's own" if name in OBJECTIVE_COLUMNS else "auto"
        before, after = (auto if value is None else value for value in (before, after))
        print(f"changed on resume: {name} from {before} to {after}")


def number_or_auto(text: str) -> int | None:
    """A whole number, or None for auto."""
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise UserError(f"--micro_batch_size is {text!r}; it must be a whole number or auto.")
    return None if text == "auto" else int(text)


# ---------------------------------------------------------------- commands that look at a model


def newest_run() -> Path | None:
    """The run in runs/ that has written last, among those with a checkpoint."""
    runs = filter(checkpoints, Path("runs").glob("*"))
    return max(runs, key=lambda run: run.stat().st_mtime, default=None)


def is_of_a_run(file: Path) -> bool:
    """Whether a config.yaml is ours; other programs have files of that name too."""
    if not file.is_file():
        return False
    ours = file.read_text(encoding="utf-8", errors="replace").startswith("preset:")
    if not ours:
        print(f"{quoted(file)} is another program's, and is not looked at")
    return ours


def parse_run_config(
    argv: list[str], description: str | None, choices: Choices, **extra: str
) -> tuple[Config, Extra]:
    """The command line of a command that looks at a model: --model may be a run or a checkpoint.

    Without --model (and without a preset or a config) it is the newest run in runs/. The settings
    (prompt, dataset, budget) are those of the run that made the model, unless flags say otherwise;
    the extra value `base` is the model that the run started from, or None.
    """
    newest = None
    if not any(argument.startswith(("--model", "--preset", "--config")) for argument in argv):
        newest = newest_run()
        if newest is None and "--help" not in argv and "-h" not in argv:
            raise UserError(
                "There is no run with a checkpoint in runs/; give --model FOLDER, or train one "
                "first (python train.py --preset tiny)."
            )
    if newest:
        print(f"--model {newest}, the newest run")
        argv = [f"--model={newest}", *argv]
    config, others = parse_config(argv, description, choices, of_run=True, **extra)
    if others["resume"]:
        run = quoted(others["resume"])
        raise UserError(f"--resume is train.py's; to look at a run say --model {run}.")
    check_place(config.model, "--model")
    folder = find_model(config.model)
    argv = [*argv, f"--model={folder}"]  # the last one counts; an adapter has settings of its own
    saved = Path(folder, "config.yaml")
    others["base"] = others.get("base")
    if is_of_a_run(saved) and not any(a.startswith(("--config", "--preset")) for a in argv):
        others["base"] = others["base"] or parse_config(["--config", str(saved)])[0].model
        config, _ = parse_config(["--config", str(saved), *argv], description, choices, **extra)
    else:
        config, _ = parse_config(argv, description, choices, of_run=True, **extra)
    return config, others
