"""One frozen rollout under every objective, for report.py: what each makes of the same tokens.

The rollout is docs/stale_rollout.json (benchmarks/stale_rollout.py makes it). Everything that a
method decides is computed here by the functions that train.py calls: the advantages, which tokens
take part, their weights, the loss and its gradient.
"""

import json
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from objectives import participation
from objectives.equations import KL_ESTIMATORS, build_loss
from objectives.table import OBJECTIVES, SAMPLED_KL, Objective
from replay_buffer import Experience, pad_batch
from rollout import Completion, Group
from support import recording_file as lines
from support.data import Question
from support.model import load_tokenizer
from support.monitor import Monitor
from support.recording_numbers import numbers_of
from support.report_data import ROOT

FILE = ROOT / "docs" / "stale_rollout.json"
KL_RANGE = 2.0  # of log π - log π_ref in the curves of the estimators, nats
POINTS = 81


@cache
def frozen() -> tuple[dict[str, Any], list[Group], list[Experience], list[tuple[Tensor, Tensor]]]:
    """The file; its groups; their experiences; and log π and the entropies of each, now."""
    saved = json.loads(FILE.read_text(encoding="utf-8"))
    groups, experiences, now = [], [], []
    for row in saved["groups"]:
        completions = []
        for each in row["completions"]:
            completions.append(Completion(each["ids"], each["text"], each["truncated"]))
            # Whatever the prompt was: the log-probabilities are given.
            experience = Experience.of([0], each["ids"])
            old, reference = torch.tensor(each["old"]), torch.tensor(each["reference"])
            entropies = torch.tensor(each["entropies"])
            found = {"action_log_probs": old, "log_probs_ref": reference, "entropies": entropies}
            experiences.append(replace(experience, **found))
            now.append((torch.tensor(each["now"]), entropies))
        question = Question(row["question"], row["reference"], "", prompt=" ")
        rewards, returns = torch.tensor(row["rewards"]), torch.tensor(row["returns"])
        groups.append(Group(question, completions, rewards, returns))
    return saved, groups, experiences, now


def under(objective: Objective) -> tuple[Tensor, dict[int, dict[str, Any]]]:
    """What one optimizer step makes of the frozen rollout.

    Returns:
        the advantages, float32 (Q, G); and for each completion that is trained, by its place, the
        numbers of its tokens, as a recording has them.
    """
    saved, groups, experiences, now = frozen()
    loss, trained = (
        build_loss(objective),
        participation.trained_completions(groups, objective.mask_truncated),
    )
    returns = torch.stack([group.returns for group in groups])
    rewards = torch.stack([group.rewards for group in groups], dim=1)
    if objective.needs_policy_pass:
        returns, items = participation.apply(objective, 2, Monitor(), returns, experiences, trained)
    else:
        items = [experiences[i] for i in trained]
    advantages = loss.advantages(returns, rewards, saved["reward_weights"])
    weights = loss.token_weights([e.num_actions for e in items], saved["max_new_tokens"])
    chosen = zip(items, weights, advantages.flatten()[trained], strict=True)
    items = [replace(e, token_weight=w, advantages=a) for e, w, a in chosen]
    found = {}
    for i, item in zip(trained, items, strict=True):
        if item.advantages == 0 and not loss.trains_zero_advantage:
            continue
        batch = pad_batch([item])
        log_probs, entropies = (values.unsqueeze(0) for values in now[i])
        leaf = log_probs.clone().requires_grad_()
        share, _ = loss(leaf, batch, batch.token_weight, entropies)
        share.backward()
        found[i] = numbers_of(loss, batch, log_probs, entropies, [], leaf.grad)
    return advantages, found


def steps() -> list[dict[str, Any]]:
    """The rollout under each objective, as if they were the steps of a run."""
    tokenizer = load_tokenizer("tiny/model")
    sampled = [
        {"group": q, "index": i} | lines.completion_of(group, i, tokenizer)
        for q, group in enumerate(frozen()[1])
        for i in range(len(group.completions))
    ]
    return [step_of(number, name, sampled) for number, name in enumerate(OBJECTIVES, start=1)]


def step_of(number: int, name: str, sampled: list[dict[str, Any]]) -> dict[str, Any]:
    """The rollout under one objective, as a line of a recording.

    Args:
        sampled: each completion as a recording has it, without what an update made of it.
    """
    saved, groups, _, _ = frozen()
    objective = OBJECTIVES[name]
    advantages, found = under(objective)
    described = [
        lines.group_of(q, group, advantages[q], saved["rewards"]) for q, group in enumerate(groups)
    ]
    completions = [
        row | ({"updates": [{"update": 1, **found[place]}]} if place in found else {})
        for place, row in enumerate(sampled)
    ]
    row = {"step": number, "every": 1, "name": name, "all": len(groups)}
    row |= {"objective": asdict(objective), "differs": objective.summary}
    return row | {"groups": described, "completions": completions}


def kl_curves() -> dict[str, Any]:
    """Value and gradient of each KL estimator over d = log π - log π_ref, and the tokens' own d."""
    d = torch.linspace(-KL_RANGE, KL_RANGE, POINTS).requires_grad_()
    curves = {}
    for name in SAMPLED_KL[:4]:  # those of the papers; the others are the same under verl's names
        values = KL_ESTIMATORS[name](d, torch.zeros(POINTS))
        (gradient,) = torch.autograd.grad(values.sum(), d)
        curves[name] = {"values": short(values), "gradient": short(gradient)}
    _, _, experiences, now = frozen()
    pairs = zip(now, experiences, strict=True)
    own = torch.cat([log_probs - e.log_probs_ref for (log_probs, _), e in pairs])
    inside = own[own.abs() <= KL_RANGE]
    curves = {"d": short(d), "curves": curves, "tokens": short(inside.sort().values)}
    return curves | {"beyond": len(own) - len(inside)}


def short(values: Tensor) -> list[float]:
    """Numbers with 4 digits."""
    return [float(f"{x:.4g}") for x in values.tolist()]
