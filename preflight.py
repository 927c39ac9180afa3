"""What is tried before a run begins: whether the sampler draws from what the trainer computes."""

from typing import Any

import torch
from torch import nn

from config import Config
from data import Question
from errors import UserError
from replay_buffer import Experience, pad_batch
from rollout import Sampling, rollout

TOKENS = 16  # of each completion that is tried
GAP = {"fp32": 1e-3, "bf16": 0.3, "bf16-pure": 0.3}  # nats per token; rounding is 1e-6, and 0.03 in bf16 at the most


@torch.no_grad()
def check_sampler(
    model: nn.Module, policy: nn.Module, tokenizer: Any, questions: list[Question], config: Config
) -> None:
    """Sample a few completions and ask the trainer how likely their tokens are; UserError if the two disagree.

    Padding that is read as text, positions that count it, a precision or a head of the trainer's own, a cache that
    forgets: all of them show as a distance between the log-probability that a token was drawn with and the trainer's.
    The shortest and the longest prompt are sampled together, so that one is padded; the trainer is asked about each
    completion alone and about all together.

    Args:
        model: what is sampled from; policy: what `sequences_log_probs` is asked of (a Policy, on the same device).
    """
    ranked = sorted(questions, key=lambda q: len(q.prompt_ids))
    chosen = [ranked[0], ranked[-1]]
    sampling = Sampling(min(TOKENS, config.max_new_tokens), config.temperature)
    groups = rollout(model, tokenizer, chosen, 2, sampling)
    pairs = [
        (Experience.of(q.prompt_ids, c.ids, 0.0, 0.0), c)
        for q, group in zip(chosen, groups, strict=True)
        for c in group
    ]
    drawn = torch.cat([torch.tensor(c.log_probs) for _, c in pairs])
    gaps = []
    for batches in ([[e] for e, _ in pairs], [[e for e, _ in pairs]]):
        found = []
        for items in batches:
            batch = pad_batch(items).to(model.device)
            found.append(policy(batch)[0][batch.action_mask].float().cpu())
        gaps.append((torch.cat(found) - drawn).abs().mean().item())
    limit = GAP[config.precision] / min(1.0, config.temperature)
    if not max(gaps) <= limit:
        other = "another model" if config.precision == "fp32" else "--precision fp32, or another model"
        raise UserError(
            f"{config.model} is sampled from otherwise than it is trained: log-probabilities differ by {max(gaps):.2g} "
            f"nats per token, and rounding would be below {limit:.2g}; try {other}."
        )
    print(f"sampler and trainer agree: {max(gaps):.1g} nats per token apart")
