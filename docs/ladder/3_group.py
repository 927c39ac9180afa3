"""Rung 3, group: an answer is compared with other answers to the same question.

    python docs/ladder/3_group.py --steps 15 --seed 1

On rung 2 a right answer to an easy question counts as much as one to a hard question, though it is
no better than the model's usual answer to it. So let the model answer each question several times,
a *group*, and take the group's own mean as the baseline. (PPO, the method before GRPO, trains a
second network to predict it.) A group whose rewards are all equal teaches nothing.

Two divisions are GRPO's own: by the group's standard deviation, so that every group counts about
the same; and by an answer's number of tokens, so that long answers count as much as short ones.
With them it is not quite the gradient of the mean reward any more; Dr. GRPO leaves both out.
"""

import torch
from task import Task, climb

from loss import sequences_log_probs
from replay_buffer import pad_batch
from reward import score
from rollout import rollout


def train(task: Task) -> None:
    """Sample groups, score, compare inside each group, update; step after step."""
    model = task.model
    for step in task.steps():
        # Eight answers to each of 16 questions, and their rewards.
        groups = rollout(model, task.tokenizer, task.questions.take(16), 8, task.sampling)
        groups = score(groups, task.rewards, task.config)
        rewards = torch.stack([group.returns for group in groups])  # (16, 8): a row for each group
        mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
        advantages = ((rewards - mean) / (std + 1e-4)).flatten()  # (128,)

        # The log-probability of each answer, by its number of tokens.
        batch = pad_batch([e for group in groups for e in group.experiences])
        sequences = batch.sequences, batch.attention_mask, batch.num_actions
        log_probs = sequences_log_probs(model, *sequences)[0]  # (128, tokens of the longest)
        mask = batch.action_mask  # true where an answer has a token
        answers = torch.where(mask, log_probs, 0).sum(dim=1) / mask.sum(dim=1)  # (128,)

        loss = -(advantages * answers).mean()
        task.update(loss)
        task.log(step, groups)


if __name__ == "__main__":
    climb(train, __doc__)
