"""support/distributed.py: two and three processes give what one gives, and an error of one ends all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FEW, ROOT, metrics
from hypothesis import given
from hypothesis import strategies as st
from processes import REWARDS, record

import check_data
import merge
import report
import to_verl
from objectives.table import OBJECTIVES
from support import schedule
from support.config import Config
from support.distributed import my_part, processes
from support.errors import UserError
from support.model import load_model
from support.recording_file import FILE, read_rows

SMALL = [
    "--preset=tiny", "--device=cpu", "--rollouts_per_step=3", "--group_size=5", "--train_batch_size=15",
    "--micro_batch_size=4", "--max_new_tokens=12", "--eval_interval=0", "--steps=1", "--checkpoint_interval=0",
]  # fmt: skip
ONE = ["--rollouts_per_step=1", "--train_batch_size=5"]
# Nothing here can be divided evenly by 2 or by 3.
WHOLE = [
    "--preset=tiny", "--device=cpu", "--rollouts_per_step=9", "--group_size=5", "--train_batch_size=16",
    "--micro_batch_size=8", "--max_new_tokens=20", "--epochs_per_step=2", "--kl_weight=0.05", "--top_entropy=0.5",
    "--dynamic_sampling=2", "--eval_interval=2", "--eval_questions=7", "--eval_samples=2", "--checkpoint_interval=2",
    "--steps=4",
]  # fmt: skip
# What objectives ask for beside a reward that differs; each with a weight of 1.
BESIDE = {"gdpo": ["length_penalty"], "dapo": ["soft_overlong"]}


def jobs(folder):
    """Command lines by name; each run gets a folder of its name in `folder`."""
    (folder / "own.py").write_text(REWARDS)
    several = ["--reward", "accuracy", f"{folder}/own.py:digits", "--reward_weights", "1", "0.5"]
    differs = ["--reward", f"{folder}/own.py:differs"]
    found = {
        "whole": [*WHOLE, *several],
        "adapters": [*WHOLE, *several, "--adapter_rank=4", "--steps=2"],
        "half": [*WHOLE, *several, "--steps=2"],
        "4bit": [*SMALL, *differs, "--adapter_rank=4", "--quantize=4bit", "--steps=2"],
        "one question": [*SMALL, *differs, *ONE, "--steps=2"],
    }
    for name in OBJECTIVES:
        rewards = [*differs, *BESIDE.get(name, [])]
        weights = ["--reward_weights", *["1"] * (len(rewards) - 1)]
        found[name] = [*SMALL, *rewards, *weights, f"--objective={name}"]
    place = [f"--dataset={FEW[0]}"]
    return {name: [*argv, *place, f"--run_dir={folder / name}"] for name, argv in found.items()}


def same(one, other):
    """Whether two parts of a recording say the same, numbers to rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == pytest.approx(other, abs=2e-3, rel=2e-2) if type(one) is float else one == other


def launch(count, *arguments, wait=True):
    """`torchrun` with so many processes; what it has printed, or the running launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(count), *map(str, arguments)]
    pipe = subprocess.PIPE
    running = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    if not wait:
        return running
    out, err = running.communicate(timeout=300)
    return running.returncode, out, err


@cache
def results(count, folder):
    """What the jobs of `folder` did in so many processes, by name."""
    folder.mkdir(parents=True)
    todo = jobs(folder)
    if count == 3:
        todo = {name: todo[name] for name in ("whole", "adapters", "one question", "grpo")}
    if count == 1:
        return {name: record(argv) for name, argv in todo.items()}
    (folder / "jobs.json").write_text(json.dumps(list(todo.values())))
    code, out, err = launch(count, "tests/processes.py", folder / "jobs.json", folder)
    assert code == 0, out + err
    assert out.count("training from") == 0 and out.count("training in") == len(todo), "once each"
    found = (torch.load(folder / f"{i}.pt", weights_only=False) for i in range(len(todo)))
    return dict(zip(todo, found, strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder for the runs of this file, one inside it for each number of processes."""
    return tmp_path_factory.mktemp("processes")


@pytest.mark.parametrize(
    ("count", "name"),
    [(3, "whole"), (3, "adapters"), (3, "one question"), (3, "grpo")]
    + [(2, name) for name in ("whole", "adapters", "4bit", "one question", *OBJECTIVES)],
)
def test_several_processes_do_what_one_does(place, count, name):
    """The same completions and rewards; gradients to 1e-6; the metrics; the weights at the end."""
    alone, beside = (results(n, place / str(n))[name] for n in (1, count))
    assert len(alone) == len(beside) and any("gradient" in one for one in alone)
    limit = 1e-6  # of the first gradient; then the weights differ too, in their last bits
    for one, other in zip(alone, beside, strict=True):
        assert one.keys() == other.keys()
        if "gradient" in one:
            gap = (one["gradient"] - other["gradient"]).norm() / one["gradient"].norm()
            assert gap < limit, gap
            limit = 2e-5
        else:
            assert one["ids"] == other["ids"] and torch.equal(one["returns"], other["returns"])
            torch.testing.assert_close(one["log_probs"], other["log_probs"], rtol=0, atol=1e-5)
    rows = [metrics(place / str(n) / name) for n in (1, count)]
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    if name in ("whole", "adapters"):
        assert any(column.startswith("logged/") for column in rows[0][-1])
        ends = [load_model(str(place / str(n) / name / "checkpoint-2"), "fp32") for n in (1, count)]
        for one, other in zip(*(model.parameters() for model in ends), strict=True):
            # Where a gradient is nearly 0, Adam makes a step of about lr of its rounding.
            gap = (one - other).abs()
            assert (gap > 2e-6).double().mean() < 0.01 and gap.max() < 1e-4


@pytest.mark.parametrize("count", [2, 3])
def test_the_recording_is_that_of_one_process(place, count):
    """The same completions, in the same optimizer steps, whichever process trained them."""
    for n in (1, count):
        results(n, place / str(n))
    one, other = (read_rows(place / str(n) / "whole" / FILE)[0] for n in (1, count))
    assert [row["step"] for row in one] == [0, 1, 2, 2, 3, 4, 4]
    assert any(c.get("updates") for row in one for c in row.get("completions", []))
    assert same(one, other)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 3)])
def test_a_run_goes_on_with_another_number_of_processes(place, tmp_path, first, then):
    """Two steps in some processes and two in others are the four steps of one."""
    results(first, place / str(first))
    shutil.copytree(place / str(first) / "half", tmp_path / "half")
    argv = [f"--resume={tmp_path / 'half'}", "--steps=4"]
    if then == 1:
        record(argv)
    else:
        code, out, err = launch(then, "train.py", *argv)
        assert code == 0, out + err
    results(1, place / "1")
    rows = [metrics(folder) for folder in (place / "1" / "whole", tmp_path / "half")]
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


@given(
    st.lists(st.integers(1, 50), max_size=40),
    st.integers(1, 9),
)
def test_every_item_is_in_one_part(costs, count):
    """In order; and no part is larger than its share by more than the largest item."""
    parts = [range(len(costs))[my_part(costs, rank, count)] for rank in range(count)]
    assert [i for part in parts for i in part] == list(range(len(costs)))
    for part in parts:
        assert sum(costs[i] for i in part) <= sum(costs) / count + max(costs, default=0)


def test_an_error_of_one_process_is_one_sentence(place, tmp_path):
    """A reward that fails in the second process alone: no process waits for it."""
    own = tmp_path / "own.py"
    own.write_text(REWARDS)
    flags = [*SMALL, "--rollouts_per_step=9", "--steps=30", f"--dataset={FEW[0]}"]
    flags += [f"--reward={own}:fails_in_one", f"--run_dir={tmp_path / 'run'}"]
    start = time.monotonic()
    code, out, err = launch(2, "train.py", *flags)
    assert code != 0 and time.monotonic() - start < 60
    assert err.count("error: The reward") == 1 and "no such answer" in err, err


# What a program does to one of two processes, before `train.main` of its arguments.
BEGIN = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
from support import errors, schedule
from support.monitor import Monitor
own, argv = os.environ["RANK"] == "1", sys.argv[1:]
"""
OTHER_WEIGHTS = """
real = train.restore
def restore(run, state):
    with train.torch.no_grad():
        next(run.policy.parameters()).view(-1)[3] += 0.25 * own
    real(run, state)
train.restore = restore
"""
OTHER_OPTIONS = "argv += ['--lr=1e-9'] * own\n"
MISTAKE = "errors.PATIENCE, argv = 1.0, argv + ['--lr=-1'] * own\n"
LATE = """
real, close = train.score, Monitor.close
def fails(*arguments):
    if own:
        raise errors.UserError("This cannot be.")
    return real(*arguments)
train.score = fails
Monitor.close = lambda monitor: time.sleep(4 * (not own)) or close(monitor)
"""


@pytest.mark.parametrize(
    ("program", "says", "made"),
    [
        (OTHER_WEIGHTS, "The processes differ in the weights to begin with", False),
        (OTHER_OPTIONS, "The processes differ in their options", False),
        (MISTAKE, "--lr is -1", False),
        (LATE, "This cannot be.", True),
    ],
)
def test_what_one_process_alone_meets_is_said_once(tmp_path, program, says, made):
    """Other weights, other options, an error before they know of each other; and one that the first process says late."""
    (tmp_path / "program.py").write_text(f"{BEGIN}{program}train.main(argv)\n")
    flags = [*SMALL, f"--dataset={FEW[0]}", f"--run_dir={tmp_path / 'run'}"]
    code, _, err = launch(2, tmp_path / "program.py", *flags)
    assert code != 0 and err.count("error: ") == err.count(f"error: {says}") == 1, err
    assert (tmp_path / "run").exists() == made


def test_several_processes_need_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match="start several processes with torchrun"),
        processes(Config()),
    ):
        pass


@pytest.mark.parametrize("main", [check_data.main, to_verl.main, report.main, merge.main])
def test_other_commands_are_refused_in_several_processes(monkeypatch, capsys, main):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 2 and "only train.py works in several" in capsys.readouterr().err


def test_a_signal_that_comes_twice_at_once_is_one(monkeypatch, capsys):
    """From the system and from the launcher; alone, the second one stops."""
    stop = schedule.Interruption()
    monkeypatch.setattr(schedule, "num_processes", lambda: 2)
    stop.handle(signal.SIGTERM, None)
    stop.handle(signal.SIGTERM, None)
    stop.time -= stop.ECHO
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGTERM, None)
    assert "--shutdown-timeout" in capsys.readouterr().out


def checkpoints(run):
    """The steps that have a checkpoint."""
    return sorted(
        int(folder.name.removeprefix("checkpoint-")) for folder in run.glob("checkpoint-*")
    )


def started(run, after, *argv):
    """A run in two processes that has saved a step after `after`."""
    running = launch(2, "train.py", *argv, wait=False)
    wait_for(lambda: max(checkpoints(run), default=0) > after)
    return running


def test_signals_and_a_killed_process(tmp_path):
    """SIGINT finishes the step and saves; SIGKILL of a process ends all, and loses no checkpoint."""
    run = tmp_path / "run"
    flags = [*SMALL, "--steps=100000", "--checkpoint_interval=2", f"--dataset={FEW[0]}"]
    running = started(run, 2, *flags, f"--run_dir={run}")
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert "stopping: this step is finished first" in out, err
    last = checkpoints(run)[-1]
    assert f"done with step {last};" in out

    running = started(run, last, f"--resume={run}")
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    start = time.monotonic()
    running.communicate(timeout=60)
    assert running.returncode != 0 and time.monotonic() - start < 30
    saved = checkpoints(run)[-1]
    assert saved > last
    record([f"--resume={run}", f"--steps={saved + 1}"])


def wait_for(condition, seconds=90):
    """Until it is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)
