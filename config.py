"""Every knob, the presets and the command line.

A run's settings are found in this order, each one over the one before it: the defaults below (which are the
preset `gsm8k`), the preset, the file named by --config (or the config of the run that --resume continues), and
the flags. `python train.py --help` lists every knob; the README's table is made from the same text.
"""

import argparse
import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from errors import UserError, choose, is_text
from loss import NAMES, OBJECTIVES, Objective

# The tutorial's prompt, in our words: what the rewards look for is what the model is asked for. No number in it, since
# a model that has not learned yet will copy its example, and a copied 42 would now and then be right.
SYSTEM_PROMPT = (
    "You solve math problems. First reason step by step inside <think> and </think>, then give the final number "
    "alone inside <answer> and </answer>, like this: <think> reasoning </think> <answer> number </answer>"
)


def knob(default: Any, help: str) -> Any:
    """One field of Config: its default and its meaning, which --help and the README print."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def column(help: str, names: str = "") -> Any:
    """A column of the objective: None is the row's own choice. `names`: of the choices, in loss.py's NAMES."""
    return knob(None, f"{help}: {', '.join(NAMES[names])}" if names else help)


@dataclass(frozen=True)
class Config:
    """One run, complete: saved as config.yaml in its folder, read again by --config and --resume.

    "Tutorial" below is the tiny-grpo tutorial, whose hyperparameters are the defaults; "paper" is DeepSeekMath,
    arXiv 2402.03300, where GRPO was introduced.
    """

    # The run
    preset: str = knob("gsm8k", "named settings to start from: gsm8k, gsm8k-24gb or tiny")
    run_dir: str = knob("", "folder for everything the run writes; empty: runs/<preset>-<time>")
    seed: int = knob(42, "every random choice follows from this number (tutorial: 42)")
    steps: int = knob(233, "rollouts to train for; 233 steps of 32 questions are one pass over GSM8K (tutorial)")
    device: str = knob("cuda", "cuda, cpu, or auto: cuda where there is one")

    # Model
    model: str = knob("Qwen/Qwen2.5-0.5B-Instruct", "causal language model: a hub name or a folder (tutorial)")
    precision: str = knob("bf16", "bf16: fp32 weights, bf16 arithmetic; bf16-pure: weights in bf16 too; fp32")
    gradient_checkpointing: bool = knob(True, "recompute activations in the backward pass: less memory, more time")

    # Questions
    dataset: str = knob("openai/gsm8k", "a hub name, a .jsonl or .parquet file, or a folder with train.* and test.*")
    dataset_config: str = knob("main", "the hub dataset's configuration; not used for files")
    eval_dataset: str = knob("", "where the held-out questions are, if not in the dataset's test split")
    system_prompt: str = knob(SYSTEM_PROMPT, "first message of every prompt; empty: none")
    max_prompt_tokens: int = knob(
        512, "questions with longer prompts are left out (with max_new_tokens: tutorial's 1024)"
    )

    # Rollout
    rollouts_per_step: int = knob(32, "questions per step (tutorial)")
    group_size: int = knob(12, "completions per question: what each one is compared with (tutorial; G of the paper)")
    max_new_tokens: int = knob(512, "longest completion, in tokens; the prompt does not count")
    temperature: float = knob(1.0, "divides the logits when sampling and when computing log-probabilities (tutorial)")
    top_p: float = knob(1.0, "nucleus of the sampler; below 1 the log-probabilities no longer describe it (tutorial)")
    rollout_batch_size: int = knob(384, "sequences per call of generate: memory and speed only")

    # Reward
    reward: list[str] = knob(["accuracy", "format"], "names from reward.py, or my_file.py:my_function, summed")
    reward_weights: list[float] = knob([1.0, 0.2], "one weight for each reward")
    reward_timeout: float = knob(60.0, "seconds that a reward may take for the completions of a step; 0: any time")

    # Objective: the row, and, where it is not to be the row's own choice, each of its columns
    objective: str = knob("grpo", f"the method, a row of loss.py's table: {', '.join(OBJECTIVES)}")
    advantage: str | None = column("what a reward is compared with in its group (leave-one-out: RLOO)", "advantage")
    advantage_std: str | None = column("divide advantages by the std of the rewards of this", "advantage_std")
    multi_objective_aggregation: str | None = column(
        "several rewards: add them up and compare, or compare each and add up (GDPO)", "multi_objective_aggregation"
    )
    relative_reward_weight: float | None = column("weight of the reward compared with its group (grpo: 1)")
    baseline_reward_weight: float | None = column("weight of the uncompared reward, added to that (grpo: 0)")
    whiten_advantages: bool | None = column("at last give the advantages mean 0 and std 1 over the rollout")
    ratio_level: str | None = column("ratio of each token, or of the whole sequence (GSPO)", "ratio_level")
    surrogate: str | None = column("policy term", "surrogate")
    clip_eps: float | None = column("the ratio is clipped to 1 ± clip_eps (grpo: 0.2, tutorial; epsilon of the paper)")
    clip_eps_high: float | None = column("upper side of the clip, if it differs (dapo: 0.28)")
    clip_ratio_c: float | None = column("dual clip: a bad completion's ratio counts up to this (verl: 3; TRL's delta)")
    loss_agg_mode: str | None = column("mean over tokens", "loss_agg_mode")
    loss_scale_factor: float | None = column("constant of seq-mean-token-sum-norm (dr_grpo: max_new_tokens)")
    kl_weight: float | None = column("weight of the KL to the frozen reference; 0: none (grpo: 0.01, tutorial; beta)")
    kl_estimator: str | None = column("k1, abs, k2, k3 (grpo), each with + for k2's gradient; k3-ratio; full (exact)")
    kl_in_reward: bool | None = column("subtract the KL from the reward, instead of adding it to the loss")
    entropy_weight: float | None = column("bonus for entropy, per nat")
    entropy_target: float | None = column(
        "makes the bonus adaptive: it grows while the entropy is below this many nats"
    )
    top_entropy: float | None = column("share of tokens that is trained, those of most entropy (2506.01939: 0.2)")
    dynamic_sampling: int | None = column(
        "rollouts a step may make to replace groups whose rewards are all equal; 1: none (dapo: 10)"
    )
    mask_truncated: bool | None = column("do not train on completions cut off by max_new_tokens (dapo)")
    sampler_correction: str | None = column("importance weights for a sampler that differs", "sampler_correction")
    sampler_cap: float | None = column("the largest such weight (TRL: 3)")

    # Optimization
    train_batch_size: int = knob(16, "sequences per optimizer step (tutorial)")
    micro_batch_size: int | None = knob(
        None,
        "sequences per forward pass (auto: train_batch_size), halved if a GPU's memory is full; never the mathematics",
    )
    epochs_per_step: int = knob(1, "passes over each rollout (tutorial)")
    optimizer: str = knob("adamw", "adamw, or adamw_8bit (bitsandbytes, CUDA: a quarter of the optimizer's memory)")
    lr: float = knob(5e-6, "learning rate, constant after the warm-up (tutorial)")
    # fp32 weights take the whole of Adam's first steps, which move every weight by lr whatever the gradient; the
    # tutorial's bf16 weights round most of that away. Two such steps were seen to change a 0.5B model's habits.
    warmup_steps: int = knob(10, "steps over which the learning rate rises from 0 (tutorial: 0, with bf16 weights)")
    weight_decay: float = knob(0.0, "decoupled weight decay of AdamW (tutorial: plain Adam)")
    max_norm: float = knob(1.0, "gradients are clipped to this norm (tutorial)")
    max_skipped_steps: int = knob(
        10, "optimizer steps in a row without a finite loss and gradient after which the run stops; 0: it never does"
    )

    # Evaluation, checkpoints, logging
    eval_interval: int = knob(50, "steps between evaluations, besides the first and the last; 0: never evaluate")
    eval_questions: int = knob(0, "how many of the held-out questions to evaluate on; 0: all")
    eval_samples: int = knob(0, "samples per held-out question for pass@k; 0: greedy accuracy only")
    checkpoint_interval: int = knob(
        20, "steps between checkpoints, besides the last; 0: none, not even the last (tutorial)"
    )
    keep_checkpoints: int = knob(3, "how many of the newest checkpoints to keep")
    log_completions: int = knob(4, "sample completions written to TensorBoard each step")

    def __post_init__(self) -> None:
        for name in ("run_dir", "model", "dataset", "eval_dataset", "dataset_config", "system_prompt"):
            check_text(getattr(self, name), f"--{name}", path=name not in ("dataset_config", "system_prompt"))
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise UserError(f"--{name} is empty; give it a folder or a hub name.")
        if not self.reward:
            raise UserError("--reward is empty; give it one name at least, as in --reward accuracy.")
        for name in self.reward:
            check_text(name, "--reward", path=True)
        choose(self.preset, PRESETS, "preset")
        choose(self.device, ("auto", "cuda", "cpu"), "device")
        choose(self.precision, ("bf16", "bf16-pure", "fp32"), "precision")
        choose(self.optimizer, ("adamw", "adamw_8bit"), "optimizer")
        self.check_numbers()
        if len(self.reward) != len(self.reward_weights):
            raise UserError(
                f"--reward has {len(self.reward)} names and --reward_weights {len(self.reward_weights)} numbers; "
                "give --reward_weights one number for each of --reward."
            )
        if not all(map(math.isfinite, self.reward_weights)):
            raise UserError(f"--reward_weights are {self.reward_weights}; each must be a finite number.")
        if not 0 < max(map(abs, self.reward_weights)) <= LARGEST:
            raise UserError(f"--reward_weights are {self.reward_weights}; one must not be 0, none above {LARGEST}.")
        if self.train_batch_size > self.sequences_per_step:
            raise UserError(
                f"--train_batch_size {self.train_batch_size} is larger than the {self.sequences_per_step} sequences "
                "of a rollout (rollouts_per_step × group_size); make it smaller or sample more."
            )
        if self.sequences_per_step > MOST_SEQUENCES:
            raise UserError(
                f"--rollouts_per_step {self.rollouts_per_step} × --group_size {self.group_size} is more than "
                f"{MOST_SEQUENCES} sequences in one rollout; make one of them smaller."
            )

    def check_numbers(self) -> None:
        """UserError for a number that is out of its range."""
        for name in AT_LEAST:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= AT_LEAST[name]):
                raise UserError(f"--{name} is {value}; it must be {AT_LEAST[name]} or more.")
        for name in ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"--{name} is {value}; it must be more than 0.")
        for name in ("top_p", "top_entropy"):
            if (getattr(self, name) or 0) > 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it is a share, so choose a number in (0, 1].")
        for name in (*AT_LEAST, *ABOVE_ZERO):
            most, value = AT_MOST.get(name, LARGEST), getattr(self, name)
            if value is not None and value > most:
                raise UserError(f"--{name} is {value}; it must be {most} or less.")

    @property
    def sequences_per_step(self) -> int:
        """Completions in one rollout."""
        return self.rollouts_per_step * self.group_size

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps made from one rollout; the last one of an epoch may be smaller, none is dropped."""
        return self.epochs_per_step * math.ceil(self.sequences_per_step / self.train_batch_size)

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass as a run begins: micro_batch_size, or all that an optimizer step has."""
        return min(self.micro_batch_size or self.train_batch_size, self.train_batch_size)

    @property
    def arithmetic(self) -> str:
        """The sizes of one step, in a sentence."""
        micro = math.ceil(self.train_batch_size / self.micro_batch)
        epochs = f" in {self.epochs_per_step} epochs" if self.epochs_per_step > 1 else ""
        steps = f"{self.optimizer_steps} optimizer {plural(self.optimizer_steps, 'step')}"
        pieces = f"{micro} micro-{plural(micro, 'batch', 'batches')} of {self.micro_batch}"
        return (
            f"{self.rollouts_per_step} questions × {self.group_size} completions = {self.sequences_per_step} sequences;"
            f" {steps} of {self.train_batch_size}{epochs} in {pieces}"
        )

    @property
    def sampling_precision(self) -> str:
        """What `load_model` is asked for by who only samples: no fp32 weights where the arithmetic is bf16."""
        return "fp32" if self.precision == "fp32" else "bf16-pure"

    def save(self, path: Path) -> None:
        """Write the config as YAML; a file that is there stays whole if the disk is full."""
        fresh = path.with_suffix(".partial")
        try:
            text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise


def plural(count: int, one: str, many: str = "") -> str:
    """`one` or `many`, as `count` asks for."""
    return one if count == 1 else many or one + "s"


AT_LEAST = {
    "seed": 0, "steps": 1, "max_prompt_tokens": 1, "rollouts_per_step": 1, "group_size": 2, "max_new_tokens": 1,
    "rollout_batch_size": 1, "kl_weight": 0, "train_batch_size": 1, "micro_batch_size": 1, "epochs_per_step": 1,
    "warmup_steps": 0, "weight_decay": 0, "eval_interval": 0, "eval_questions": 0, "eval_samples": 0,
    "checkpoint_interval": 0, "keep_checkpoints": 1, "log_completions": 0, "relative_reward_weight": 0,
    "baseline_reward_weight": 0, "entropy_weight": 0, "entropy_target": 0, "dynamic_sampling": 1, "sampler_cap": 1,
    "clip_eps_high": 0, "temperature": 0.01, "reward_timeout": 0, "max_skipped_steps": 0,
}  # fmt: skip
ABOVE_ZERO = ("top_p", "clip_eps", "clip_ratio_c", "loss_scale_factor", "top_entropy", "lr", "max_norm")
# A number above these is a slip of the keyboard: it would end in an overflow, in NaN or in all of the memory.
LARGEST, MOST_SEQUENCES = 10**9, 10**6
DASHES = ("-", "–", "—")  # the last two are what an editor makes of the first
AT_MOST = {"seed": 2**32 - 1, "temperature": 100, "lr": 1}

COLUMNS = {f.name for f in dataclasses.fields(Objective)}


def check_text(text: str, where: str, path: bool = False) -> None:
    """UserError for text that cannot be written down and, of a `path`, for one that no file system would take."""
    if "\0" in text or not is_text(text):
        raise UserError(f"{where} is {text[:80]!r}, with a character that is not text; type it again, in UTF-8.")
    if not path:
        return
    if text and not text.strip():
        raise UserError(f"{where} is {text!r}: a name of spaces only; write a name, or leave it out.")
    if len(text.encode()) > 4000 or max(len(part.encode()) for part in text.split("/")) > 255:
        raise UserError(f"{where} is {text[:80]!r}… and longer than a file name can be; write a shorter one.")
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{where} is {text!r}, but there is no such user; write the folder out.") from error


def located(name: str) -> str:
    """`name`, or where it lies in this project if it is one of the bundled folders (`tiny/model`, `tiny/task`)."""
    bundled = Path(__file__).parent / name
    return str(bundled) if name and not Path(name).exists() and bundled.exists() else name


PRESETS: dict[str, dict[str, Any]] = {
    "gsm8k": {},
    # fp32 weights, gradients and Adam of a 0.5B model take 8 GB, the reference 2 GB and the bf16 copy that samples
    # 1 GB; the rest is the rollout's cache, or the activations and one piece of logits.
    "gsm8k-24gb": {"rollout_batch_size": 128},
    # From trials over lr (1e-5 … 4e-4): 3e-5 climbs in 40 steps without a setback; from 2e-4 on the sampled accuracy
    # falls back after its first peak.
    "tiny": {
        "steps": 40,
        "device": "auto",
        "model": "tiny/model",
        "precision": "fp32",
        "gradient_checkpointing": False,
        "dataset": "tiny/task",
        "system_prompt": "",
        "max_prompt_tokens": 128,
        "group_size": 8,
        "max_new_tokens": 48,
        "reward": ["accuracy"],
        "reward_weights": [1.0],
        "kl_weight": 0.0,
        "train_batch_size": 256,
        "micro_batch_size": 128,
        "lr": 3e-5,
        "warmup_steps": 0,
        "eval_interval": 5,
    },
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written, and each default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest in COLUMNS:
            return f"{action.help} (default: the objective's own)"
        return super()._get_help_string(action) if action.default is not None else action.help


class Parser(HfArgumentParser):
    """argparse, with its errors as one sentence instead of a page of usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message[0].upper() + message[1:].rstrip(".") + ".")


def read_config_file(path: Path) -> dict[str, Any]:
    """Settings from a saved config.yaml, each one checked against its field; unknown names raise UserError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no config {path}; give --config the config.yaml of a run.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the config {path}: {error}; it must be a text file in UTF-8.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number of 5000 digits; brackets too deep
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        reason = f"line {mark.line + 1}: {error.problem}" if mark else " ".join(str(error).split()).split(";")[0]
        raise UserError(f"{path} is not valid YAML ({reason}); write `name: value` lines.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a config: it must be a list of `name: value` lines.")
    types = typing.get_type_hints(Config)
    for name in map(str, values):
        if name not in types:
            try:
                choose(name, types, "knob")
            except UserError as error:
                raise UserError(f"{path}: {error} Mend the line, or remove it if another version wrote it.") from error
    return {str(k): typed(v, types[str(k)], f"{k} in {path}") for k, v in values.items()}


def typed(value: Any, kind: Any, where: str) -> Any:
    """`value` as the field's type; YAML reads 1e-5 as a string, and that is the one case that is converted."""
    kinds = typing.get_args(kind) or (kind,)
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r}; it must be a list.")
        return [typed(item, kinds[0], where) for item in value]
    if value == "auto" and type(None) in kinds and str not in kinds:
        return None
    if (value is None and type(None) in kinds) or type(value) in kinds:
        return value
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise UserError(f"{where} is {value!r}; it must be of type {kinds[0].__name__}.")


def parse_config(argv: list[str], description: str | None = None, **extra: str) -> tuple[Config, dict[str, str | None]]:
    """Read the command line.

    Args:
        argv: the arguments after the program's name.
        description: the command's docstring, for --help.
        extra: further flags of the command, name to help; each one takes a string.
    Returns:
        the run's Config, and the values of the extra flags and of `resume` (the run folder to continue, or None).
    Raises:
        UserError: for unknown names, impossible values and contradictions.
    """
    parser = Parser(Config, description=description, allow_abbrev=False, formatter_class=HelpFormatter)
    for action in parser._actions:
        if action.type is string_to_bool:  # `--mask_truncated` alone is true, as for the other switches
            action.nargs, action.const = "?", True
        if action.dest == "micro_batch_size":
            action.type = number_or_auto
        if action.option_strings[0].startswith("--no_"):
            action.help = f"the same as --{action.dest} false"
    parser.add_argument("--config", help="a saved config.yaml to start from, instead of a preset")
    about = "continue the run in this folder (or in --run_dir) from its newest checkpoint"
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN_DIR", help=about)
    for name, text in extra.items():
        parser.add_argument(f"--{name}", help=text)
    given, unknown = flags_given(parser, argv)
    for name in ("config", "resume", *extra):
        check_text(given.get(name) or "", f"--{name}", path=name != "question")
    if unknown:
        if not unknown[0].startswith(DASHES):
            raise UserError(f"I do not know what to do with {unknown[0]!r}; every setting is a flag, as in --steps 10.")
        flags = [option for action in parser._actions for option in action.option_strings]
        choose(unknown[0].split("=")[0], flags, "flag")
    if given.get("config") == "":
        raise UserError("--config is empty; give it the config.yaml of a run, or leave it out.")
    resume = run_to_resume(given)
    if resume:
        given["run_dir"] = resume
    file = Path(resume, "config.yaml") if resume else Path(given["config"]) if given.get("config") else None
    settings = read_config_file(file) if file else {}
    preset = given.get("preset", settings.get("preset", "gsm8k"))
    if file and preset != settings.get("preset", preset):
        raise UserError(f"{file} was made from the preset {settings['preset']}; leave out --preset {preset}.")
    if not file:
        settings = PRESETS[choose(preset, PRESETS, "preset")]
    elif not resume:
        settings.pop("run_dir", None)  # a re-run gets a folder of its own
    if given.get("objective", settings.get("objective")) != settings.get("objective"):
        settings = {k: v for k, v in settings.items() if k not in COLUMNS}  # another row, and the whole of it
    names = {f.name for f in dataclasses.fields(Config)}
    flags = {name: value for name, value in given.items() if name in names}
    config = Config(**{**settings, "preset": preset, **flags})
    for name in flags if resume else ():
        if name == "model" and flags[name] != settings.get(name):
            raise UserError(
                f"The run in {resume} trains {settings.get(name)}; to begin with another model, or with a checkpoint "
                "of this run, start a new run with --model and without --resume."
            )
        report_change(name, settings.get(name, flags[name]), flags[name])
    return config, {"resume": resume, **{name: given.get(name) for name in extra}}


def run_to_resume(given: dict[str, Any]) -> str | None:
    """The run folder that --resume names, looked at; None without that flag."""
    resume = given.get("resume")
    if resume is None:
        return None
    resume = resume or given.get("run_dir") or ""
    if not resume:
        raise UserError("Say which run to continue: --resume runs/NAME.")
    if given.get("config"):
        raise UserError("--resume takes the config of the run that it continues; leave out --config.")
    if Path(resume, "trainer_state.pt").is_file():
        raise UserError(f"{resume} is a checkpoint; --resume takes the folder of its run: {Path(resume).parent}.")
    if not Path(resume, "config.yaml").is_file():
        raise UserError(f"There is no run to resume in {resume}: it has no config.yaml.")
    if Path(given.get("run_dir", resume)).resolve() != Path(resume).resolve():
        raise UserError(f"--resume goes on in the folder {resume}; leave out --run_dir {given['run_dir']}.")
    return resume


def report_change(name: str, before: Any, after: Any) -> None:
    """Say that a run which is resumed goes on with another setting."""
    if name != "run_dir" and before != after:
        auto = "the objective's own" if name in COLUMNS else "auto"
        before, after = (auto if value is None else value for value in (before, after))
        print(f"changed on resume: {name} from {before} to {after}")


def number_or_auto(text: str) -> int | None:
    """A whole number, or None for auto."""
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise UserError(f"--micro_batch_size is {text!r}; it must be a whole number or auto.")
    return None if text == "auto" else int(text)


def flags_given(parser: Parser, argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Only what stands on the command line, without the defaults, and the arguments that nothing claimed."""
    absent = object()
    blank = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    namespace, unknown = parser.parse_known_args(argv, blank)
    return {name: value for name, value in vars(namespace).items() if value is not absent}, unknown
