"""Rung 2, baseline: an answer counts by how much better it is than usual.

    python docs/ladder/2_baseline.py --steps 15 --seed 1

On rung 1 an answer with reward 0 teaches nothing, one with reward 1 is made likelier. Were the
rewards 11 and 10, all answers would be made likelier, the wrong ones too; were they -1 and 0, only
wrong ones would be made less likely: though what is right and what is wrong would be the same. So
subtract a *baseline*, the mean reward. What is left is the *advantage*: above 0 for what was better
than usual, below 0 for what was worse. The gradient has the same mean as before, and less noise.
"""

import torch
from task import Task, climb

from loss import sequences_log_probs
from replay_buffer import pad_batch
from reward import score
from rollout import rollout


def train(task: Task) -> None:
    """Sample, score, compare with the mean, update; step after step."""
    model = task.model
    for step in task.steps():
        # One answer to each of 128 questions, and its reward.
        groups = rollout(model, task.tokenizer, task.questions.take(128), 1, task.sampling)
        groups = score(groups, task.rewards, task.config)
        rewards = torch.cat([group.returns for group in groups])  # (128,)
        advantages = rewards - rewards.mean()

        # The log-probability of each answer: the sum over its tokens.
        batch = pad_batch([e for group in groups for e in group.experiences])
        sequences = batch.sequences, batch.attention_mask, batch.num_actions
        log_probs = sequences_log_probs(model, *sequences)[0]  # (128, tokens of the longest)
        mask = batch.action_mask  # true where an answer has a token
        answers = torch.where(mask, log_probs, 0).sum(dim=1)  # (128,)

        loss = -(advantages * answers).mean()
        task.update(loss)
        task.log(step, groups)


if __name__ == "__main__":
    climb(train, __doc__)
