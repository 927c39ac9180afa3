"""Which groups, completions and tokens take part in the update; and a KL in the reward.

Dynamic sampling and truncated completions (DAPO), the KL in the reward (RLOO), tokens of high
entropy.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from loss import rewards_differ
from objectives.equations import kl_divergence
from objectives.table import Objective
from replay_buffer import Experience
from rollout import Group
from support.metrics import Metrics, spread
from support.monitor import Monitor


def zero_std(group: Group, objective: Objective) -> bool:
    """Whether the rewards of a group are all equal, so that comparing them teaches nothing.

    Where each reward is compared on its own (GDPO): whether all of them are.
    """
    each = objective.multi_objective_aggregation == "normalize_then_sum"
    return not rewards_differ(group.rewards if each else group.returns).any()


def of_comparison(groups: list[Group], objective: Objective) -> Metrics:
    """The share of groups without spread; and the returns, if no KL is subtracted from them."""
    equal = sum(zero_std(group, objective) for group in groups)
    found: Metrics = {"rollout/no_spread_share": (equal, len(groups))}
    if objective.subtracts_kl:
        return found
    returns = torch.cat([group.returns for group in groups])
    return found | spread("rollout/returns", "rollout/returns_std", returns)


def replace_zero_std(
    groups: list[Group],
    sample_more: Callable[[int], list[Group]],
    objective: Objective,
    monitor: Monitor,
) -> list[Group]:
    """Dynamic sampling (DAPO, arXiv 2503.14476): new questions for the groups of equal rewards.

    In `dynamic_sampling` rollouts at the most; what is still equal then stays.

    Args:
        sample_more: scored groups for so many of the next questions.
    """
    groups, rounds = list(groups), 1
    equal = [i for i, group in enumerate(groups) if zero_std(group, objective)]
    while equal and rounds < objective.dynamic_sampling:
        rounds += 1
        new = [g for g in sample_more(len(equal)) if not zero_std(g, objective)]
        for i, group in zip(equal, new, strict=False):
            groups[i] = group
        equal = equal[len(new) :]
    monitor.add("rollout/rounds", rounds)
    monitor.add("rollout/idle_groups", len(equal))
    return groups


def trained_completions(groups: list[Group], mask_truncated: bool) -> list[int]:
    """The places of the completions that are trained, counted through all groups.

    Not those that no reward could score nor, with `mask_truncated`, those that were cut off: they
    count neither in the sums nor in the means of the loss.
    """
    scored = (~torch.cat([group.returns for group in groups]).isnan()).tolist()
    truncated = [completion.truncated for group in groups for completion in group.completions]
    return [i for i, yes in enumerate(scored) if yes and not (mask_truncated and truncated[i])]


def apply(
    objective: Objective,
    optimizer_steps: int,
    monitor: Monitor,
    returns: Tensor,
    experiences: list[Experience],
    trained: list[int],
) -> tuple[Tensor, list[Experience]]:
    """A KL in the reward, and a choice of tokens: the returns, and the trained experiences.

    Args:
        optimizer_steps: for each rollout.
        returns: float32 (Q, G).
        experiences: those of all completions with a KL in the reward, else those that are trained.
    """
    if objective.subtracts_kl:
        kl = [
            kl_divergence(e.action_log_probs, e.log_probs_ref, objective.kl_estimator)
            for e in experiences
        ]
        penalties = objective.kl_weight * torch.stack([tokens.sum() for tokens in kl])
        returns = returns - penalties.view_as(returns)
        monitor.add("train/kl_divergence", torch.cat(kl).sum(), sum(map(len, kl)))
        monitor.add_all(spread("rollout/returns", "rollout/returns_std", returns.flatten()))
        experiences = [experiences[i] for i in trained]
    if objective.top_entropy < 1:
        experiences = mask_low_entropy(experiences, objective.top_entropy)
    if optimizer_steps == 1:  # the ratio is 1, and not 1 up to rounding
        experiences = [replace(e, action_log_probs=None) for e in experiences]
    return returns, experiences


def mask_low_entropy(experiences: list[Experience], share: float) -> list[Experience]:
    """A policy mask on that share of all tokens which has the highest entropy (arXiv 2506.01939).

    The entropies are those of the policy that sampled, over the whole rollout, so micro-batches do
    not matter.
    """
    if not experiences:
        return []
    ranked = torch.cat([e.entropies for e in experiences]).sort(descending=True).values
    threshold = ranked[max(1, round(share * len(ranked))) - 1]
    return [replace(e, policy_mask=e.entropies >= threshold, entropies=None) for e in experiences]
