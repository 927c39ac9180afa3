"""Single steps of the real training loop, for the tests: with groups of their own, or stopped
before the update. And finished runs, each trained once for all tests of a process."""

import os
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import FEW

import train
from replay_buffer import ReplayBuffer
from support import policy
from support.command_line import parse_config
from support.model import set_learning_rate
from support.schedule import seed_step


def build(tmp_path, dataset, *flags):
    """A trainer of the bundled task with a small rollout, its log open in `tmp_path`."""
    config, others = parse_config([
        "--preset=tiny", "--device=cpu", "--rollouts_per_step=3", "--group_size=8", "--train_batch_size=24",
        "--micro_batch_size=24", "--max_new_tokens=48", "--eval_interval=0", f"--dataset={dataset}",
        f"--run_dir={tmp_path}/run", *flags,
    ])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        # As in `tiny_run`.
        patch.setattr(train, "check_sampler", lambda *arguments: None)
        patch.setattr(policy, "check_model", lambda *arguments: None)
        trainer = train.build(config, others["resume"])
    tmp_path.mkdir(exist_ok=True)
    trainer.monitor.open(tmp_path)
    return trainer


def sample(trainer, count=None, step=1):
    """Scored groups, with the random numbers of a step."""
    seed_step(trainer.config.seed, step)
    return train.sample_and_score(trainer, count or trainer.config.rollouts_per_step)


def one_step(trainer, groups=None, update=None, step=1):
    """One turn of the loop in `train.train`; with these groups, or another update.

    Returns its replay buffer.
    """
    buffers = []

    class Kept(ReplayBuffer):
        def __init__(self):
            super().__init__()
            buffers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "ReplayBuffer", Kept)
        if groups is not None:
            patch.setattr(train, "sample_and_score", lambda trainer, count: groups)
        if update is not None:
            patch.setattr(train, "update", update)
        set_learning_rate(trainer.optimizer, trainer.config, step)
        trainer.monitor.add_up("train/skipped_steps", 0)  # once, also after `fill`
        train.train(trainer, iter([(step, seed_step(trainer.config.seed, step))]))
    return buffers[0]


def fill(trainer, groups=None):
    """The replay buffer as the update would find it."""
    return one_step(trainer, groups, update=lambda *arguments: None)


def learn(trainer, buffer, step=1, generator=None):
    """The updates of one step."""
    config = trainer.config
    set_learning_rate(trainer.optimizer, config, step)
    trainer.monitor.add_up("train/skipped_steps", 0)  # once, also after `fill`
    generator = generator or torch.Generator().manual_seed(0)
    for mini_batch in buffer.mini_batches(
        config.train_batch_size, config.epochs_per_step, generator
    ):
        train.update(trainer, mini_batch)


@cache
def shared_run(*flags):
    """The folder of a finished run of the bundled task: small, and trained once for all tests of a
    process that give the same flags. To look at; whoever writes takes a copy."""
    folder = Path(tempfile.mkdtemp(dir=FEW[0].parent, prefix="shared")) / "run"
    train.main([
        "--preset=tiny", "--device=cpu", "--steps=2", "--rollouts_per_step=4", "--group_size=4", "--train_batch_size=8",
        "--micro_batch_size=4", "--max_new_tokens=16", "--eval_interval=0", "--eval_questions=20", "--checkpoint_interval=2",
        f"--dataset={FEW[0]}", f"--run_dir={folder}", *flags,
    ])  # fmt: skip
    return folder


def copy_of(run, folder):
    """A copy of a run in `folder`; returns it."""
    return shutil.copytree(run, folder)


def forked(work, lines=None):
    """Call `work` in a process of its own, which need not import everything again.

    Its output is a pipe, from which only the first `lines` lines are read if that is given. Returns
    its exit code, its output, and what it printed as errors.
    """
    ours, theirs = os.pipe()
    with tempfile.TemporaryFile("w+") as error:
        child = os.fork()
        if not child:
            code = 1
            try:
                os.close(ours)
                os.dup2(theirs, 1)
                os.dup2(error.fileno(), 2)
                # pytest has put files of its own in their place.
                sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
                signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as an interpreter does
                work()
                code = 0
            except SystemExit as ended:
                code = ended.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                with suppress(OSError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            output = "".join(pipe) if lines is None else "".join(islice(pipe, lines))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        error.seek(0)
        return code, output, error.read()
