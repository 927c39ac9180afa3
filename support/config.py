"""Every option of a run: its default, its meaning, its limits; and the presets.

The defaults are the preset `gsm8k`. How options are read from flags and files is in command_line.py
and config_file.py. `python train.py --help` and docs/options.md are made from the text here.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from support.errors import UserError, check_choice, is_text

# A worked example shows what words do not: with it Qwen2.5-Coder-0.5B-Instruct uses the tags from
# the first step on, and reasons in sentences (results/defaults.md has this prompt beside others).
SYSTEM_PROMPT = """\
You solve math problems. Reason step by step inside <think> and </think>, then write the final \
number alone inside <answer> and </answer>.

Example question: Sam has 3 boxes of 12 pens and gives 20 pens away. How many pens does he have \
left?
Example answer:
<think>
3 boxes of 12 pens are 3 * 12 = 36 pens. After giving 20 away, 36 - 20 = 16 pens are left.
</think>
<answer>16</answer>"""
# The same in Chinese.
SYSTEM_PROMPT_ZH = """\
你是解数学题的助手。先在 <think> 和 </think> 之间一步一步地推理，\
再在 <answer> 和 </answer> 之间只写最后的数字。

例题：小明有3盒铅笔，每盒12支。他送给别人20支，还剩多少支？
例题的回答：
<think>
3盒铅笔一共有 3 * 12 = 36 支。送出20支以后，还剩 36 - 20 = 16 支。
</think>
<answer>16</answer>"""
# The tutorial's prompt, in our words. Many models copy `<think> reasoning </think>` as it stands.
TUTORIAL_PROMPT = (
    "You solve math problems. First reason step by step inside <think> and </think>, then give the "
    "final number alone inside <answer> and </answer>, like this: <think> reasoning </think> "
    "<answer> number </answer>"
)
# A number above these is a slip of the keyboard: it would end in an overflow, in NaN or in all of
# the memory.
LARGEST, MOST_SEQUENCES = 10**9, 10**6


class Help(str):
    """The meaning of an option, as --help and the docs print it, and its limits beside it.

    A string, since all that stands in a field's metadata is handed on to argparse.
    """

    limits: dict[str, float]
    of_objective: bool


def option(default: Any, meaning: str, of_objective: bool = False, **limits: float) -> Any:
    """One field of Config.

    Args:
        limits: `at_least` and `at_most`, inclusive; `above`, exclusive; `share`, at most 1.
    """
    help = Help(meaning)
    help.limits, help.of_objective = limits, of_objective
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def objective_option(meaning: str, **limits: float) -> Any:
    """A column of the objective. None is the choice of its row in objectives/table.py."""
    return option(None, meaning, of_objective=True, **limits)


@dataclass(frozen=True)
class Config:
    """One run, complete: saved as config.yaml in its folder, read again by --config and --resume.

    "Tutorial" below is the tiny-grpo tutorial, whose values are the defaults where it is named
    alone; all of its own are the preset `tutorial`. "Paper" is DeepSeekMath, arXiv 2402.03300,
    where GRPO was introduced.
    """

    # The run
    preset: str = option(
        "gsm8k",
        "named settings: gsm8k, gsm8k-24gb, gsm8k-7b-24gb, gsm8k-zh, tutorial, laptop or tiny",
    )
    run_dir: str = option("", "folder for everything the run writes; empty: runs/<preset>-<time>")
    seed: int = option(
        42,
        "every random choice follows from this number (tutorial: 42)",
        at_least=0,
        at_most=2**32 - 1,
    )
    steps: int = option(
        233,
        "rollouts to train for; 233 steps of 32 questions are one pass over GSM8K (tutorial)",
        at_least=1,
    )
    device: str = option(
        "cuda", "cuda, cpu, or auto: cuda, else Apple's GPU (not tried on a Mac), else the CPU"
    )

    # Model
    model: str = option(
        "Qwen/Qwen2.5-0.5B-Instruct", "causal language model: a hub name or a folder (tutorial)"
    )
    precision: str = option(
        "bf16",
        "bf16: fp32 weights, bf16 arithmetic; bf16-pure: weights in bf16 too; fp32; auto: bf16 "
        "where the machine multiplies it fast, else fp32",
    )
    # Adapters learn at ten times the rate of all weights, whatever their rank (command_line.py).
    adapter_rank: int = option(
        0,
        "train LoRA adapters of this rank and freeze the rest, at ten times the lr; 0: none",
        at_least=0,
        at_most=1024,
    )
    adapter_alpha: float = option(32.0, "an adapter is multiplied by alpha / rank", above=0)
    adapter_targets: list[str] = option(
        ["all-linear"], "names of the layers with adapters; all-linear: every linear layer"
    )
    quantize: str = option(
        "none", "4bit: the frozen weights in NF4 (bitsandbytes), with adapters only; or none"
    )
    gradient_checkpointing: bool = option(
        True, "recompute activations in the backward pass: less memory, more time"
    )

    # Questions
    dataset: str = option(
        "openai/gsm8k",
        "a hub name; a file (.jsonl, .parquet, .json, .csv); or a folder with train.* and test.*",
    )
    dataset_config: str = option("main", "the hub dataset's configuration; not used for files")
    question_column: str = option("question", "the dataset's column with the question")
    answer_column: str = option(
        "answer",
        "its column with solution and `#### ` answer; if another than answer, also an answer alone",
    )
    eval_dataset: str = option(
        "", "where the held-out questions are, if not in the dataset's test split"
    )
    system_prompt: str = option(SYSTEM_PROMPT, "first message of every prompt; empty: none")
    prompt_date: str = option(
        "",
        "the day that chat templates print, as 2026-11-25; empty: the day when the run began",
    )
    max_prompt_tokens: int = option(
        512,
        "questions with longer prompts are left out (with max_new_tokens: tutorial's 1024)",
        at_least=1,
    )

    # Rollout
    rollouts_per_step: int = option(32, "questions per step (tutorial)", at_least=1)
    group_size: int = option(
        12,
        "completions per question: what each one is compared with (tutorial; G of the paper)",
        at_least=2,
    )
    max_new_tokens: int = option(
        512, "longest completion, in tokens; the prompt does not count", at_least=1
    )
    temperature: float = option(
        1.0,
        "divides the logits when sampling and when computing log-probabilities (tutorial)",
        at_least=0.01,
        at_most=100,
    )
    top_p: float = option(
        1.0,
        "nucleus of the sampler; below 1 the log-probabilities no longer describe it (tutorial)",
        above=0,
        share=True,
    )
    rollout_batch_size: int = option(
        384, "sequences per call of generate: memory and speed only", at_least=1
    )
    rollout_url: str = option(
        "",
        "a vLLM server that samples in place of generate, as http://localhost:8000, with adapters "
        "only (docs/served.md); empty: none",
    )
    rollout_timeout: float = option(
        600.0, "seconds that this server may take for one answer, a call's completions", above=0
    )

    # Reward
    reward: list[str] = option(
        ["accuracy"],
        "accuracy, format, length_penalty, soft_overlong, repetition, tutorial (reward.py); "
        "my_file.py:my_function; or model:NAME, a reward model; summed",
    )
    reward_weights: list[float] = option([1.0], "one weight for each reward")
    reward_timeout: float = option(
        60.0,
        "seconds that a reward may take for the completions of a step; 0: any time",
        at_least=0,
    )

    # Objective: the row, and, where it is not to be the row's own choice, each of its columns
    objective: str = option("grpo", "the method, a row of objectives/table.py")
    advantage: str | None = objective_option(
        "what a reward is compared with in its group (leave-one-out: RLOO)"
    )
    advantage_std: str | None = objective_option(
        "divide advantages by the std of the rewards of this"
    )
    multi_objective_aggregation: str | None = objective_option(
        "several rewards: add them up and compare, or compare each and add up (GDPO)"
    )
    relative_reward_weight: float | None = objective_option(
        "weight of the reward compared with its group (grpo: 1)", at_least=0
    )
    baseline_reward_weight: float | None = objective_option(
        "weight of the completion's own reward, added to that; not of its group's mean (grpo: 0)",
        at_least=0,
    )
    whiten_advantages: bool | None = objective_option(
        "at last give the advantages mean 0 and std 1 over the rollout"
    )
    ratio_level: str | None = objective_option(
        "ratio of each token, or of the whole sequence (GSPO)"
    )
    surrogate: str | None = objective_option("policy term")
    clip_eps: float | None = objective_option(
        "the ratio is clipped to 1 ± clip_eps (grpo: 0.2, tutorial; epsilon of the paper)", above=0
    )
    clip_eps_high: float | None = objective_option(
        "upper side of the clip, if it differs (dapo: 0.28)", at_least=0
    )
    clip_ratio_c: float | None = objective_option(
        "dual clip: a bad completion's ratio counts up to this (verl: 3; TRL's delta)", above=0
    )
    loss_agg_mode: str | None = objective_option("mean over tokens")
    loss_scale_factor: float | None = objective_option(
        "constant of seq-mean-token-sum-norm (dr_grpo: max_new_tokens)", above=0
    )
    kl_weight: float | None = objective_option(
        "weight of the KL to the frozen reference; 0: none (grpo: 0.01, tutorial; beta)", at_least=0
    )
    kl_estimator: str | None = objective_option(
        "k1, abs, k2, k3 (grpo), each with + for k2's gradient; k3-ratio; full (exact)"
    )
    kl_in_reward: bool | None = objective_option(
        "subtract the KL from the reward, instead of adding it to the loss"
    )
    entropy_weight: float | None = objective_option("bonus for entropy, per nat", at_least=0)
    entropy_target: float | None = objective_option(
        "makes the bonus adaptive: it grows while the entropy is below this many nats", at_least=0
    )
    top_entropy: float | None = objective_option(
        "share of tokens that is trained, those of most entropy (2506.01939: 0.2)",
        above=0,
        share=True,
    )
    dynamic_sampling: int | None = objective_option(
        "rollouts that a step may make to replace groups of equal rewards; 1: none (dapo: 10)",
        at_least=1,
    )
    mask_truncated: bool | None = objective_option(
        "do not train on completions cut off by max_new_tokens (dapo)"
    )
    sampler_correction: str | None = objective_option(
        "importance weights for a sampler that differs"
    )
    sampler_cap: float | None = objective_option("the largest such weight (TRL: 3)", at_least=1)

    # Optimization
    # Every optimizer step moves each weight by about lr, whatever the gradient (Adam), and what a
    # rollout may move is lr × its optimizer steps. Measured with one step a rollout: 2e-6 learns,
    # 1e-5 ruins the model in eight steps (results/defaults.md). The tutorial's 24 steps of 5e-6
    # work with its bf16 weights, which round most of each step away.
    train_batch_size: int = option(
        96, "sequences per optimizer step: 4 steps for each rollout (tutorial: 16)", at_least=1
    )
    micro_batch_size: int | None = option(
        16,
        "sequences per forward pass (auto: train_batch_size), halved if a GPU's memory is full; "
        "never the mathematics",
        at_least=1,
    )
    epochs_per_step: int = option(1, "passes over each rollout (tutorial)", at_least=1)
    optimizer: str = option(
        "adamw", "adamw, or adamw_8bit (bitsandbytes: a quarter of the optimizer's memory)"
    )
    lr: float = option(
        1e-6,
        "learning rate, constant after the warm-up (verl's for GSM8K; tutorial: 5e-6)",
        above=0,
        at_most=1,
    )
    warmup_steps: int = option(
        10,
        "steps over which the learning rate rises from 0 (tutorial: 0, with bf16 weights)",
        at_least=0,
    )
    weight_decay: float = option(
        0.0, "decoupled weight decay of AdamW (tutorial: plain Adam)", at_least=0
    )
    max_norm: float = option(1.0, "gradients are clipped to this norm (tutorial)", above=0)
    max_skipped_steps: int = option(
        10,
        "optimizer steps in a row without a finite loss and gradient after which the run stops; 0: "
        "it never does",
        at_least=0,
    )

    # Evaluation, checkpoints, logging
    eval_interval: int = option(
        50,
        "steps between evaluations, besides the first and the last; 0: never evaluate",
        at_least=0,
    )
    eval_questions: int = option(
        0, "how many of the held-out questions to evaluate on; 0: all", at_least=0
    )
    eval_samples: int = option(
        0, "samples per held-out question for pass@k; 0: greedy accuracy only", at_least=0
    )
    checkpoint_interval: int = option(
        20,
        "steps between checkpoints, besides the last; 0: none, not even the last (tutorial)",
        at_least=0,
    )
    keep_checkpoints: int = option(3, "how many of the newest checkpoints to keep", at_least=1)
    keep_best: bool = option(
        False,
        "keep the checkpoint with the best held-out accuracy too; it is saved when it is evaluated",
    )
    log_completions: int = option(
        4,
        "samples that are kept each step, a group's best and worst, in turn: as pages in "
        "TensorBoard, and with all numbers of their tokens for report.py; 0: none",
        at_least=0,
    )

    def __post_init__(self) -> None:
        for name in ("run_dir", "model", "dataset", "eval_dataset"):
            check_text(getattr(self, name), f"--{name}", path=True)
        for name in ("dataset_config", "question_column", "answer_column", "system_prompt"):
            check_text(getattr(self, name), f"--{name}")
        if not self.prompt_date:
            object.__setattr__(self, "prompt_date", date.today().isoformat())
        try:
            date.fromisoformat(self.prompt_date)
        except ValueError as error:
            raise UserError(
                f"--prompt_date is {self.prompt_date!r}; write a day as 2026-11-25."
            ) from error
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise UserError(f"--{name} is empty; give it a folder or a hub name.")
        check_choice(self.preset, PRESETS, "preset")
        check_choice(self.device, ("auto", "cuda", "cpu"), "device")
        check_choice(self.precision, ("bf16", "bf16-pure", "fp32", "auto"), "precision")
        if self.precision == "auto":
            fast = multiplies_bf16_fast(self.device)
            object.__setattr__(self, "precision", "bf16" if fast else "fp32")
        check_choice(self.optimizer, ("adamw", "adamw_8bit"), "optimizer")
        for described in dataclasses.fields(self):
            value, limits = getattr(self, described.name), described.metadata["help"].limits
            if value is not None and limits:
                check_number(described.name, value, **limits)
        self.check_rewards()
        self.check_sizes()
        self.check_adapters()
        self.check_server()

    def check_rewards(self) -> None:
        """UserError for rewards without weights, or weights that are none."""
        if not self.reward:
            raise UserError(
                "--reward is empty; give it one name at least, as in --reward accuracy."
            )
        for name in self.reward:
            check_text(name, "--reward", path=True)
        if len(self.reward) != len(self.reward_weights):
            raise UserError(
                f"--reward has {len(self.reward)} names and --reward_weights "
                f"{len(self.reward_weights)} numbers; give --reward_weights one number for each of "
                "--reward."
            )
        if not all(map(math.isfinite, self.reward_weights)):
            raise UserError(
                f"--reward_weights are {self.reward_weights}; each must be a finite number."
            )
        if not 0 < max(map(abs, self.reward_weights)) <= LARGEST:
            raise UserError(
                f"--reward_weights are {self.reward_weights}; one must not be 0, none above "
                f"{LARGEST}."
            )

    def check_sizes(self) -> None:
        """UserError for sizes that do not go together."""
        if self.train_batch_size > self.sequences_per_step:
            raise UserError(
                f"--train_batch_size {self.train_batch_size} is larger than the "
                f"{self.sequences_per_step} sequences of a rollout (rollouts_per_step × "
                "group_size); make it smaller or sample more."
            )
        if self.keep_best and not self.eval_interval:
            raise UserError(
                "--keep_best compares evaluations, and there are none; give --eval_interval, or "
                "leave it out."
            )
        if self.sequences_per_step > MOST_SEQUENCES:
            raise UserError(
                f"--rollouts_per_step {self.rollouts_per_step} × --group_size {self.group_size} is "
                f"more than {MOST_SEQUENCES} sequences in one rollout; make one of them smaller."
            )

    def check_adapters(self) -> None:
        """UserError for settings of adapters that do not go together."""
        check_choice(self.quantize, ("none", "4bit"), "quantize")
        if self.quantize != "none" and not self.adapter_rank:
            raise UserError(
                "--quantize 4bit freezes the weights, so nothing would be trained; give "
                "--adapter_rank 16, or --quantize none."
            )
        if not all(self.adapter_targets) or not self.adapter_targets:
            raise UserError("--adapter_targets is empty; name a layer, or leave it out.")
        for name in self.adapter_targets:
            check_text(name, "--adapter_targets")
        if self.adapter_targets != ["all-linear"] and not self.adapter_rank:
            raise UserError(
                "--adapter_targets names layers for adapters, and there are none; give "
                "--adapter_rank 16 too, or leave it out."
            )

    def check_server(self) -> None:
        """UserError for a rollout server that cannot be one, or cannot have the weights."""
        check_text(self.rollout_url, "--rollout_url")
        if self.rollout_url and not is_url(self.rollout_url):
            raise UserError(
                f"--rollout_url is {self.rollout_url!r}; write the address of a server, as "
                "http://localhost:8000."
            )
        if self.rollout_url and not self.adapter_rank:
            raise UserError(
                "--rollout_url needs adapters, which alone are handed over to the server at each "
                "step; give --adapter_rank 16, or leave out --rollout_url."
            )
        if self.rollout_url and self.quantize != "none":
            raise UserError(
                "--rollout_url samples from the base model as it is, and --quantize 4bit trains "
                "beside one that is rounded to 4 bits; leave out one of the two."
            )

    @property
    def sequences_per_step(self) -> int:
        """Completions in one rollout."""
        return self.rollouts_per_step * self.group_size

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of one rollout. The last of an epoch may be smaller; none is dropped."""
        return self.epochs_per_step * math.ceil(self.sequences_per_step / self.train_batch_size)

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass as a run begins; `auto` is all that an optimizer step has."""
        return min(self.micro_batch_size or self.train_batch_size, self.train_batch_size)

    @property
    def arithmetic(self) -> str:
        """The sizes of one step, in a sentence."""
        micro = math.ceil(self.train_batch_size / self.micro_batch)
        epochs = f" in {self.epochs_per_step} epochs" if self.epochs_per_step > 1 else ""
        steps = f"{self.optimizer_steps} optimizer {plural(self.optimizer_steps, 'step')}"
        pieces = f"{micro} micro-{plural(micro, 'batch', 'batches')} of {self.micro_batch}"
        return (
            f"{self.rollouts_per_step} questions × {self.group_size} completions = "
            f"{self.sequences_per_step} sequences; {steps} of {self.train_batch_size}{epochs} in "
            f"{pieces}"
        )

    @property
    def sampling_precision(self) -> str:
        """For a command that only samples: no fp32 weights where the arithmetic is bf16."""
        return "fp32" if self.precision == "fp32" else "bf16-pure"

    def save(self, path: Path) -> None:
        """Write the config as YAML; a file that is there stays whole if the disk is full."""
        partial = path.with_suffix(".partial")
        try:
            text = yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


# The options that are columns of the objective.
OBJECTIVE_COLUMNS = {
    described.name
    for described in dataclasses.fields(Config)
    if described.metadata["help"].of_objective
}

PRESETS: dict[str, dict[str, Any]] = {
    "gsm8k": {},
    # fp32 weights, gradients and Adam of a 0.5B model take 8 GB, the reference 2 GB and the bf16
    # copy that samples 1 GB; the rest is the rollout's cache, or the activations and one piece of
    # logits.
    "gsm8k-24gb": {"rollout_batch_size": 128},
    # A 7B model on the same card: its weights in 4 bits and adapters beside them (docs/memory.md).
    "gsm8k-7b-24gb": {
        "model": "Qwen/Qwen2.5-7B-Instruct",
        "adapter_rank": 16,
        "quantize": "4bit",
        "rollout_batch_size": 64,
        "micro_batch_size": 8,
        "lr": 1e-5,
    },
    # The Chinese GSM8K: the same questions, translated; `answer_only` has the final answer.
    "gsm8k-zh": {
        "dataset": "swulling/gsm8k_chinese",
        "dataset_config": "default",
        "question_column": "question_zh-cn",
        "system_prompt": SYSTEM_PROMPT_ZH,
    },
    # The tiny-grpo tutorial as it is. What its prompt and reward do is in results/defaults.md.
    "tutorial": {
        "precision": "bf16-pure",
        "system_prompt": TUTORIAL_PROMPT,
        "reward": ["tutorial"],
        "train_batch_size": 16,
        "lr": 5e-6,
        "warmup_steps": 0,
    },
    # A pretrained model on a CPU, in half an hour at most: few and short completions, one optimizer
    # step for each rollout, and no KL, so no reference. What it does is in results/defaults.md.
    "laptop": {
        "steps": 18,
        "device": "auto",
        "precision": "auto",
        "gradient_checkpointing": False,
        "dataset": "tiny/task",
        "rollouts_per_step": 6,
        "group_size": 8,
        "max_new_tokens": 128,
        "rollout_batch_size": 100,
        "kl_weight": 0.0,
        "train_batch_size": 48,
        "micro_batch_size": 8,
        "lr": 2e-6,
        "warmup_steps": 2,
        "eval_interval": 6,
        "eval_questions": 200,
    },
    # From trials over lr (1e-5 … 4e-4): 3e-5 climbs in 40 steps without a setback; from 2e-4 on the
    # sampled accuracy falls back after its first peak.
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
        "kl_weight": 0.0,
        "train_batch_size": 256,
        "micro_batch_size": 128,
        "lr": 3e-5,
        "warmup_steps": 0,
        "eval_interval": 5,
    },
}


def multiplies_bf16_fast(device: str) -> bool:
    """Whether a GPU, or without one this CPU, has instructions for products in bf16.

    Without them a CPU is several times slower in bf16 than in fp32.
    """
    import torch  # not at the top: this file is read by those who need no torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def plural(count: int, one: str, many: str = "") -> str:
    """`one` or `many`, as `count` asks for."""
    return one if count == 1 else many or one + "s"


def check_number(
    name: str,
    value: float,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float = LARGEST,
    share: bool = False,
) -> None:
    """UserError for a number outside the limits of its option."""
    if at_least is not None and not (math.isfinite(value) and value >= at_least):
        raise UserError(f"--{name} is {value}; it must be {at_least} or more.")
    if above is not None and not (math.isfinite(value) and value > above):
        raise UserError(f"--{name} is {value}; it must be more than {above}.")
    if share and value > 1:
        raise UserError(f"--{name} is {value}; it is a share, so choose a number in (0, 1].")
    if value > at_most:
        raise UserError(f"--{name} is {value}; it must be {at_most} or less.")


def is_url(text: str) -> bool:
    """Whether a text is the address of a server: http or https, a host, perhaps a port."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False


def check_text(text: str, where: str, path: bool = False) -> None:
    """UserError for text that cannot be written down or, as a `path`, that no file system takes."""
    if "\0" in text or not is_text(text):
        raise UserError(
            f"{where} is {text[:80]!r}, with a character that is not text; type it again, in UTF-8."
        )
    if not path:
        return
    if text and not text.strip():
        raise UserError(
            f"{where} is {text!r}: a name of spaces only; write a name, or leave it out."
        )
    if len(text.encode()) > 4000 or max(len(part.encode()) for part in text.split("/")) > 255:
        raise UserError(
            f"{where} is {text[:80]!r}… and longer than a file name can be; write a shorter one."
        )
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{where} is {text!r}, but there is no such user; write the folder out."
        ) from error


def resolve_path(name: str) -> str:
    """`name`; or, of a bundled folder (`tiny/model`, `tiny/task`), the place where it is."""
    bundled = Path(__file__).parent.parent / name
    return str(bundled) if name and not Path(name).exists() and bundled.exists() else name


def check_place(name: str, option: str) -> None:
    """UserError for what can only be a folder or a file, and is not there."""
    no_hub_name = name.startswith(("runs/", ".", "/", "~"))
    if no_hub_name and not Path(resolve_path(name)).expanduser().exists():
        raise UserError(
            f"There is no folder {name}; give {option} a folder that is there, or a hub name."
        )
