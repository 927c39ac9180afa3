"""The training loop: ask, mark, compare, remember, learn.

    python train.py                    Qwen2.5-0.5B-Instruct on GSM8K, on one CUDA GPU
    python train.py --preset tiny      the bundled model on the bundled task, on any machine, in about a minute
    python train.py --resume runs/NAME         go on from the newest checkpoint
    python train.py --help             every knob

The way from here to the gradient: rollout.py samples, reward.py scores, log_probs.py says how likely each token is, and
loss.py compares and has the objective. Departures from the paper's algorithm 1 stand at the top of loss.py.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

import checkpoint
import reward
from alarms import alarms_for
from answers import is_correct
from config import Config, located, parse_config
from data import Question, QuestionStream, load_questions, with_prompts
from errors import UserError, command
from evaluate import evaluate, held_out_questions
from log_probs import Policy, share_prompts
from loss import GRPOLoss, Objective, approx_kl_divergence, build_objective, group_advantages, has_spread, token_weights
from model import (
    build_accelerator,
    build_optimizer,
    copy_weights,
    decoding_copy,
    load_model,
    load_tokenizer,
)
from monitor import Monitor, completion_page, describe_run, progress, tell
from preflight import check_model, check_sampler
from replay_buffer import Experience, ReplayBuffer, batches, neighbours, pad_batch
from rollout import Completion, Sampling, rollout

FORWARD_ONLY = 4  # times as many sequences in a pass that keeps nothing for a backward pass


@dataclass
class Trainer:
    """What the loop works with. Built by `build`, which does everything that can fail before anything is written."""

    config: Config
    accelerator: Accelerator
    tokenizer: Any
    policy: nn.Module
    reference: nn.Module | None
    optimizer: torch.optim.Optimizer
    loss: GRPOLoss
    rewards: dict[str, reward.RewardFunction]
    questions: QuestionStream
    held_out: list[Question]
    monitor: Monitor
    start_step: int
    micro_batch_size: int
    twin: nn.Module | None = None  # the model in bf16, where its own weights are fp32 and the arithmetic is not
    skipped: int = 0  # optimizer steps without a finite loss and gradient, the last ones in a row

    @property
    def stuck(self) -> bool:
        """Whether too many optimizer steps in a row were skipped."""
        return 0 < self.config.max_skipped_steps <= self.skipped

    @property
    def model(self) -> nn.Module:
        """The language model inside the policy, for saving."""
        return self.accelerator.unwrap_model(self.policy).model

    def sampler(self) -> nn.Module:
        """The language model to sample from, with the policy's present weights."""
        if self.twin is None:
            return self.model
        copy_weights(self.model, self.twin)
        return self.twin


@dataclass(frozen=True)
class Group:
    """A question, its completions, and what each reward says of each of them."""

    question: Question
    completions: list[Completion]
    rewards: Tensor | None = None  # float32 (K, group_size), in the order of the trainer's rewards
    returns: Tensor | None = None  # float32 (group_size,): their weighted sum; NaN where nothing could score
    idle: bool = False  # whether the rewards are all equal, so that nothing can be learned by comparing


def train(t: Trainer, run_dir: Path) -> None:
    """The loop. Evaluation, checkpoint and log are one line each below its five verbs."""
    config = t.config
    replay_buffer = ReplayBuffer()
    if t.start_step == 0 and config.eval_interval:
        evaluation(t)
        t.monitor.flush(0, config.steps)
    with Interruption() as interrupted:
        for step in progress(range(t.start_step + 1, config.steps + 1), "steps"):
            start = time.perf_counter()
            generator = seed_step(config.seed, step)
            with keeping(t, run_dir, step - 1):
                groups = mark(t, ask(t, config.rollouts_per_step))
                groups = replace_idle(t, groups)
                advantages = compare(t, groups)
                remember(t, replay_buffer, groups, advantages)
            learn(t, replay_buffer, step, generator)
            t.monitor.add("time/step", time.perf_counter() - start)

            show_samples(t, groups[0], advantages[0], step)
            last = step == config.steps
            if due(config.eval_interval, step, last):
                evaluation(t)
            t.monitor.flush(step, config.steps)
            stop = interrupted() or t.stuck
            if due(config.checkpoint_interval, step, last or stop):
                save(t, run_dir, step)
            if stop:
                break
    if t.stuck:
        raise UserError(give_up(t, run_dir, step))
    say_goodbye(run_dir, step)


def due(interval: int, step: int, last: bool) -> bool:
    """Whether something that happens every `interval` steps, and at the last one, happens now; 0 means never."""
    return interval > 0 and (last or step % interval == 0)


def ask(t: Trainer, count: int) -> list[Group]:
    """Sample a group of completions for each of the next `count` questions."""
    config = t.config
    questions = t.questions.take(count)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.rollout_batch_size)
    start = time.perf_counter()
    with t.monitor.time("time/rollout"):
        groups = rollout(t.sampler(), t.tokenizer, questions, config.group_size, sampling, quiet_progress("rollout"))
    flat = [c for group in groups for c in group]
    tokens = sum(len(c.ids) for c in flat)
    t.monitor.add("rollout/completion_tokens", tokens, len(flat))
    t.monitor.add("rollout/truncated_share", sum(c.truncated for c in flat), len(flat))
    t.monitor.add("rollout/entropy", -sum(sum(c.log_probs) for c in flat), tokens)
    t.monitor.add("perf/tokens_per_second", tokens, time.perf_counter() - start)
    return [Group(question, group) for question, group in zip(questions, groups, strict=True)]


def mark(t: Trainer, groups: list[Group]) -> list[Group]:
    """Score every completion."""
    pairs = [(g.question, c) for g in groups for c in g.completions]
    names = {name for g in groups for name in g.question.columns} - {"prompts", "completions"}
    columns = {name: [q.columns.get(name) for q, _ in pairs] for name in sorted(names)}
    columns |= {
        "reference": [q.reference for q, _ in pairs],
        "completion_ids": [c.ids for _, c in pairs],
        "max_new_tokens": t.config.max_new_tokens,
    }
    prompts, texts = [q.prompt for q, _ in pairs], [c.text for _, c in pairs]
    returns, by_name = reward.score(
        t.rewards, t.config.reward_weights, prompts, texts, columns, t.config.reward_timeout
    )
    for name, values in by_name.items():
        t.monitor.add_spread(f"reward/{name}_mean", f"reward/{name}_std", values)
        t.monitor.add("rollout/unscored_share", values.isnan().sum(), len(values))
    for question, completion in pairs:
        success = is_correct(completion.text, question.reference)
        t.monitor.add("rollout/success_rate", success)
        t.monitor.add("rollout/tokens_right" if success else "rollout/tokens_wrong", len(completion.ids))
        if question.difficulty:
            t.monitor.add(f"rollout/success_{question.difficulty}", success)
    returns = returns.view(len(groups), -1)
    rewards = torch.stack(list(by_name.values())).view(-1, *returns.shape).transpose(0, 1)
    # Before the KL is subtracted, which differs a little from completion to completion.
    apart = t.loss.objective.multi_objective_aggregation == "normalize_then_sum"
    idle = ~has_spread(rewards if apart else returns[:, None]).any(-1)
    returns = returns - kl_penalty(t, groups)
    t.monitor.add_spread("rollout/returns", "rollout/returns_std", returns.flatten())
    t.monitor.add("rollout/no_spread_share", idle.sum(), len(groups))
    scored = zip(groups, rewards, returns, idle.tolist(), strict=True)
    return [replace(g, rewards=k, returns=r, idle=i) for g, k, r, i in scored]


def kl_penalty(t: Trainer, groups: list[Group]) -> Tensor | float:
    """With kl_in_reward: kl_weight times the KL of each completion, summed over its tokens, (questions, group_size)."""
    o = t.loss.objective
    if not (o.kl_in_reward and o.kl_weight):
        return 0.0
    flat = [Experience.of(g.question.prompt_ids, c.ids, 0.0, 0.0) for g in groups for c in g.completions]
    with t.monitor.time("time/log_probs"):
        known = recall(t, flat, old=True, ref=True)
    kl = [approx_kl_divergence(e.action_log_probs, e.log_probs_ref, o.kl_estimator) for e in known]
    t.monitor.add("train/kl_divergence", torch.cat(kl).sum(), sum(map(len, kl)))
    return o.kl_weight * torch.stack([k.sum() for k in kl]).view(len(groups), -1)


def replace_idle(t: Trainer, groups: list[Group]) -> list[Group]:
    """DAPO's dynamic sampling: new questions in the place of groups whose rewards are all equal.

    In `dynamic_sampling` rollouts at the most; the idle groups stay where that was not enough.
    """
    rounds, idle = 1, [i for i, g in enumerate(groups) if g.idle]
    while idle and rounds < t.loss.objective.dynamic_sampling:
        rounds += 1
        fresh = [g for g in mark(t, ask(t, len(idle))) if not g.idle]
        found = dict(zip(idle, fresh, strict=False))
        groups = [found.get(i, g) for i, g in enumerate(groups)]
        idle = [i for i in idle if i not in found]
    if t.loss.objective.dynamic_sampling > 1:
        t.monitor.add("rollout/rounds", rounds)
        t.monitor.add("rollout/idle_groups", len(idle))
    return groups


def compare(t: Trainer, groups: list[Group]) -> Tensor:
    """Advantages inside each group, float32 (questions, group_size)."""
    returns, rewards = torch.stack([g.returns for g in groups]), torch.stack([g.rewards for g in groups], 1)
    advantages = group_advantages(returns, t.loss.objective, rewards, t.config.reward_weights)
    baselines = returns.nanmean(-1)
    t.monitor.add_spread("rollout/group_baseline", "rollout/group_baseline_std", baselines)
    t.monitor.add_spread("rollout/advantage_mean", "rollout/advantage_std", advantages.flatten())
    return advantages


def remember(t: Trainer, replay_buffer: ReplayBuffer, groups: list[Group], advantages: Tensor) -> None:
    """Fill the replay buffer, with the log-probabilities of the policy that sampled and of the reference.

    With a single optimizer step per rollout the policy that learns is the policy that sampled, so its old
    log-probabilities are the new ones, and are not computed twice. Completions that nothing could score stay out, and
    truncated ones if the objective says so: neither the sums nor the means of the loss see them.
    """
    o = t.loss.objective
    fresh = [
        Experience.of(g.question.prompt_ids, c.ids, float(r), float(a), c.log_probs)
        for g, row in zip(groups, advantages, strict=True)
        for c, r, a in zip(g.completions, g.returns, row, strict=True)
        if not r.isnan() and not (o.mask_truncated and c.truncated)
    ]
    with t.monitor.time("time/log_probs"):
        ref = o.kl_in_loss and o.kl_estimator != "full"  # that one asks the reference again, in the update
        ready = recall(t, fresh, old=t.config.optimizer_steps > 1, ref=ref, top_entropy=o.top_entropy)
    replay_buffer.clear()
    for experience in ready:
        replay_buffer.append(experience)


@torch.no_grad()
def recall(t: Trainer, fresh: list[Experience], old: bool, ref: bool, top_entropy: float = 1.0) -> list[Experience]:
    """The experiences with what the policy as it is now (`old`) and the reference (`ref`) say of their tokens.

    `top_entropy` below 1: with policy_mask on that share of all their tokens, those of the highest entropy
    (arXiv 2506.01939). The entropies are those of the policy that sampled, so micro-batches do not matter.
    """
    ready, entropies = fitting(t, lambda size: passes(t, fresh, old, ref, top_entropy < 1, size))
    if top_entropy < 1 and ready:
        ranked = torch.cat(entropies).sort(descending=True).values
        threshold = ranked[max(1, round(top_entropy * len(ranked))) - 1]
        ready = [replace(e, policy_mask=h >= threshold) for e, h in zip(ready, entropies, strict=True)]
    return ready


def passes(
    t: Trainer, fresh: list[Experience], old: bool, ref: bool, entropy: bool, size: int
) -> tuple[list[Experience], list[Tensor]]:
    """The passes of `recall`: the experiences with what was asked for, and the entropies beside them."""
    ready, entropies = [], []
    for items in batches(fresh, FORWARD_ONLY * size if size > 1 else 1):
        batch = pad_batch(items).to(t.accelerator.device)
        policy = [x.cpu() for x in t.policy(batch)] if old or entropy else []
        log_probs_ref = t.reference(batch)[0].cpu() if ref else None
        for i, item in enumerate(items):
            n = item.num_actions
            if old:
                item = replace(item, action_log_probs=policy[0][i, :n])
            if ref:
                item = replace(item, log_probs_ref=log_probs_ref[i, :n])
            if entropy:
                entropies.append(policy[1][i, :n])
            ready.append(item)
    return ready, entropies


def fitting(t: Trainer, work: Callable[[int], Any]) -> Any:
    """`work(micro_batch_size)`; where that is more than the GPU's memory holds, again from its beginning with half.

    The micro-batch stays at what fitted. Its size is never part of the mathematics.
    """
    while True:
        try:
            return work(t.micro_batch_size)
        except torch.cuda.OutOfMemoryError as error:
            if t.micro_batch_size == 1:
                raise UserError(
                    "One sequence is more than the GPU's memory holds: lower --max_new_tokens, or try "
                    "--gradient_checkpointing true, --optimizer adamw_8bit or --precision bf16-pure."
                ) from error
        t.micro_batch_size = (t.micro_batch_size + 1) // 2
        torch.cuda.empty_cache()
        tell(f"the GPU's memory is full: micro-batches of {t.micro_batch_size} from here on; the numbers stay the same")


def learn(t: Trainer, replay_buffer: ReplayBuffer, step: int, generator: torch.Generator) -> None:
    """`epochs_per_step` passes over the buffer, one optimizer step for each mini-batch."""
    config = t.config
    lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
    for group in t.optimizer.param_groups:
        group["lr"] = lr
    t.monitor.add("train/lr", lr)
    t.policy.train()
    with t.monitor.time("time/update"):
        skipped = 0
        for _ in range(config.epochs_per_step):
            for mini_batch in replay_buffer.mini_batches(config.train_batch_size, generator):
                finite = optimizer_step(t, mini_batch)
                skipped += not finite
                t.skipped = 0 if finite else t.skipped + 1
    t.monitor.add("train/skipped_steps", skipped)
    t.policy.eval()


def optimizer_step(t: Trainer, mini_batch: list[Experience]) -> bool:
    """Add up the gradients of the micro-batches, clip, step; False if the loss or the gradient is not finite.

    Weights are those of the whole mini-batch. Where a completion whose advantage is 0 has no gradient (no KL, no
    entropy bonus) it is not computed; and the order is `neighbours`, so that prompts are shared and little of a
    micro-batch is padding. Neither changes the sum.
    """
    o = t.loss.objective
    scale = o.loss_scale_factor or t.config.max_new_tokens
    weights = token_weights([e.num_actions for e in mini_batch], o.loss_agg_mode, scale)
    pairs = [(e, w) for e, w in zip(mini_batch, weights, strict=True) if o.trains_everything or e.advantages != 0]
    if not pairs:  # nothing to learn from: no step, not even one of momentum or weight decay
        return True
    pairs = [pairs[i] for i in neighbours([e for e, _ in pairs])]
    total, entropy, metrics = fitting(t, lambda size: gradients(t, pairs, size))
    for found in metrics:
        t.monitor.add_all(found)
    tokens = sum(e.num_actions for e, _ in pairs)
    t.monitor.add("train/entropy", entropy, tokens)
    grad_norm = t.accelerator.clip_grad_norm_(t.policy.parameters(), t.config.max_norm)
    finite = bool(torch.isfinite(total) & torch.isfinite(grad_norm))
    if finite:
        t.optimizer.step()
        t.loss.adapt(float(entropy) / tokens)
        t.monitor.add("train/loss", len(mini_batch) * total, len(mini_batch))
        t.monitor.add("train/grad_norm", grad_norm)
    t.optimizer.zero_grad()
    return finite


def gradients(t: Trainer, pairs: list[tuple[Experience, Tensor]], size: int) -> tuple[Tensor, Tensor, list[dict]]:
    """Add up the gradients of experiences with their token weights, `size` at a time.

    Returns the loss, the sum of the tokens' entropies, and the metrics of each micro-batch.
    """
    device, full_kl = t.accelerator.device, t.loss.objective.kl_estimator == "full"
    total, entropy, metrics = torch.zeros((), device=device), torch.zeros((), device=device), []
    t.optimizer.zero_grad()  # what an attempt that did not fit has left
    for chosen in batches(pairs, size):
        batch = pad_batch([e for e, _ in chosen]).to(device)
        log_probs, entropies, kl = t.policy(batch, t.reference if full_kl else None)
        loss, found = t.loss(log_probs, batch, torch.stack([w for _, w in chosen]).to(device), entropies, kl)
        t.accelerator.backward(loss)
        total += loss.detach()
        entropy += torch.where(batch.action_mask, entropies.detach(), 0.0).sum()
        metrics.append(found)
    return total, entropy, metrics


def evaluation(t: Trainer) -> None:
    """Held-out accuracy into the log."""
    with t.monitor.time("time/evaluate"):
        t.monitor.add_all(evaluate(t.sampler(), t.tokenizer, t.held_out, t.config, quiet_progress("evaluate")))


def save(t: Trainer, run_dir: Path, step: int) -> None:
    """A checkpoint of this step."""
    state = checkpoint.TrainerState(
        step, t.questions.position, t.optimizer.state_dict(), t.loss.state_dict(), t.skipped
    )
    checkpoint.save_checkpoint(run_dir, state, t.model, t.tokenizer, t.config)


@contextmanager
def keeping(t: Trainer, run_dir: Path, done: int) -> Iterator[None]:
    """Where something fails before any weight is changed (a user's reward, for one), save the steps that are done."""
    position = t.questions.position
    try:
        yield
    except UserError as error:
        t.questions.position = position
        saved = [checkpoint.step_of(p) for p in checkpoint.checkpoints(run_dir)]
        with suppress(UserError):  # the first one is what to say
            if done and done not in saved and due(t.config.checkpoint_interval, done, True):
                save(t, run_dir, done)
        if checkpoint.checkpoints(run_dir):
            raise UserError(f"{error} Put that right, then go on with --resume {run_dir}.") from error
        raise


def give_up(t: Trainer, run_dir: Path, step: int) -> str:
    """The sentence for a run that cannot go on."""
    return (
        f"{t.skipped} optimizer steps in a row had no finite loss and gradient (up to step {step}); the weights are "
        f"those from before them. Look for extreme rewards and log-probabilities; go on with --resume {run_dir} and a "
        "lower --lr, or with --precision fp32 where it is bf16."
    )


def show_samples(t: Trainer, group: Group, advantages: Tensor, step: int) -> None:
    """The first `log_completions` completions of a group, as pages of text."""
    for i, completion in enumerate(group.completions[: t.config.log_completions]):
        question, r, a = group.question, float(group.returns[i]), float(advantages[i])
        page = completion_page(question.question, question.reference, completion.text, r, a)
        t.monitor.text(f"samples/completion_{i + 1}", page, step)


def say_goodbye(run_dir: Path, step: int) -> None:
    """What there is to look at, and how to go on."""
    saved = [p.name for p in checkpoint.checkpoints(run_dir)]
    tell(f"done with step {step}; saved: {', '.join(saved) or 'no checkpoint'}")
    if saved:
        tell(f"look: python run.py --model {run_dir}   go on: python train.py --resume {run_dir} --steps {2 * step}")


def quiet_progress(what: str) -> Callable:
    """A progress bar that disappears when it is done."""
    return lambda items: progress(items, what, leave=False)


def seed_step(seed: int, step: int) -> torch.Generator:
    """Seed everything that is drawn in a step from (seed, step), and return the generator that shuffles its batches."""
    state = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    set_seed(state)
    return torch.Generator().manual_seed(state)


class Interruption:
    """Ctrl-C, a polite kill, or a terminal that goes away: finish the step, save, stop. A second one stops at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Callable[[], bool]:
        # Under nohup a terminal may go away and the run goes on.
        heard = [s for s in self.SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self.before = {s: signal.signal(s, self.handle) for s in heard}
        return lambda: self.came

    def handle(self, number: int, frame: Any) -> None:
        """Note the first signal; obey the second."""
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        tell("\nstopping: this step is finished first; once more stops at once")

    def __exit__(self, *details: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def build(config: Config, resume: str | None) -> Trainer:
    """Load and check everything that a run needs; UserError if something is missing. Writes nothing."""
    columns = {f.name: getattr(config, f.name) for f in fields(Objective)}
    loss = GRPOLoss(build_objective(config.objective, **columns))
    print(config.arithmetic)
    print(describe_objective(config, loss.objective))
    rewards = reward.load_rewards(config.reward)
    accelerator = build_accelerator(config)
    found = checkpoint.checkpoints(Path(resume)) if resume else []
    saved = found[-1] if found else None
    state = checkpoint.load_state(saved, config) if saved else None
    checkpoint.verify_model(Path(located(config.model)))

    questions = load_questions(located(config.dataset), "train", config.dataset_config)
    tokenizer = load_tokenizer(config.model)
    questions, dropped = with_prompts(questions, tokenizer, config.system_prompt, config.max_prompt_tokens)
    print(f"{len(questions)} questions; {dropped} left out: prompt longer than {config.max_prompt_tokens} tokens")
    held_out = held_out_questions(config, tokenizer) if config.eval_interval else []

    set_seed(config.seed)
    model = load_model(str(saved or config.model), config.precision, config.gradient_checkpointing)
    check_model(model, tokenizer, config)
    reference = load_model(config.model, config.precision) if loss.objective.kl_weight > 0 else None
    both = [network for network in (model, reference) if network is not None]
    share = all(share_prompts(n, config.model, config.max_prompt_tokens + config.max_new_tokens) for n in both)
    policy = Policy(model, config.temperature, share, loss.objective.needs_entropy_gradient)
    policy, optimizer = accelerator.prepare(policy, build_optimizer(model, config))
    if reference is not None:
        reference = Policy(reference.requires_grad_(False), config.temperature, share)
        reference = accelerator.prepare_model(reference, evaluation_mode=True)
    stream = QuestionStream(questions, config.seed)
    twin = decoding_copy(model, config.model) if config.precision == "bf16" else None
    monitor = Monitor(alarms_for(loss.objective, config.top_p))
    t = Trainer(
        config, accelerator, tokenizer, policy, reference, optimizer, loss, rewards, stream, held_out, monitor,
        start_step=0, micro_batch_size=config.micro_batch, twin=twin,
    )  # fmt: skip
    if state:
        restore(t, state)
    check_sampler(t.sampler(), policy, tokenizer, questions, config)
    return t


def restore(t: Trainer, state: checkpoint.TrainerState) -> None:
    """Put the trainer where a checkpoint was written; the weights are loaded already."""
    t.start_step, t.questions.position, t.skipped = state.step, state.position, state.skipped
    t.loss.load_state_dict(state.loss, strict=False)  # only an adaptive entropy bonus has a state
    try:
        t.optimizer.load_state_dict(state.optimizer)
    except (ValueError, KeyError) as error:
        raise UserError("The checkpoint has the state of another optimizer; leave --optimizer as it was.") from error
    for group in t.optimizer.param_groups:  # a state brings its own; the knob may have been changed
        group["weight_decay"] = t.config.weight_decay


def describe_objective(config: Config, objective: Objective) -> str:
    """The objective in a line, and what of it cannot show under this config."""
    line = ": ".join(filter(None, [f"objective {config.objective}", objective.summary]))
    if config.optimizer_steps == 1 and objective.has_own_ratio:
        line += (
            "\none optimizer step per rollout: every ratio is 1, so ratio_level, surrogate and clip make no difference"
        )
    return line


@command
def main(argv: list[str]) -> None:
    """Read the command line, build the trainer, open the run folder, train."""
    config, others = parse_config(argv, __doc__)
    resume = others["resume"]
    held = checkpoint.lock(Path(resume)) if resume else None  # before its newest checkpoint is looked for
    trainer = build(config, resume)
    if trainer.start_step >= config.steps:
        raise UserError(f"The run is already at step {trainer.start_step} of {config.steps}; raise --steps to go on.")
    run_dir, held = (Path(resume), held) if resume else checkpoint.new_run_dir(config)
    place = f"from step {trainer.start_step} " if trainer.start_step else "from the start " if resume else ""
    print(f"training {place}in {run_dir} on {trainer.accelerator.device}; watch it: tensorboard --logdir {run_dir}")
    try:
        checkpoint.sweep(run_dir)
        trainer.monitor.open(run_dir, trainer.start_step)
        if resume:  # new_run_dir has written that of a new run
            config.save(run_dir / "config.yaml")
        describe_run(trainer.monitor, (run_dir / "config.yaml").read_text(encoding="utf-8"), config.arithmetic)
        train(trainer, run_dir)
    except OSError as error:
        raise UserError(
            f"Cannot write to {run_dir}: {error.strerror or error}. Put that right, then go on with --resume {run_dir}."
        ) from error
    finally:
        trainer.monitor.close()
        held.release()


if __name__ == "__main__":
    main()
