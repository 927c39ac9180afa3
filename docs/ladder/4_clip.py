"""Rung 4, ratio and clip: learn more from each rollout, and stop before it is out of date.

    python docs/ladder/4_clip.py --steps 15 --seed 1

Sampling is slow, so make several updates of each rollout. But after the first one the policy is no
longer the one that sampled. The *ratio* corrects for that: how likely a token is now, by how likely
it was when it was drawn. The *clip* sets a limit: a token that has become 20 % likelier, and should
become likelier, has no gradient any more; nor has one that has become 20 % less likely and should.
(`min` leaves the gradient to tokens that have moved the wrong way.) This is PPO's loss.
"""

import torch
from task import Task, climb
from torch import Tensor

from loss import group_advantages, sequences_log_probs
from replay_buffer import ReplayBuffer, pad_batch
from reward import score
from rollout import rollout

PASSES = 1  # over each rollout, each in four mini-batches


def policy_term(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """What is minimized at each token, (B, C); `old`: the log-probability it was drawn with."""
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - 0.2, 1 + 0.2)
    return -torch.min(ratio * advantages, clipped * advantages)


def train(task: Task) -> None:
    """Sample groups, score, compare; then four updates; step after step."""
    model, replay_buffer = task.model, ReplayBuffer()
    for step in task.steps():
        groups = rollout(model, task.tokenizer, task.questions.take(16), 8, task.sampling)
        groups = score(groups, task.rewards, task.config)
        rewards = torch.stack([group.returns for group in groups])
        advantages = group_advantages(rewards)  # as on rung 3
        experiences = [e for group in groups for e in group.experiences]
        replay_buffer.fill(experiences, rewards.flatten(), advantages.flatten())

        for mini_batch in replay_buffer.mini_batches(32, PASSES, task.generator):
            batch = pad_batch(mini_batch)
            sequences = batch.sequences, batch.attention_mask, batch.num_actions
            log_probs, mask = sequences_log_probs(model, *sequences)[0], batch.action_mask
            terms = policy_term(log_probs, batch.sampler_log_probs, batch.advantages[:, None])
            answers = torch.where(mask, terms, 0).sum(dim=1) / mask.sum(dim=1)
            task.update(answers.mean())
        task.log(step, groups)


if __name__ == "__main__":
    climb(train, __doc__)
