"""The rollout that `report.py --objectives` shows under every objective: docs/stale_rollout.json.

    python benchmarks/stale_rollout.py

It takes some real steps with the bundled model, samples, and then makes more optimizer steps of
other completions than is healthy. So the policy has moved far from the one that sampled: ratios
far from 1 in both directions, which is where objectives differ. What it keeps are questions,
completions, rewards, and the log-probabilities of three policies: now, when it sampled, and the
reference.
"""

import json
from dataclasses import asdict, replace
from typing import Any

import torch
from common import ROOT

from rollout import Group
from support.command_line import parse_config
from support.errors import command
from support.recording_file import rounded
from train import Trainer, add_log_probs, build, policy_pass, sample_and_score, train

FILE = ROOT / "docs" / "stale_rollout.json"
FLAGS = ["--preset=tiny", "--kl_weight=0.01", "--reward", "accuracy", "format"]
FLAGS += ["--reward_weights", "1", "0.2", "--group_size=6", "--rollouts_per_step=24"]
FLAGS += ["--train_batch_size=72", "--max_new_tokens=26", "--seed=5"]
STEPS = 5  # until it is sampled: rollouts, each with two optimizer steps
EXCESS = 8  # the same, after that


def take_steps(trainer: Trainer, count: int) -> None:
    """Steps of train.py without a run folder; a new generator has the same seed each time."""
    train(trainer, ((number, torch.Generator()) for number in range(1, count + 1)))


def chosen(groups: list[Group]) -> list[Group]:
    """One right answer among wrong ones; some cut off; some right ones; all rewards equal."""
    found: list[Group] = []
    for wanted in (
        lambda right, cut, rewards: right == 1,
        lambda right, cut, rewards: 1 < right < 5 and cut,
        lambda right, cut, rewards: 1 < right < 5,
        lambda right, cut, rewards: rewards == 1,
    ):
        fitting = []
        for group in (group for group in groups if group not in found):
            cut = any(completion.truncated for completion in group.completions)
            rewards = len(set(group.returns.tolist()))
            if wanted(int(group.rewards[0].sum()), cut, rewards):
                fitting.append(group)
        # Of these the one whose answers differ most.
        found.append(max(fitting, key=lambda group: len({c.text for c in group.completions})))
    return found


def record() -> dict[str, Any]:
    """Train, sample, train too much, and ask the policy again."""
    config, _ = parse_config(FLAGS, None)
    trainer = build(config, None)
    torch.manual_seed(config.seed)
    take_steps(trainer, STEPS)
    groups = sample_and_score(trainer, config.rollouts_per_step)
    groups = chosen(groups)
    old = add_log_probs(trainer, groups, list(range(len(groups) * config.group_size)))
    ask = [replace(each, action_log_probs=None) for each in old]
    take_steps(trainer, EXCESS)
    now = policy_pass(trainer.policy, ["action_log_probs", "entropies"], ask, len(ask))
    rows = []
    for group in groups:
        completions = []
        for completion in group.completions:
            before, after = old.pop(0), now.pop(0)
            numbers = {
                "now": after.action_log_probs,
                "old": before.action_log_probs,
                "reference": before.log_probs_ref,
                "entropies": after.entropies,
            }
            numbers = {name: rounded(values.tolist()) for name, values in numbers.items()}
            completions.append(asdict(completion) | {"log_probs": None} | numbers)
        question, reference = group.question.question, group.question.reference
        row = {"question": question, "reference": reference, "completions": completions}
        rows.append(row | {"rewards": group.rewards.tolist(), "returns": group.returns.tolist()})
    names = list(trainer.rewards)
    return {
        "rewards": names,
        "reward_weights": config.reward_weights,
        "max_new_tokens": config.max_new_tokens,
        "groups": rows,
    }


@command
def main(argv: list[str]) -> None:
    """Write the file."""
    FILE.write_text(json.dumps(record(), indent=None, separators=(",", ":")) + "\n")
    print(f"written: {FILE.relative_to(ROOT)}, {FILE.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
