"""The training loop of GRPO: sample, score, log-probabilities, advantages, update.

    python train.py                       Qwen2.5-0.5B-Instruct on GSM8K, on one CUDA GPU
    python train.py --preset tiny         the bundled model and task, on any machine, in a minute
    python train.py --resume runs/NAME    continue a run from its newest checkpoint
    torchrun --nproc_per_node 4 train.py  on four GPUs: the same numbers, in less time
    python train.py --help                all options

Read `train` first: its loop is algorithm 1 of the paper (DeepSeekMath, arXiv 2402.03300). Each step
goes through rollout.py (completions), reward.py (rewards), loss.py (log-probabilities, advantages,
loss) and replay_buffer.py (batches). The words: the *policy* is the model that is trained; a
*rollout*, a group of completions for each of several questions; an *action*, a sampled token; a
*return*, the weighted sum of a completion's rewards; a *mini-batch*, what one optimizer step trains
on, in *micro-batches* that fit the memory; a *step*, a rollout and its optimizer steps. What other
methods change is in objectives/; what keeps a long run safe is in support/. docs/names.md has the
names that you know from the tiny-grpo tutorial, TRL or verl beside ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loss import GRPOLoss
from objectives import equations, participation
from objectives.table import NAMES, Objective, objective_of
from replay_buffer import Experience, ReplayBuffer, batches, pad_batch
from reward import REWARDS, score
from rollout import Group, rollout
from support import metrics
from support.alarms import alarms_for
from support.checkpoint import load_newest
from support.command_line import parse_config
from support.config import Config
from support.data import Question, QuestionStream
from support.distributed import add_up_gradients
from support.errors import command
from support.evaluation import held_out_questions
from support.generation import Sampling
from support.memory import MicroBatch
from support.model import build_accelerator, build_optimizer, load_tokenizer
from support.monitor import Monitor, quiet_progress
from support.policy import Policy, load_policies
from support.preflight import check_sampler
from support.prompts import training_questions
from support.schedule import open_run, restore, save_finished_steps
from support.shared_prompts import order_by_prompt
from support.user_rewards import RewardFunction, check_columns, load_rewards


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
    run_dir: Path | None = None  # once it is open
    start_step: int = 0
    skipped: int = 0  # optimizer steps without a finite gradient, the last ones in a row

    def sample(
        self, questions: list[Question], group_size: int, sampling: Sampling, progress: Any = iter
    ) -> list[Group]:
        """Completions from the policy as it is now."""
        policy = self.policy.sampler()
        return rollout(policy, self.tokenizer, questions, group_size, sampling, progress)


def train(trainer: Trainer, steps: Iterator[tuple[int, torch.Generator]]) -> None:
    """Algorithm 1 of the paper. What is done before and after a step is in support/schedule.py."""
    config, objective, monitor = trainer.config, trainer.objective, trainer.monitor
    replay_buffer = ReplayBuffer()
    for step, generator in steps:
        with save_finished_steps(trainer, step - 1):  # if this one cannot be finished
            # Sample a group of completions for each question, and score each completion.
            groups = sample_and_score(trainer, config.rollouts_per_step)
            if objective.dynamic_sampling > 1:
                sample_more = partial(sample_and_score, trainer)
                groups = participation.replace_zero_std(groups, sample_more, objective, monitor)
            returns = torch.stack([group.returns for group in groups])  # (Q, G)
            rewards = torch.stack([group.rewards for group in groups], dim=1)  # (K, Q, G)

            # How likely was each token, to the policy that sampled it and to the reference?
            trained = participation.trained_completions(groups, objective.mask_truncated)
            experiences = add_log_probs(trainer, groups, trained)
            if objective.needs_policy_pass:  # a KL in the reward, or a choice of tokens
                apply = partial(participation.apply, objective, config.optimizer_steps, monitor)
                returns, experiences = apply(returns, experiences, trained)

            # How much better is each completion than the others of its group?
            advantages = trainer.loss.advantages(returns, rewards, config.reward_weights)
            monitor.add_all(metrics.of_advantages(returns, advantages))
            monitor.show_completions(groups, advantages, step, config.log_completions)
            chosen = returns.flatten()[trained], advantages.flatten()[trained]
            replay_buffer.fill(experiences, *chosen)

        # Make the tokens of better completions likelier, those of worse ones less likely.
        size, epochs = config.train_batch_size, config.epochs_per_step
        with monitor.time("time/update"):
            for mini_batch in replay_buffer.mini_batches(size, epochs, generator):
                update(trainer, mini_batch)


def sample_and_score(trainer: Trainer, count: int) -> list[Group]:
    """A group of completions for each of the next `count` questions, with their rewards."""
    config, monitor = trainer.config, trainer.monitor
    questions, show = trainer.questions.take(count), quiet_progress("rollout")
    with monitor.time("time/rollout") as timer:
        groups = trainer.sample(questions, config.group_size, Sampling.of(config), show)
    monitor.add_all(metrics.of_rollout(groups, timer.seconds))
    groups = score(groups, trainer.rewards, config)
    monitor.add_all(metrics.of_rewards(groups, trainer.rewards))
    monitor.add_all(participation.of_comparison(groups, trainer.objective))
    return groups


def add_log_probs(trainer: Trainer, groups: list[Group], trained: list[int]) -> list[Experience]:
    """The completions that are trained, with the log-probabilities that the loss compares.

    With one optimizer step for each rollout, the policy that is trained is the one that sampled:
    the ratio is 1, and its old log-probabilities are not needed. `trained` are places, question × G
    + completion; what no reward could score is not among them.
    """
    objective, passes = trainer.objective, []
    if trainer.config.optimizer_steps > 1 or objective.needs_policy_pass:
        passes.append((trainer.policy, objective.policy_fields))
    if objective.needs_reference_pass:
        passes.append((trainer.reference, ["log_probs_ref"]))
    experiences = [experience for group in groups for experience in group.experiences]
    if not objective.subtracts_kl:  # else every completion's KL is needed, to compare returns
        experiences = [experiences[i] for i in trained]
    with trainer.monitor.time("time/log_probs"):
        for policy, names in passes:
            ask = partial(policy_pass, policy, names)
            experiences = trainer.micro_batch.share_out(experiences, ask)
    return experiences


@torch.no_grad()
def policy_pass(
    policy: Policy, names: list[str], experiences: list[Experience], size: int
) -> list[Experience]:
    """The experiences with what `policy` says of their tokens, as the fields `names`."""
    done = []
    # Nothing is kept for a backward pass, so four times as many sequences fit.
    for items in batches(experiences, 4 * size if size > 1 else 1):
        found = [values.cpu() for values in policy(pad_batch(items))]
        for i, item in enumerate(items):
            rows = [values[i, : item.num_actions] for values in found]
            done.append(replace(item, **dict(zip(names, rows, strict=False))))
    return done


def update(trainer: Trainer, mini_batch: list[Experience]) -> None:
    """One optimizer step: add up the gradients of the micro-batches, clip, step.

    The weight of each token is computed once, from all completions of the mini-batch. So neither
    the size nor the order of micro-batches changes the sum; nor does leaving out completions that
    have no gradient. A step whose loss or gradient is not finite is skipped.
    """
    policy, loss, monitor = trainer.policy, trainer.loss, trainer.monitor
    weights = loss.token_weights([e.num_actions for e in mini_batch], trainer.config.max_new_tokens)
    items = [replace(e, token_weight=w) for e, w in zip(mini_batch, weights, strict=True)]
    if not loss.trains_zero_advantage:
        items = [e for e in items if e.advantages != 0]
    if not items:  # no step at all, not even one of momentum or weight decay
        trainer.skipped = 0
        return
    items = [items[i] for i in order_by_prompt(items)]
    reference = trainer.reference if trainer.objective.needs_exact_kl else None
    policy.train()
    found = trainer.micro_batch.share_out(items, partial(add_gradients, policy, reference, loss))
    add_up_gradients(policy)
    policy.eval()
    losses, entropies, found = zip(*found, strict=True)
    total, entropy, tokens = sum(losses), sum(entropies), sum(e.num_actions for e in items)
    monitor.add_all(*found, {"train/entropy": (entropy, tokens)})
    grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), trainer.config.max_norm)
    finite = bool(torch.isfinite(total) & torch.isfinite(grad_norm))
    if finite:
        trainer.optimizer.step()
        if trainer.objective.entropy_target is not None:
            loss.adapt(float(entropy) / tokens)
        monitor.add("train/loss", len(mini_batch) * total, len(mini_batch))
        monitor.add("train/grad_norm", grad_norm)
    trainer.optimizer.zero_grad()
    trainer.skipped = 0 if finite else trainer.skipped + 1
    monitor.add_up("train/skipped_steps", not finite)


def add_gradients(
    policy: Policy, reference: Policy | None, loss: GRPOLoss, items: list[Experience], size: int
) -> list[tuple[Tensor, Tensor, metrics.Metrics]]:
    """Add up the gradients of micro-batches of `size`.

    Returns of each: its share of the loss; the sum of the entropies of its tokens; its metrics.
    """
    policy.zero_grad()  # an attempt that was too large for the memory may have left a part
    found = []
    for batch in map(pad_batch, batches(items, size)):
        log_probs, entropies, *exact_kl = policy(batch, reference)
        batch = batch.to(policy.device)
        share, logged = loss(log_probs, batch, batch.token_weight, entropies, *exact_kl)
        share.backward()
        entropy = torch.where(batch.action_mask, entropies.detach(), 0.0).sum()
        found.append((share.detach(), entropy, logged))
    return found


def build(config: Config, resume: str | None) -> Trainer:
    """Load and check everything that a run needs; UserError if it cannot work. Writes nothing."""
    objective = objective_of(config)
    print(config.arithmetic, objective.describe(config), sep="\n")
    accelerator, (saved, state) = build_accelerator(config), load_newest(resume, config)
    rewards = load_rewards(config.reward, REWARDS, accelerator.device)
    tokenizer = load_tokenizer(config.model)
    questions = training_questions(config, tokenizer)
    check_columns(rewards, questions)
    held_out = held_out_questions(config, tokenizer) if config.eval_interval else []
    functions, has_kl = equations.log_prob_functions(objective), objective.kl_weight > 0
    policy, reference = load_policies(config, saved, tokenizer, accelerator, has_kl, *functions)
    loss, optimizer = equations.build_loss(objective), build_optimizer(policy.model, config)
    models = config, tokenizer, policy, reference, objective, loss, optimizer
    data = rewards, QuestionStream(questions, config.seed), held_out
    monitor = Monitor(alarms_for(objective.ratio_level, config))
    trainer = Trainer(*models, *data, monitor, MicroBatch(config.micro_batch))
    restore(trainer, state)
    check_sampler(trainer.sample, policy, pad_batch, questions, config)
    return trainer


@command(several=True)
def main(argv: list[str]) -> None:
    """Read the command line, build the trainer, open the run folder, train."""
    config, others = parse_config(argv, __doc__, NAMES)
    with open_run(config, others["resume"], build) as (trainer, steps):
        train(trainer, steps)


if __name__ == "__main__":
    main()
