"""The training loop of GRPO: sample, score, log-probabilities, advantages, update.

    python train.py                       Qwen2.5-0.5B-Instruct on GSM8K, on one CUDA GPU
    python train.py --preset tiny         the bundled model and task, on any machine, in a minute
    python train.py --resume runs/NAME    continue a run from its newest checkpoint
    python train.py --help                all options

Read `train` first: its loop is algorithm 1 of the paper (DeepSeekMath, arXiv 2402.03300). Each step
goes through rollout.py (completions), reward.py (rewards), loss.py (log-probabilities, advantages,
loss) and replay_buffer.py (batches). What other methods change is in objectives/, what keeps a long
run safe in support/. docs/names.md has the names of the tiny-grpo tutorial, TRL and verl beside ours.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loss import GRPOLoss
from objectives import equations
from objectives.experiences import adjust, of_comparison, replace_zero_std, trained_completions
from objectives.table import CHOICES, Objective, objective_of
from replay_buffer import Experience, ReplayBuffer, batches, pad_batch, pad_lists
from reward import REWARDS, score
from rollout import Group, rollout
from support import metrics
from support.alarms import alarms_for
from support.checkpoint import load_newest
from support.command_line import parse_config
from support.config import Config
from support.data import Question, QuestionStream, training_questions
from support.errors import command
from support.evaluation import held_out_questions
from support.generation import Sampling
from support.memory import MicroBatch
from support.model import build_accelerator, build_optimizer, load_tokenizer, set_learning_rate
from support.monitor import Monitor, quiet_progress
from support.policy import Policy, load_policies
from support.preflight import check_sampler
from support.schedule import open_run, restore, save_finished_steps, scheduled_steps
from support.shared_prompts import order_by_prompt
from support.user_rewards import RewardFunction, load_rewards

FORWARD_ONLY = 4  # times as many sequences fit where nothing is kept for a backward pass


@dataclass
class Trainer:
    """The parts of a run. `build` makes them, and checks them before anything is written."""

    config: Config
    tokenizer: Any
    policy: Policy
    reference: Policy | None  # the frozen model that the policy started from; None: no KL
    objective: Objective
    loss: GRPOLoss
    optimizer: torch.optim.Optimizer
    rewards: dict[str, RewardFunction]
    questions: QuestionStream
    held_out: list[Question]
    monitor: Monitor
    micro_batch: MicroBatch
    start_step: int = 0
    skipped: int = 0  # optimizer steps without a finite gradient, the last ones in a row

    def sample(self, questions: list[Question], *settings: Any) -> list[Group]:
        """Completions from the policy as it is now; `settings` are the others of `rollout`."""
        return rollout(self.policy.sampler(), self.tokenizer, questions, *settings)


def train(trainer: Trainer, run_dir: Path) -> None:
    """Algorithm 1 of the paper. What is done between two steps is in support/schedule.py."""
    config, objective, monitor = trainer.config, trainer.objective, trainer.monitor
    replay_buffer = ReplayBuffer()
    for step, generator in scheduled_steps(trainer, run_dir):
        with save_finished_steps(trainer, run_dir, step - 1):
            # Sample a group of completions for each question, and score each completion.
            groups = sample_and_score(trainer, config.rollouts_per_step)
            if objective.dynamic_sampling > 1:
                sample_more = partial(sample_and_score, trainer)
                groups = replace_zero_std(groups, sample_more, objective, monitor)
            returns = torch.stack([group.returns for group in groups])  # (Q, G)
            rewards = torch.stack([group.rewards for group in groups], dim=1)  # (K, Q, G)

            # How likely was each token, to the policy that sampled it and to the reference?
            trained = trained_completions(groups, objective.mask_truncated)
            experiences = compute_log_probs(trainer, groups, trained)
            if objective.needs_policy_pass:  # for a KL in the reward, or a choice of tokens
                on_policy = config.optimizer_steps == 1
                returns, experiences = adjust(
                    returns, experiences, trained, objective, on_policy, monitor
                )

            # How much better is each completion than the others of its group?
            advantages = trainer.loss.advantages(returns, rewards, config.reward_weights)
            monitor.add_all(metrics.of_advantages(returns, advantages))
            monitor.show_completions(groups[0], advantages[0], step, config.log_completions)
            replay_buffer.fill(
                experiences, returns.flatten()[trained], advantages.flatten()[trained]
            )

        # Make the tokens of better completions likelier, those of worse ones less likely.
        monitor.add("train/lr", set_learning_rate(trainer.optimizer, config, step))
        monitor.add("train/skipped_steps", 0)
        with monitor.time("time/update"):
            size, epochs = config.train_batch_size, config.epochs_per_step
            for mini_batch in replay_buffer.mini_batches(size, epochs, generator):
                update(trainer, mini_batch)


def sample_and_score(trainer: Trainer, count: int) -> list[Group]:
    """A group of completions for each of the next `count` questions, with their rewards."""
    config, monitor, start = trainer.config, trainer.monitor, time.perf_counter()
    questions, show = trainer.questions.take(count), quiet_progress("rollout")
    with monitor.time("time/rollout"):
        groups = trainer.sample(questions, config.group_size, Sampling.of(config), show)
    monitor.add_all(metrics.of_rollout(groups, time.perf_counter() - start))
    weights, budget, limit = config.reward_weights, config.max_new_tokens, config.reward_timeout
    groups = score(groups, trainer.rewards, weights, budget, limit)
    monitor.add_all(metrics.of_rewards(groups, trainer.rewards))
    monitor.add_all(of_comparison(groups, trainer.objective))
    return groups


def compute_log_probs(
    trainer: Trainer, groups: list[Group], trained: list[int]
) -> list[Experience]:
    """The trained completions, with the log-probabilities that the loss compares.

    With one optimizer step for each rollout, the policy that is trained is the one that sampled: the
    ratio is 1, and its old log-probabilities are not needed.
    """
    objective, micro_batch = trainer.objective, trainer.micro_batch
    experiences = [experience for group in groups for experience in group.experiences]
    if not objective.subtracts_kl:
        experiences = [experiences[i] for i in trained]
    with trainer.monitor.time("time/log_probs"):
        if trainer.config.optimizer_steps > 1 or objective.needs_policy_pass:
            names = objective.policy_fields
            experiences = add_log_probs(trainer.policy, experiences, names, micro_batch)
        if objective.needs_reference_pass:
            names = ["log_probs_ref"]
            experiences = add_log_probs(trainer.reference, experiences, names, micro_batch)
    return experiences


@torch.no_grad()
def add_log_probs(
    policy: Policy, experiences: list[Experience], names: list[str], micro_batch: MicroBatch
) -> list[Experience]:
    """The experiences with what `policy` says of their tokens, in the fields `names`."""

    def in_batches_of(size: int) -> list[Experience]:
        done = []
        for items in batches(experiences, FORWARD_ONLY * size if size > 1 else 1):
            found = [values.cpu() for values in policy(pad_batch(items).to(policy.device))]
            for i, item in enumerate(items):
                rows = [values[i, : item.num_actions] for values in found]
                done.append(replace(item, **dict(zip(names, rows, strict=False))))
        return done

    return micro_batch.halve_on_oom(in_batches_of)


def update(trainer: Trainer, mini_batch: list[Experience]) -> None:
    """One optimizer step: add up the gradients of the micro-batches, clip, step.

    The weight of a token is that of the whole mini-batch, so the size of micro-batches and their order
    do not change the sum. Nor does leaving out completions that have no gradient. A step whose loss or
    gradient is not finite is skipped.
    """
    policy, loss, monitor = trainer.policy, trainer.loss, trainer.monitor
    lengths = [e.num_actions for e in mini_batch]
    weights = loss.token_weights(lengths, trainer.config.max_new_tokens)
    pairs = [
        (e, weight)
        for e, weight in zip(mini_batch, weights, strict=True)
        if loss.trains_zero_advantage or e.advantages != 0
    ]
    if not pairs:  # no step at all, not even one of momentum or weight decay
        trainer.skipped = 0
        return
    pairs = [pairs[i] for i in order_by_prompt([e for e, _ in pairs])]
    reference = trainer.reference if trainer.objective.needs_exact_kl else None
    policy.train()
    add_up = partial(add_gradients, policy, reference, loss, pairs)
    total, entropy, found = trainer.micro_batch.halve_on_oom(add_up)
    policy.eval()
    tokens = sum(e.num_actions for e, _ in pairs)
    monitor.add_all(*found, {"train/entropy": (entropy, tokens)})
    grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), trainer.config.max_norm)
    finite = bool(torch.isfinite(total) & torch.isfinite(grad_norm))
    if finite:
        trainer.optimizer.step()
        loss.adapt(float(entropy) / tokens)
        monitor.add("train/loss", len(mini_batch) * total, len(mini_batch))
        monitor.add("train/grad_norm", grad_norm)
    trainer.optimizer.zero_grad()
    trainer.skipped = 0 if finite else trainer.skipped + 1
    monitor.add_up("train/skipped_steps", not finite)


def add_gradients(
    policy: Policy,
    reference: Policy | None,
    loss: GRPOLoss,
    pairs: list[tuple[Experience, Tensor]],
    size: int,
) -> tuple[Tensor, Tensor, list[metrics.Metrics]]:
    """Add up the gradients of experiences with their token weights, `size` at a time.

    Returns:
        the loss; the sum of the entropies of the tokens; the metrics of each micro-batch.
    """
    policy.zero_grad()  # an attempt that was too large for the memory may have left a part
    total, entropy = torch.zeros((), device=policy.device), torch.zeros((), device=policy.device)
    found = []
    for chosen in batches(pairs, size):
        batch = pad_batch([e for e, _ in chosen]).to(policy.device)
        weights = torch.stack([weight for _, weight in chosen]).to(policy.device)
        log_probs, entropies, *exact_kl = policy(batch, reference)
        share, logged = loss(log_probs, batch, weights, entropies, *exact_kl)
        share.backward()
        total += share.detach()
        entropy += torch.where(batch.action_mask, entropies.detach(), 0.0).sum()
        found.append(logged)
    return total, entropy, found


def build(config: Config, resume: str | None) -> Trainer:
    """Load and check everything that a run needs, and write nothing.

    Raises:
        UserError: something is missing, or does not go together.
    """
    objective = objective_of(config)
    print(config.arithmetic)
    print(objective.describe(config.objective, config.optimizer_steps))
    rewards, accelerator = load_rewards(config.reward, REWARDS), build_accelerator(config)
    saved, state = load_newest(resume, config)
    tokenizer = load_tokenizer(config.model)
    questions = training_questions(config, tokenizer)
    held_out = held_out_questions(config, tokenizer) if config.eval_interval else []
    functions = equations.log_prob_functions(objective)
    policy, reference = load_policies(
        config, saved, tokenizer, accelerator, objective.kl_weight > 0, *functions
    )
    trainer = Trainer(
        config,
        tokenizer,
        policy,
        reference,
        objective,
        equations.build_loss(objective),
        build_optimizer(policy.model, config),
        rewards,
        QuestionStream(questions, config.seed),
        held_out,
        Monitor(alarms_for(objective.ratio_level, config.top_p)),
        MicroBatch(config.micro_batch),
    )
    restore(trainer, state)
    check_sampler(trainer.sample, policy, pad_lists, questions, config)
    return trainer


@command
def main(argv: list[str]) -> None:
    """Read the command line, build the trainer, open the run folder, train."""
    config, others = parse_config(argv, __doc__, CHOICES)
    with open_run(config, others["resume"], build) as (trainer, run_dir):
        train(trainer, run_dir)


if __name__ == "__main__":
    main()
