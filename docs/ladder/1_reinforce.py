"""Rung 1, REINFORCE: make each answer likelier, the more the better its reward.

    python docs/ladder/1_reinforce.py --steps 15 --seed 1

There are no labels. The model answers questions by drawing one token after the other, and a rule
says of each answer whether it was right: that number is its *reward*, 1 or 0. How must the weights
change, so that the mean reward rises? One cannot differentiate through drawing. But the gradient of
the mean reward is the mean of

    reward × gradient of log(probability of the answer)

over answers drawn from the model as it is now (R. J. Williams, 1992). So each step draws new
answers, and makes one step of ordinary gradient descent on the loss below.
"""

import torch
from task import Task, climb

from loss import sequences_log_probs
from replay_buffer import pad_batch
from reward import score
from rollout import rollout


def train(task: Task) -> None:
    """Sample, score, update; step after step."""
    model = task.model
    for step in task.steps():
        # One answer to each of 128 questions, and its reward.
        groups = rollout(model, task.tokenizer, task.questions.take(128), 1, task.sampling)
        groups = score(groups, task.rewards, task.config)
        rewards = torch.cat([group.returns for group in groups])  # (128,)

        # The log-probability of each answer: the sum over its tokens.
        batch = pad_batch([e for group in groups for e in group.experiences])
        sequences = batch.sequences, batch.attention_mask, batch.num_actions
        log_probs = sequences_log_probs(model, *sequences)[0]  # (128, tokens of the longest)
        mask = batch.action_mask  # true where an answer has a token
        answers = torch.where(mask, log_probs, 0).sum(dim=1)  # (128,)

        loss = -(rewards * answers).mean()
        task.update(loss)
        task.log(step, groups)


if __name__ == "__main__":
    climb(train, __doc__)
