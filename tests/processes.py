"""Runs of train.py in one process or in several, with what they sampled and their gradients.

    torchrun --nproc_per_node 2 tests/processes.py JOBS OUT

JOBS is a JSON file with a list of command lines; what each of them did is saved in OUT, by the
first process. test_distributed.py compares it with what a single process does.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train

REWARDS = '''
import os

import torch


def digits(prompts, completions, log_metric, **columns):
    """A number for each completion, and a metric of each."""
    torch.manual_seed(0)  # which must not reach the sampling of the next round
    torch.rand(len(completions))
    for text in completions:
        log_metric("letters", len(text))
    return [sum(letter.isdigit() for letter in text) / 10 for text in completions]


def differs(prompts, completions, **columns):
    """Another number for nearly every text: each group has a spread, so each step a gradient."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


def fails_in_one(prompts, completions, **columns):
    """Raises in the second process, and there alone."""
    if os.environ.get("RANK") == "1":
        raise KeyError("no such answer")
    return [0.0] * len(completions)
'''


def record(argv: list[str]) -> list[dict]:
    """Train as `python train.py argv`; what was sampled, and the gradient of each optimizer step."""
    seen = []
    real = train.sample_and_score, train.add_up_gradients

    def sampled(trainer, count):
        groups = real[0](trainer, count)
        completions = [c for group in groups for c in group.completions]
        seen.append(
            {
                "ids": [c.ids for c in completions],
                "returns": torch.cat([group.returns for group in groups]),
                "log_probs": torch.tensor([x for c in completions for x in c.log_probs]),
            }
        )
        return groups

    def added(policy):
        real[1](policy)
        found = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        seen.append({"gradient": torch.cat(found).clone()})

    train.sample_and_score, train.add_up_gradients = sampled, added
    try:
        train.main(argv)
    finally:
        train.sample_and_score, train.add_up_gradients = real
    return seen


if __name__ == "__main__":
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for number, argv in enumerate(jobs):
        seen = record(argv)
        if os.environ.get("RANK", "0") == "0":
            torch.save(seen, out / f"{number}.pt")
