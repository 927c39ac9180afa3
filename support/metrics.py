"""Every metric: its name, its meaning, its chart, and the sums it is made of.

A metric is added up where its number is born, as (sum, count); a step's value is sum / count. A
name that is not explained here is refused.
"""

import re
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from support.alarms import ALARMS
from support.answers import is_correct
from support.distributed import exchange

Number = Tensor | float
Metrics = dict[str, tuple[Number, Number]]  # name: (sum, count)

EXAMPLE = re.compile(r"<(\w+)>(.*?)</\1>", re.DOTALL)  # <think> reasoning </think>

OTHER_QUESTIONS = "eval/other_questions"

GLOSSARY = {
    "train/loss": (
        "The loss. With the paper's mean over sequences and one optimizer step per rollout it is "
        "near 0 (plus kl_weight × KL) at every step, because the advantages of a group add up to "
        "0: watch the returns, not this."
    ),
    "train/kl_divergence": (
        "How far the policy has moved from the reference, nats per token, by the objective's "
        "kl_estimator. Healthy: below 0.1. If it runs away: raise kl_weight or lower lr."
    ),
    "train/grad_norm": (
        "Norm of the gradient before clipping to max_norm. Single spikes are normal, a steady rise "
        "not."
    ),
    "train/ratio_mean": (
        "Mean of new/old probability of the trained tokens (without a KL, completions whose "
        "advantage is 0 are not trained, nor counted in the metrics of train/). Healthy: within a "
        "few percent of 1."
    ),
    "train/clipped_share": (
        "Share of tokens whose ratio was clipped and which taught nothing. Healthy: below 0.3; "
        "above that, lower lr or epochs_per_step (not gspo and luspo, whose narrow clip takes most "
        "tokens by design). Always 0 with one optimizer step per rollout."
    ),
    "train/entropy": (
        "Mean entropy of the trained tokens' distributions, nats. A slow fall is learning; a drop "
        "to 0 is collapse."
    ),
    "train/sampler_gap": (
        "Mean distance between the log-probability that a token was sampled with and the trainer's "
        "own, nats. Healthy: rounding (1e-6 in fp32, a few hundredths in bf16). More: sampler and "
        "trainer disagree."
    ),
    "train/lr": "The learning rate.",
    "train/skipped_steps": (
        "Optimizer steps left out because the loss or a gradient was not finite. Healthy: 0."
    ),
    "rollout/returns": (
        "Mean reward of the sampled completions (less the KL, with kl_in_reward): the curve that "
        "should rise."
    ),
    "rollout/returns_std": (
        "Standard deviation of the rewards over the whole rollout (with dynamic sampling: the mean "
        "over its rollouts)."
    ),
    "rollout/success_rate": (
        "Share of sampled completions whose <answer> is right (training questions, sampled)."
    ),
    "rollout/success_easy": "The same on the third of the questions with the shortest solutions.",
    "rollout/success_middle": "The same on the middle third.",
    "rollout/success_hard": "The same on the third with the most solution steps.",
    "rollout/completion_tokens": "Mean length of the completions, end token included.",
    "rollout/entropy": (
        "Entropy of the sampler over all sampled tokens, nats: minus their mean log-probability. "
        "Unlike train/entropy it does not depend on which completions are trained."
    ),
    "rollout/tokens_right": "Mean length of the completions that are right.",
    "rollout/tokens_wrong": (
        "Mean length of those that are not. Growing while the right ones do not: the length bias."
    ),
    "rollout/rounds": (
        "Rollouts that dynamic sampling made in this step; the completions of each are paid for."
    ),
    "rollout/alarms": "How many alarms are on; which, and what to do then, is in the tab Text.",
    "rollout/idle_groups": "Groups without spread that dynamic sampling could not replace.",
    "rollout/truncated_share": (
        "Share of completions cut off by max_new_tokens. If it grows, so should the budget."
    ),
    "rollout/copied_share": (
        "Share of completions that repeat, word for word, an example of their prompt that stands "
        "between tags, as `<think> reasoning </think>`. Healthy: below 0.25."
    ),
    "rollout/unscored_share": (
        "Share of the scores that are None: a reward function could not score the completion."
    ),
    "rollout/no_spread_share": (
        "Share of groups whose rewards are all equal: they teach nothing. Above 0.8, the questions "
        "are too hard, too easy, or the reward too coarse."
    ),
    "rollout/group_baseline_std": (
        "Spread of the groups' mean rewards: how much the questions differ in difficulty."
    ),
    "rollout/group_baseline": (
        "Mean over groups of the group's mean reward, which each completion is compared with."
    ),
    "rollout/advantage_mean": (
        "Mean advantage. 0 by construction where rewards are compared with their group's mean."
    ),
    "rollout/advantage_std": (
        "Standard deviation of the advantages. Divided by the group's std it is √((G - 1) / G) at "
        "the most (0.94 for groups of 8), since that std divides by G - 1; lower by the groups "
        "without spread."
    ),
    "eval/accuracy": (
        "Greedy accuracy on held-out questions, strict: the <answer> tag holds the reference."
    ),
    "eval/accuracy_low": "Lower end of its 95 % interval (Wilson).",
    "eval/accuracy_high": "Upper end of its 95 % interval (Wilson).",
    "eval/accuracy_flexible": "The same, but without a tag the last number counts.",
    "eval/completion_tokens": "Mean length of the greedy completions.",
    "eval/truncated_share": "Share of the greedy completions cut off by max_new_tokens.",
    OTHER_QUESTIONS: (
        "1 in the step from which on other held-out questions were asked (changed on resume): "
        "accuracies before and after it cannot be compared."
    ),
    "eval/sampled_accuracy": "Share of the sampled completions that are right, strict: pass@1.",
    "eval/pass_at_k": (
        "Share of held-out questions with at least one right answer in eval_samples samples."
    ),
    "time/rollout": "Seconds to sample the completions.",
    "time/log_probs": (
        "Seconds for the log-probabilities of the policy that sampled and of the reference."
    ),
    "time/update": "Seconds for the gradient steps.",
    "time/step": "Seconds for the whole step, without evaluation and checkpoint.",
    "time/evaluate": "Seconds for the evaluation.",
    "perf/tokens_per_second": "Completion tokens sampled per second of rollout.",
    "perf/peak_memory_gb": (
        "Peak memory so far: of the GPU where there is one, of the process otherwise."
    ),
}
GLOSSARY |= {
    f"alarm/{name}": f"1 while this alarm is on. {alarm.advice}" for name, alarm in ALARMS.items()
}
REWARD_MEANING = {
    "mean": "Mean of the reward {}.",
    "std": "Standard deviation of the reward {} over the rollout.",
}


# The tab "Custom Scalars": three questions, each chart with the answer of a healthy run in its
# title. A chart has one metric, since TensorBoard gives all metrics of a run one colour.
CHARTS: dict[str, dict[str, str]] = {
    "Is it learning?": {
        "held-out accuracy, greedy, with its 95 % interval: rises": "eval/accuracy",
        "reward of the samples: rises": "rollout/returns",
        "success of easy questions: rises first": "rollout/success_easy",
        "success of middle questions: rises": "rollout/success_middle",
        "success of hard questions: rises last": "rollout/success_hard",
        "tokens in a completion: may rise (longer reasoning), not explode": (
            "rollout/completion_tokens"
        ),
        "tokens in a right completion": "rollout/tokens_right",
        "tokens in a wrong one: does not grow alone": "rollout/tokens_wrong",
    },
    "Is it healthy?": {
        "alarms that are on (what to do then is in the tab Text): 0": "rollout/alarms",
        "KL to the reference: below 0.1": "train/kl_divergence",
        "groups without spread: below 0.8": "rollout/no_spread_share",
        "truncated completions: few": "rollout/truncated_share",
        "completions that copy the prompt's example: few": "rollout/copied_share",
        "clipped tokens: below 0.3": "train/clipped_share",
        "entropy: falls slowly, never to 0": "train/entropy",
        "gradient norm: no steady rise": "train/grad_norm",
        "new/old probability: near 1": "train/ratio_mean",
        "gap between sampler and trainer: rounding": "train/sampler_gap",
        "skipped steps: 0": "train/skipped_steps",
    },
    "Where does the time go?": {
        "seconds of a step": "time/step",
        "seconds of the rollout": "time/rollout",
        "seconds of the log-probabilities before the update": "time/log_probs",
        "seconds of the update": "time/update",
        "tokens per second of rollout": "perf/tokens_per_second",
    },
}


SOMETIMES = ("rollout/tokens_right", "rollout/tokens_wrong")  # perhaps not in the first step


def charts_of(names: set[str]) -> dict[str, dict[str, list]]:
    """The charts of metrics that a run has, as TensorBoard's custom scalars."""
    interval = ["eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"]
    layout = {}
    for question, charts in CHARTS.items():
        layout[question] = {
            title: ["Margin", interval] if name == interval[0] else ["Multiline", [f"^{name}$"]]
            for title, name in charts.items()
            if name in names
        }
    return layout


def meaning(name: str) -> str:
    """What a metric means; KeyError for a name that nobody has explained."""
    if name.startswith("reward/"):
        reward, _, statistic = name.removeprefix("reward/").rpartition("_")
        return REWARD_MEANING[statistic].format(reward)
    if name.startswith("logged/"):
        return "logged by a reward function of yours, through log_metric"
    return GLOSSARY[name]


# ------------------------------------------------------------------------- what a rollout is like


def spread(mean_name: str, std_name: str, values: Tensor) -> Metrics:
    """The mean and the standard deviation (of the population) of `values`, without NaN."""
    values = values[~values.isnan()]
    count = len(values)
    if not count:
        return {}
    return {
        mean_name: (values.sum(), count),
        std_name: (values.std(correction=0) * count, count),
    }


def of_rollout(groups: list[Any], seconds: float) -> Metrics:
    """Of the completions of groups, sampled in so many seconds."""
    completions = [completion for group in groups for completion in group.completions]
    count, tokens = len(completions), sum(len(c.ids) for c in completions)
    found = {
        "rollout/completion_tokens": (tokens, count),
        "rollout/truncated_share": (sum(c.truncated for c in completions), count),
        "rollout/entropy": (-sum(sum(c.log_probs) for c in completions), tokens),
        "perf/tokens_per_second": (tokens, seconds),
    }
    copied = [each for group in groups for each in copies_of_examples(group)]
    return found | ({"rollout/copied_share": (sum(copied), len(copied))} if copied else {})


def copies_of_examples(group: Any) -> list[bool]:
    """Whether each completion repeats an example of its prompt, spaces aside; [] without examples.

    What stands in an <answer> tag, or a number in another one, is an answer like others.
    """
    question = group.question
    found = [m for m in EXAMPLE.finditer(question.prompt) if m[1] != "answer" and has_letter(m[2])]
    examples = {"".join(match[0].split()) for match in found}
    texts = ["".join((question.opened + c.text).split()) for c in group.completions]
    return [any(each in text for each in examples) for text in texts] if examples else []


def has_letter(text: str) -> bool:
    """Whether a text has a letter, of any script."""
    return any(map(str.isalpha, text))


def of_rewards(groups: list[Any], functions: dict[str, Any]) -> Metrics:
    """Of scored groups: each reward by name, what it has logged, and the share of right answers."""
    found: Metrics = {}
    rewards = torch.cat([group.rewards for group in groups], dim=1)
    own = [getattr(function, "logged", {}) for function in functions.values()]
    every: dict[str, list[float]] = {}
    for logged in chain.from_iterable(exchange(lambda: own)):  # of all processes
        for name, some in logged.items():
            every.setdefault(f"logged/{name}", []).extend(some)
    found |= {name: (sum(each), len(each)) for name, each in every.items()}
    for logged in own:
        logged.clear()
    for name, values in zip(functions, rewards, strict=True):
        found |= spread(f"reward/{name}_mean", f"reward/{name}_std", values)
    found["rollout/unscored_share"] = (rewards.isnan().sum(), rewards.numel())
    sums: dict[str, list[int]] = {}
    for group in groups:
        question = group.question
        for completion in group.completions:
            text = question.opened + completion.text
            right = is_correct(text, question.reference, completion.truncated)
            length_name = "rollout/tokens_right" if right else "rollout/tokens_wrong"
            add(sums, "rollout/success_rate", right)
            add(sums, length_name, len(completion.ids))
            if question.difficulty:
                add(sums, f"rollout/success_{question.difficulty}", right)
    return found | {name: (total, count) for name, (total, count) in sums.items()}


def add(sums: dict[str, list[int]], name: str, value: int) -> None:
    """Add a value to a sum and 1 to its count."""
    held = sums.setdefault(name, [0, 0])
    held[0] += value
    held[1] += 1


def of_advantages(returns: Tensor, advantages: Tensor) -> Metrics:
    """Of the returns and advantages (Q, G) of a step."""
    baselines = returns.nanmean(dim=-1)
    return spread("rollout/group_baseline", "rollout/group_baseline_std", baselines) | spread(
        "rollout/advantage_mean", "rollout/advantage_std", advantages.flatten()
    )


# ------------------------------------------------------------------------------------ the console


# name in the line, metric, format
CONSOLE = [
    ("reward", "rollout/returns", ".3f"),
    ("success", "rollout/success_rate", ".3f"),
    ("tokens", "rollout/completion_tokens", ".1f"),
    ("no spread", "rollout/no_spread_share", ".2f"),
    ("rounds", "rollout/rounds", ".0f"),
    ("clipped", "train/clipped_share", ".3f"),
    ("kl", "train/kl_divergence", ".4f"),
    ("entropy", "train/entropy", ".3f"),
    ("loss", "train/loss", "+.3f"),
    ("grad", "train/grad_norm", ".2f"),
    ("skipped", "train/skipped_steps", ".0f"),
    ("s", "time/step", ".2f"),
]


def alarms_of(row: dict[str, float]) -> list[str]:
    """The alarms that are on in a step's metrics, by name."""
    return [name.removeprefix("alarm/") for name in row if name.startswith("alarm/")]


def console_line(step: int, steps: int, row: dict[str, float]) -> str:
    """The step in one readable line, and its evaluation in the words that matter."""
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    parts += [
        f"{word} {row[name]:{form}}"
        for word, name, form in CONSOLE
        if name in row and not (word in ("skipped", "clipped") and not row[name])
    ]
    on = alarms_of(row)
    parts += [f"ALARM {', '.join(on)}"] if on else []
    if "eval/accuracy" in row:
        parts.append(
            f"held-out accuracy {row['eval/accuracy']:.3f} "
            f"({row['eval/accuracy_low']:.3f}–{row['eval/accuracy_high']:.3f}), flexible "
            f"{row['eval/accuracy_flexible']:.3f}, {row['eval/completion_tokens']:.1f} tokens"
        )
    return " | ".join(parts)


def fold(line: str, width: int) -> str:
    """A console line in pieces of at most `width` characters, cut between its parts."""
    first, *others = line.split(" | ")
    lines = [first]
    for part in others:
        if len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] += f" | {part}"
        else:
            lines.append(f"    {part}")
    return "\n".join(lines)
