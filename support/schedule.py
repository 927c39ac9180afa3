"""What surrounds the steps of a run: its folder, signals, seeds, evaluation, log, checkpoints.

The functions are given the trainer of train.py, here `run`. Of it they use what every training loop
has: config, tokenizer, policy, objective, optimizer, loss, questions, held_out, monitor, sample;
and start_step and skipped, which they set.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.utils import set_seed

from support import checkpoint
from support.config import Config
from support.config_file import read_config_file
from support.distributed import (
    SharedError,
    check_alike,
    check_equal,
    in_any,
    is_main,
    num_processes,
    on_main,
    processes,
    weight_sums,
)
from support.errors import UserError, quoted
from support.evaluation import evaluate
from support.metrics import OTHER_QUESTIONS
from support.model import chooses_mps, set_learning_rate
from support.model_card import write_card
from support.monitor import describe_run, log_line, progress, quiet_progress
from support.recording import Recording

Steps = Iterator[tuple[int, torch.Generator]]
# What decides the questions of an evaluation; with others its accuracy is another thing.
EVALUATED = (
    "dataset",
    "dataset_config",
    "question_column",
    "answer_column",
    "eval_dataset",
    "eval_questions",
    "system_prompt",
    "max_prompt_tokens",
    "max_new_tokens",
)


@contextmanager
def open_run(
    config: Config, resume: str | None, build: Callable[[Config, str | None], Any]
) -> Iterator[tuple[Any, Steps]]:
    """Build a run and open its folder, which no other process can have meanwhile.

    Args:
        resume: the folder of the run to continue, or None.
        build: makes the run, and may fail before anything is written.
    Returns:
        the run, and its `scheduled_steps`.
    Raises:
        UserError: the folder is in use, not empty, or cannot be written to; the run is finished.
    """
    with processes(config), ExitStack() as held:
        if resume:  # before its newest checkpoint is looked for
            on_main(lambda: hold(config, resume, held))
        run = build_on(config, resume, build)
        if run.start_step >= config.steps:
            raise UserError(
                f"The run is already at step {run.start_step} of {config.steps}; raise --steps to "
                "go on."
            )
        run.run_dir = Path(resume) if resume else on_main(lambda: hold(config, None, held))
        print(describe_start(run, resume))
        steps = scheduled_steps(run)
        if config.log_completions:
            run.monitor.recording = Recording(run)
        try:
            if is_main():
                open_logs(run, resume)
            yield run, steps
        except OSError as error:
            raise UserError(
                f"Cannot write to {run.run_dir}: {error.strerror or error}. Put that right, then "
                f"go on with --resume {quoted(run.run_dir)}."
            ) from error
        finally:
            steps.close()  # gives the signals back, also after an error
            run.monitor.close()


def hold(config: Config, resume: str | None, held: ExitStack) -> Path:
    """Lock the folder of a run, a new one unless it is resumed; it is given back with `held`."""
    if resume:
        folder, lock = Path(resume), checkpoint.lock(Path(resume), "wait for it, or end it")
    else:
        folder, lock = checkpoint.new_run_dir(config)
    held.callback(lock.release)
    return folder


def describe_start(run: Any, resume: str | None) -> str:
    """Where the run begins, in which folder, and on what: `cpu`, or `4 × cuda`."""
    start = "from the start " if resume else ""
    start = f"from step {run.start_step} " if run.start_step else start
    count = num_processes()
    device = run.policy.device.type if count == 1 else f"{count} × {run.policy.device.type}"
    return (
        f"training {start}in {run.run_dir} on {device}; watch it: tensorboard --logdir "
        f"{quoted(run.run_dir)}"
    )


def open_logs(run: Any, resume: str | None) -> None:
    """The logs of a run, whose first page says what it is."""
    checkpoint.sweep(run.run_dir)
    run.monitor.open(run.run_dir, run.start_step)
    if run.monitor.recording is not None:
        run.monitor.recording.open(run.run_dir, run.start_step)
    if resume:  # new_run_dir has written that of a new run
        # That of the checkpoint: what was asked since then is taken back with its log.
        newest = f"{checkpoint.PREFIX}{run.start_step}" if run.start_step else ""
        before = read_config_file(run.run_dir / newest / "config.yaml")
        if any(before.get(name) != getattr(run.config, name) for name in EVALUATED):
            run.monitor.forget_evaluations()
            run.monitor.add(OTHER_QUESTIONS, 1)  # for the next resume
        run.config.save(run.run_dir / "config.yaml")
    config_yaml = (run.run_dir / "config.yaml").read_text(encoding="utf-8")
    describe_run(run.monitor, config_yaml, summary_of(run))


def summary_of(run: Any) -> str:
    """The sizes of a step and the effective objective, as YAML."""
    summary = {"sizes": run.config.arithmetic, "objective": asdict(run.objective)}
    return yaml.safe_dump(summary, sort_keys=False, allow_unicode=True, width=200)


def build_on(config: Config, resume: str | None, build: Callable[[Config, str | None], Any]) -> Any:
    """Build a run; where --device auto has chosen a Mac's GPU and that fails, on the CPU."""
    if not chooses_mps(config):
        return build(config, resume)
    try:
        return build(config, resume)
    except (UserError, RuntimeError, ValueError, TypeError) as error:
        print(f"Apple's GPU cannot be used ({' '.join(str(error).split())[:200]}): on the CPU")
    return build(replace(config, device="cpu"), resume)


def restore(run: Any, state: checkpoint.TrainerState | None) -> None:
    """Put a run where a checkpoint was written; its weights are loaded already. None: as it is.

    Raises:
        UserError: another optimizer's state; or several processes that differ.
    """
    if state is not None:
        put_back(run, state)
    if num_processes() > 1:
        check_alike(run)


def put_back(run: Any, state: checkpoint.TrainerState) -> None:
    """What a checkpoint holds beside the weights."""
    run.start_step, run.questions.position, run.skipped = state.step, state.position, state.skipped
    # Not strict: only an adaptive entropy bonus has a state.
    run.loss.load_state_dict(state.loss, strict=False)
    try:
        run.optimizer.load_state_dict(state.optimizer)
    except (ValueError, KeyError) as error:
        raise UserError(
            "The checkpoint has the state of another optimizer; leave --optimizer as it was."
        ) from error
    for group in run.optimizer.param_groups:  # the state has its own, and the option may be changed
        group["weight_decay"] = run.config.weight_decay


def scheduled_steps(run: Any) -> Steps:
    """The steps that are left, each with a generator for the order of its mini-batches.

    Before each one: its seed and its learning rate. After it: held-out accuracy and a checkpoint,
    if they are due, and its line of the log. Ends early when a signal asks for it.

    Raises:
        UserError: too many optimizer steps in a row had no finite gradient. A checkpoint is saved.
    """
    config, monitor, first = run.config, run.monitor, run.start_step + 1
    if first == 1 and config.eval_interval:
        evaluate_run(run)
        log(run, 0)
    with Interruption() as interrupted:
        for step in progress(range(first, config.steps + 1), "steps"):
            start = time.perf_counter()
            monitor.add("train/lr", set_learning_rate(run.optimizer, config, step))
            monitor.add("train/skipped_steps", 0)
            yield step, seed_step(config.seed, step)
            monitor.add("time/step", time.perf_counter() - start)
            last, stuck = step == config.steps, 0 < config.max_skipped_steps <= run.skipped
            if evaluated := is_due(config.eval_interval, step, last):
                evaluate_finished(run, step)
            log(run, step)
            stop = in_any(interrupted()) or stuck
            best = config.keep_best and evaluated and on_main(partial(best_step, run)) == step
            if is_due(config.checkpoint_interval, step, last or stop) or best:
                weights = partial(weight_sums, run.policy.model)
                check_equal(f"their weights after step {step}", weights)
                on_main(partial(save, run, step))
            if stop:
                break
    if stuck:
        raise UserError(
            f"{run.skipped} optimizer steps in a row had no finite loss and gradient (up to step "
            f"{step}); the weights are those from before them. Look for extreme rewards and "
            f"log-probabilities; go on with --resume {quoted(run.run_dir)} and a lower --lr, or "
            "with --precision fp32 where it is bf16."
        )
    say_goodbye(run.run_dir, step, config.steps)
    if config.keep_best and is_main() and monitor.best is not None:
        log_line(describe_best(run.run_dir, *monitor.best))


def best_step(run: Any) -> int | None:
    """The step with the best held-out accuracy, where its checkpoint is to be kept."""
    return run.monitor.best[1] if run.config.keep_best and run.monitor.best else None


def describe_best(run_dir: Path, accuracy: float, step: int) -> str:
    """Where the best model of a run is."""
    found = run_dir / f"{checkpoint.PREFIX}{step}"
    where = "by the model before training"
    if step:
        where = f"by {found}" if found.is_dir() else f"at step {step}, which was not saved"
    return f"best held-out accuracy: {accuracy:.3f}, {where}"


def is_due(interval: int, step: int, last: bool) -> bool:
    """Whether something happens now: every `interval` steps and at the last one; 0: never."""
    return interval > 0 and (last or step % interval == 0)


def seed_step(seed: int, step: int) -> torch.Generator:
    """Seed all that is drawn in a step from (seed, step); returns the generator of its batches."""
    state = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    set_seed(state)
    return torch.Generator().manual_seed(state)


def evaluate_run(run: Any) -> None:
    """Held-out accuracy into the log."""
    recording = run.monitor.recording
    keep = (lambda groups: None) if recording is None else recording.keep_answers
    with run.monitor.time("time/evaluate"):
        show = quiet_progress("evaluate")
        run.monitor.add_all(evaluate(run.sample, run.held_out, run.config, show, keep))


def log(run: Any, step: int) -> None:
    """Write what was found in a step: its metrics, and the completions that are recorded."""
    run.monitor.flush(step, run.config.steps)
    if run.monitor.recording is not None:
        run.monitor.recording.write(step)


def evaluate_finished(run: Any, step: int) -> None:
    """The same after a step, which is logged and saved if that fails (a server has died)."""
    with save_finished_steps(run, step):
        try:
            evaluate_run(run)
        except UserError:
            log(run, step)
            raise


def save(run: Any, step: int) -> None:
    """A checkpoint of a finished step."""
    state = checkpoint.TrainerState(
        step,
        run.questions.position,
        run.optimizer.state_dict(),
        run.loss.state_dict(),
        run.skipped,
    )
    evaluated = [row for row in run.monitor.rows if "eval/accuracy" in row]
    objective, newest = run.objective.describe(run.config).splitlines()[0], [{}, *evaluated][-1]
    describe = partial(write_card, config=run.config, step=step, objective=objective, row=newest)
    models = run.policy.model, run.tokenizer
    checkpoint.save_checkpoint(
        run.run_dir, state, *models, run.config, describe, keep=best_step(run)
    )


@contextmanager
def save_finished_steps(run: Any, step: int) -> Iterator[None]:
    """Around what may fail before any weight is changed (a user's reward): lose no finished step.

    Args:
        step: the last finished one.
    """
    position = run.questions.position
    try:
        yield
    except UserError as error:
        run.questions.position = position
        saved = map(checkpoint.step_of, checkpoint.checkpoints(run.run_dir))
        wanted = is_main() and step and step not in saved
        if wanted and is_due(run.config.checkpoint_interval, step, last=True):
            with suppress(UserError):  # the first error is the one to report
                save(run, step)
        if not checkpoint.checkpoints(run.run_dir):
            raise
        shared = isinstance(error, SharedError)  # then the other processes have raised it too
        raise (SharedError if shared else UserError)(
            f"{error} Put that right, then go on with --resume {quoted(run.run_dir)}."
        ) from error


class Interruption:
    """Ctrl-C, a polite kill, or a terminal that goes away: finish the step, save, stop.

    A second signal stops at once. Of several processes each may hear of one signal twice, from the
    system and from their launcher.
    """

    ECHO = 3.0  # seconds

    HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
    SIGNALS = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP)))

    def __init__(self) -> None:
        self.came = False
        self.time = 0.0

    def __enter__(self) -> Any:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return lambda: False  # only the main thread hears of signals
        # Under nohup a terminal may go away, and the run goes on.
        ignored = self.HANGUP and signal.getsignal(self.HANGUP) == signal.SIG_IGN
        heard = [s for s in self.SIGNALS if s != self.HANGUP or not ignored]
        self.before = {s: signal.signal(s, self.handle) for s in heard}
        return lambda: self.came

    def handle(self, number: int, frame: Any) -> None:
        """Note the first signal; obey the second."""
        several = num_processes() > 1
        if several and self.came and time.monotonic() - self.time < self.ECHO:
            return
        if self.came:
            raise KeyboardInterrupt
        self.came, self.time = True, time.monotonic()
        log_line("\nstopping: this step is finished first; once more stops at once")
        if several:
            log_line("(torchrun ends it after 30 seconds, or after its --shutdown-timeout)")

    def __exit__(self, *details: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def say_goodbye(run_dir: Path, step: int, steps: int) -> None:
    """What there is to look at, and how to go on: to the end, or from there."""
    saved = [path.name for path in checkpoint.checkpoints(run_dir)]
    log_line(f"done with step {step}; saved: {', '.join(saved) or 'no checkpoint'}")
    if saved:
        folder, further = quoted(run_dir), f" --steps {2 * step}" if step == steps else ""
        log_line(
            f"look: python run.py --model {folder}   closer: python report.py {folder}   "
            f"go on: python train.py --resume {folder}{further}"
        )
