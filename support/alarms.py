"""Alarms: what a run that goes wrong looks like in its metrics, and what to change.

Each alarm is a question to the metrics of the steps so far. While its answer is yes, the step's
metrics hold `alarm/NAME` = 1; the sentence is printed, and written to TensorBoard's tab Text, when
that begins. Thresholds and advice are those of the verl guide and of the tutorial where they give
one (KL 0.1, clipped share 30 %, groups without spread 80 %); the others are ours, and none of them
sounds in the demo (`tests/test_alarms.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from support.config import Config

Rows = Sequence[dict[str, float]]  # metrics by name, step after step, the last one is now

LONGEST = 200  # steps that are remembered
FP32_GAP = 0.01  # nats a token, between sampler and trainer, at temperature 1
QUIET = 20  # steps without it after which an alarm is printed again


@dataclass(frozen=True)
class Alarm:
    """A metric, when it is out of bounds (in words and as a function), and what to do then.

    Some alarms compare it with other metrics, which `bad` then gets as further lists.
    """

    metric: str
    when: str
    bad: Callable[..., bool]  # its values so far, the last one is now
    advice: str
    beside: tuple[str, ...] = ()  # the other metrics


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


def before_and_now(values: list[float]) -> tuple[float, float]:
    """The mean of the first 2 of the last 20 steps (of 1, in step 3), and that of the last 2."""
    return fmean(values[-20:-2][:2]), fmean(values[-2:])


def has_collapsed(tokens: list[float], entropy: list[float], success: list[float]) -> bool:
    """Tokens have fallen to half, or entropy to a quarter, and success has not risen by 0.05.

    From 0.9 on it cannot rise much, and a policy that is sure is one that has learned.
    """
    if len(tokens) < 3:
        return False
    (tokens_before, tokens_now), (entropy_before, entropy_now), (before, now) = map(
        before_and_now, (tokens, entropy, success)
    )
    shorter, surer = tokens_now < tokens_before / 2, entropy_now < entropy_before / 4
    return now < min(0.9, before + 0.05) and (shorter or surer)


def has_form_without_content(form: list[float], success: list[float]) -> bool:
    """The reward `format` has risen by 0.3, and success has not by 0.05."""
    if len(form) < 3:
        return False
    (form_before, form_now), (before, now) = before_and_now(form), before_and_now(success)
    return form_now > form_before + 0.3 and now < before + 0.05


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
    "reasoning_collapses": Alarm(
        "rollout/completion_tokens",
        "mean of 2 steps below half of that of up to 20 steps before (or entropy below a quarter), "
        "and success not 0.05 higher, nor above 0.9",
        has_collapsed,
        "Length or entropy of the completions falls fast, and no more of them are right: begin "
        "again. If the reward rises all the same, it is earned without a right answer: look at its "
        "parts and their signs, or reward accuracy alone (--reward accuracy --reward_weights 1). "
        "Else lr is too high: a third of it, or less.",
        ("rollout/entropy", "rollout/success_rate"),
    ),
    "format_alone": Alarm(
        "reward/format_mean",
        "mean of 2 steps 0.3 above that of up to 20 steps before, and success not 0.05 higher",
        has_form_without_content,
        "The format is learned and the answers are not: format is easier to earn. Leave it out "
        "(--reward accuracy --reward_weights 1), and show the format in the prompt, by a worked "
        "example.",
        ("rollout/success_rate",),
    ),
    "accuracy_falls": Alarm(
        "eval/accuracy_high",
        "below eval/accuracy_low of an evaluation before",
        lambda high, low: high[-1] < max(low),
        "Held-out accuracy has fallen, by more than its intervals: go back to an earlier "
        "checkpoint (--model runs/NAME/checkpoint-STEP), with a third of the lr or less.",
        ("eval/accuracy_low",),
    ),
    "copied_prompt": Alarm(
        "rollout/copied_share",
        *above(0.25, 2),
        "More than a quarter of the completions repeat a tagged example of the prompt word for "
        "word: put a worked example with real reasoning into --system_prompt, or none.",
    ),
    "answer_untagged": Alarm(
        "eval/accuracy_flexible",
        "0.25 above eval/accuracy",
        lambda flexible, strict: flexible[-1] > strict[-1] + 0.25,
        "The model is often right without an answer tag, which earns nothing: show the format in "
        "--system_prompt by a worked example, raise max_new_tokens if completions are cut off, or "
        "teach it first (sft.py).",
        ("eval/accuracy",),
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
        f"mean of 3 steps above 0.3; with --precision fp32 above {FP32_GAP}",
        mean_of(3, lambda x: x > 0.3),
        "Sampler and trainer disagree about the sampled tokens: try --precision fp32, or "
        "--sampler_correction token_truncate; in fp32 rounding does not explain it, and something "
        "changes the policy in one of the two only.",
    ),
}


def alarms_for(ratio_level: str, config: Config) -> dict[str, Alarm]:
    """The alarms that mean something under an objective, a sampler and rewards.

    A sequence's ratio has a clip so narrow that most are clipped by design (gspo, luspo); a nucleus
    is a known gap; and who pays for short completions gets them. In fp32 rounding explains little.
    """
    without = set()
    if ratio_level != "token":
        without.add("clipped")
    if config.top_p < 1:
        without.add("sampler")
    if "length_penalty" in config.reward:
        without.add("reasoning_collapses")
    alarms = {name: alarm for name, alarm in ALARMS.items() if name not in without}
    if config.precision == "fp32" and "sampler" in alarms:
        fp32 = mean_of(3, lambda x: x > FP32_GAP / min(1.0, config.temperature))
        alarms["sampler"] = replace(alarms["sampler"], bad=fp32)
    return alarms


def active_alarms(alarms: dict[str, Alarm], rows: Rows) -> list[str]:
    """The alarms that are on at the last of `rows`, by name; each looks at its metrics only."""
    found = []
    for name, alarm in alarms.items():
        names = (alarm.metric, *alarm.beside)
        if rows[-1].keys() >= set(names):
            known = [row for row in rows if row.keys() >= set(names)]
            if alarm.bad(*([row[each] for row in known] for each in names)):
                found.append(name)
    return found
