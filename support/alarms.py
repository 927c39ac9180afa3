"""Alarms: what a run that goes wrong looks like in its metrics, and what to change.

Each alarm is a question to the metrics of the steps so far. While its answer is yes, the step's
metrics hold `alarm/NAME` = 1; the sentence is printed, and written to TensorBoard's tab Text, when
that begins. Thresholds and advice are those of the verl guide and of the tutorial where they give
one (KL 0.1, clipped share 30 %, groups without spread 80 %); the others are ours, and none of them
sounds in the demo (`tests/test_alarms.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

Rows = Sequence[dict[str, float]]  # metrics by name, step after step, the last one is now

LONGEST = 200  # steps that are remembered
QUIET = 20  # steps without it after which an alarm is printed again


@dataclass(frozen=True)
class Alarm:
    """A metric, when it is out of bounds (in words and as a function), and what to do then."""

    metric: str
    when: str
    bad: Callable[[list[float]], bool]  # its values so far, the last one is now
    advice: str


def mean_of(count: int, bad: Callable[[float], bool]) -> Callable[[list[float]], bool]:
    """Whether the mean of the last `count` values is bad."""
    return lambda values: len(values) >= count and bad(fmean(values[-count:]))


def above(limit: float, count: int) -> tuple[str, Callable[[list[float]], bool]]:
    """The mean of the last `count` values is above `limit`: in words, and as a function."""
    return f"mean of {count} steps above {limit}", mean_of(count, lambda x: x > limit)


def has_fallen(values: list[float]) -> bool:
    """The mean of 10 steps is a fifth below the best 5 before, by more than their noise explains.

    The noise is that of neighbouring steps, which a slow rise or a single fall hardly changes. 6
    standard errors, since the best of many means is compared, and since a policy that changes makes
    neighbours alike.
    """
    now, before = values[-10:], values[:-10]
    if len(before) < 5:
        return False
    best = max(fmean(before[i : i + 5]) for i in range(len(before) - 4))
    noise = fmean((b - a) ** 2 / 2 for a, b in zip(values, values[1:], strict=False))
    fall = best - fmean(now)
    return fall > max(0.2 * abs(best), 6 * math.sqrt(noise * (1 / 5 + 1 / 10)))


def has_stayed_flat(values: list[float]) -> bool:
    """From step 100 on: the mean of 20 steps is not above that of the first 20, beyond noise.

    2 standard errors. Once the first steps are forgotten there is nothing to compare with.
    """
    if not 100 <= len(values) < LONGEST:
        return False
    noise = fmean((b - a) ** 2 / 2 for a, b in zip(values, values[1:], strict=False))
    return fmean(values[-20:]) - fmean(values[:20]) <= 2 * math.sqrt(noise * 2 / 20)


def has_collapsed(values: list[float]) -> bool:
    """The mean of 5 steps is below a third of what it was 20 steps before."""
    return len(values) >= 25 and fmean(values[-5:]) < fmean(values[-25:-20]) / 3


def has_exploded(values: list[float]) -> bool:
    """The mean of 5 steps is more than four times what it was 20 steps before."""
    return len(values) >= 25 and fmean(values[-5:]) > 4 * fmean(values[-25:-20])


def has_jumped(values: list[float]) -> bool:
    """Three values in a row are ten times as large as nine in ten of the 50 before them."""
    before = sorted(values[-53:-3])
    return len(before) >= 10 and min(values[-3:]) > 10 * before[int(0.9 * len(before))] > 0


ALARMS = {
    "kl": Alarm(
        "train/kl_divergence",
        *above(0.1, 3),
        "The policy is far from the reference (KL above 0.1): raise kl_weight or lower lr.",
    ),
    "clipped": Alarm(
        "train/clipped_share",
        *above(0.3, 3),
        "More than 30 % of the tokens are clipped and teach nothing: lower lr or epochs_per_step.",
    ),
    "ratio": Alarm(
        "train/ratio_mean",
        "mean of 3 steps not within 0.9 … 1.1",
        mean_of(3, lambda x: abs(x - 1) > 0.1),
        "New and old policy differ by more than 10 % on the average token: lower lr or "
        "epochs_per_step, or raise train_batch_size.",
    ),
    "no_spread": Alarm(
        "rollout/no_spread_share",
        *above(0.8, 5),
        "More than 80 % of the groups have equal rewards and teach nothing. If most answers are "
        "wrong: easier questions, a warm start (sft.py) or a finer reward; if most are right: "
        "harder questions. In both cases a larger group_size, a higher temperature, or "
        "--dynamic_sampling 10.",
    ),
    "truncated": Alarm(
        "rollout/truncated_share",
        *above(0.9, 3),
        "Nearly every completion is cut off before its end: raise max_new_tokens, or see in the "
        "samples whether the model ever stops (a base model may need sft.py first).",
    ),
    "reward_falls": Alarm(
        "rollout/returns",
        "mean of 10 steps a fifth below the best 5 before, beyond noise",
        has_fallen,
        "The reward has fallen by a fifth or more from its best: start again from an earlier "
        "checkpoint (--model runs/NAME/checkpoint-STEP) with a lower lr or a higher kl_weight.",
    ),
    "reward_flat": Alarm(
        "rollout/returns",
        "from step 100: mean of 20 steps not above that of the first 20, beyond noise",
        has_stayed_flat,
        "The reward has not risen since the run began. Read the samples: if no answer is right, "
        "easier questions or a warm start (sft.py); if nearly all are, harder questions; else a "
        "higher lr or a larger group_size.",
    ),
    "length_explodes": Alarm(
        "rollout/completion_tokens",
        "mean of 5 steps above 4 times that of 20 steps before",
        has_exploded,
        "Completions are four times as long as 20 steps ago: read the samples; add the reward "
        "soft_overlong or length_penalty, or take an objective without the length bias (dr_grpo, "
        "dapo).",
    ),
    "length_collapses": Alarm(
        "rollout/completion_tokens",
        "mean of 5 steps below a third of that of 20 steps before",
        has_collapsed,
        "Completions are a third as long as 20 steps ago: read the samples, a part of the reward "
        "may be had without an answer (lower its reward_weights); else lower lr or raise "
        "warmup_steps.",
    ),
    "gradient": Alarm(
        "train/grad_norm",
        "3 steps above 10 times nine in ten of 50 before",
        has_jumped,
        "The gradient norm is ten times its usual: lower lr or max_norm, and look for extreme "
        "rewards.",
    ),
    "skipped": Alarm(
        "train/skipped_steps",
        "any",
        mean_of(1, lambda x: x > 0),
        "Optimizer steps were skipped because the loss or a gradient was not finite: lower lr; "
        "with bf16 try --precision fp32.",
    ),
    "unscored": Alarm(
        "rollout/unscored_share",
        *above(0.5, 3),
        "More than half of the scores are None: see whether the reward functions find what they "
        "look for.",
    ),
    "sampler": Alarm(
        "train/sampler_gap",
        *above(0.3, 3),
        "Sampler and trainer disagree about the sampled tokens: try --precision fp32, or "
        "--sampler_correction token_truncate.",
    ),
}


def alarms_for(ratio_level: str, top_p: float) -> dict[str, Alarm]:
    """The alarms that mean something under an objective and a sampler.

    A sequence's ratio has a clip so narrow that most are clipped by design (gspo, luspo); a nucleus
    is a known gap.
    """
    without = set()
    if ratio_level != "token":
        without.add("clipped")
    if top_p < 1:
        without.add("sampler")
    return {name: alarm for name, alarm in ALARMS.items() if name not in without}


def active_alarms(alarms: dict[str, Alarm], rows: Rows) -> list[str]:
    """The alarms that are on at the last of `rows`, by name; each looks at its metric only."""
    found = []
    for name, alarm in alarms.items():
        values = [row[alarm.metric] for row in rows if alarm.metric in row]
        if alarm.metric in rows[-1] and alarm.bad(values):
            found.append(name)
    return found
