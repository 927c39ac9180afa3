"""Rung 5, KL: stay near the model that you started from. This is GRPO.

    python docs/ladder/5_kl.py --steps 15 --seed 1

The reward sees only what it was written to see, and all else that the model can do may get lost on
the way. So a frozen copy of the first model, the *reference*, is asked about each token, and a
penalty is added to the loss: an estimate of the KL divergence, which is 0 where policy and
reference agree. `train.py` is this rung, with what makes it dependable and fast.
"""

from dataclasses import replace

import torch
from task import Task, climb
from torch import Tensor

from loss import GRPOLoss, group_advantages, sequences_log_probs
from replay_buffer import ReplayBuffer, pad_batch
from reward import score
from rollout import rollout

PASSES = 1
KL_WEIGHT = 0.01


def kl(log_probs: Tensor, reference: Tensor) -> Tensor:
    """An estimate of KL(policy ‖ reference) from the sampled token alone (k3), (B, C)."""
    difference = reference - log_probs
    return difference.exp() - difference - 1


def train(task: Task) -> None:
    """Sample groups, score, compare, ask the reference; then four updates."""
    model, loss, replay_buffer = task.model, GRPOLoss(clip_eps=0.2), ReplayBuffer()
    for step in task.steps():
        groups = rollout(model, task.tokenizer, task.questions.take(16), 8, task.sampling)
        groups = score(groups, task.rewards, task.config)
        rewards = torch.stack([group.returns for group in groups])
        advantages = group_advantages(rewards)
        experiences = [e for group in groups for e in group.experiences]
        reference = task.log_probs_at_start(experiences)
        experiences = [
            replace(e, log_probs_ref=r) for e, r in zip(experiences, reference, strict=True)
        ]
        replay_buffer.fill(experiences, rewards.flatten(), advantages.flatten())

        for mini_batch in replay_buffer.mini_batches(32, PASSES, task.generator):
            batch = pad_batch(mini_batch)
            sequences = batch.sequences, batch.attention_mask, batch.num_actions
            log_probs, mask = sequences_log_probs(model, *sequences)[0], batch.action_mask
            terms = loss.policy_term(log_probs, batch.sampler_log_probs, batch)  # as on rung 4
            terms = terms + KL_WEIGHT * kl(log_probs, batch.log_probs_ref)
            answers = torch.where(mask, terms, 0).sum(dim=1) / mask.sum(dim=1)
            task.update(answers.mean())
        task.log(step, groups)


if __name__ == "__main__":
    climb(train, __doc__)
