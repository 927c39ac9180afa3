"""Exact resume: a run that was killed and one that never was have the same metrics and weights, bit
for bit.

The processes that are really killed, at random moments, are those of benchmarks/kill_resume.py.
"""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import metrics
from steps import copy_of, shared_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from transformers import LlamaConfig, LlamaForCausalLM

import train
from benchmarks.families import make_folder
from objectives.table import OBJECTIVES
from support import checkpoint, schedule
from support.command_line import parse_config
from support.errors import UserError

CHOICES = [
    *([f"--objective={name}"] for name in OBJECTIVES),
    [
        "--kl_weight=0.05",
        "--warmup_steps=3",
        "--group_size=3",
        "--rollouts_per_step=5",
        "--train_batch_size=7",
        "--micro_batch_size=4",
    ],
    [
        "--objective=dapo",
        "--reward",
        "accuracy",
        "--reward_weights",
        "1",
    ],  # groups without spread, replaced
    [
        "--entropy_target=0.5",
        "--entropy_weight=0.01",
        "--top_entropy=0.5",
        "--temperature=0.8",
        "--eval_samples=2",
    ],
    ["--precision=bf16", "--gradient_checkpointing", "--kl_weight=0.1"],
    ["--precision=bf16-pure", "--weight_decay=0.1"],
]


def same_checkpoint(run, other, name):
    """Weights and optimizer, bit for bit."""
    states = [
        torch.load(folder / name / "trainer_state.pt", weights_only=True) for folder in (run, other)
    ]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    weights = [(folder / name / "model.safetensors").read_bytes() for folder in (run, other)]
    return weights[0] == weights[1]


# So that every group has a spread and every step trains: longer completions get less.
ALWAYS = ["--reward", "accuracy", "length_penalty", "--reward_weights", "1", "0.5"]


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """The flags for a random model of one layer, which takes a third of the time, and for a reward
    that differs in each of its groups."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=121, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("one_layer")
    make_folder(LlamaForCausalLM(config), folder)
    return [f"--model={folder}/model", "--reward", f"{folder}/even.py:even", "length_penalty"]


@pytest.mark.parametrize("flags", CHOICES, ids=" ".join)
def test_a_resumed_run_equals_one_that_never_stopped(
    tiny_run, tmp_path, few_questions, one_layer, flags
):
    """Killed in step 2 and resumed from step 1: two epochs over each rollout, an evaluation in
    every step."""
    # Few questions, so that the run crosses the end of an epoch.
    lines = (few_questions / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:5]))
    few = [f"--dataset={tmp_path}/few.jsonl", f"--eval_dataset={few_questions}"]
    sizes = ["--rollouts_per_step=3", "--micro_batch_size=8", "--max_new_tokens=12"]
    often = ["--steps=2", "--epochs_per_step=2", "--eval_interval=1", "--eval_questions=5"]
    # The random layer seldom ends a completion, and DAPO does not train those that are cut off.
    own = [] if "--reward" in flags or "--objective=dapo" in flags else one_layer
    always = [*ALWAYS, "--checkpoint_interval=1", *own]
    whole = tiny_run("whole", *few, *sizes, *often, *always, *flags)
    assert all(row["train/grad_norm"] > 0 for row in metrics(whole)[1:]), (
        "every step must have trained"
    )
    killed = copy_of(whole, tmp_path / "killed")
    shutil.rmtree(killed / "checkpoint-2")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "half a li')
    tiny_run("killed", f"--resume={killed}")
    assert metrics(killed) == metrics(whole)
    assert same_checkpoint(killed, whole, "checkpoint-2")
    config, _ = parse_config([f"--resume={killed}"])
    assert checkpoint.load_state(killed / "checkpoint-2", config).position > 5, "an epoch has ended"


def test_tensorboard_shows_one_curve(tiny_run, tmp_path):
    """Each step once and as in metrics.jsonl, though killed twice, the last time in the middle of a
    record.

    Read without TensorBoard's own clean-up (purge_orphaned_data), which not all of its readers do.
    """
    killed = tiny_run("killed", "--steps=4", "--checkpoint_interval=2", "--eval_interval=1")
    for _ in range(2):
        shutil.rmtree(killed / "checkpoint-4")
        for events in killed.glob("events.*"):
            with events.open("ab") as file:
                file.write(b"\x18\x00\x00\x00")  # the begin of a record's length
        tiny_run("killed", f"--resume={killed}")
    log = EventAccumulator(
        str(killed), size_guidance={"scalars": 0, "tensors": 0}, purge_orphaned_data=False
    )
    log.Reload()
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(5))
    tags = {name for row in rows for name in row} - {"step"}
    assert tags == set(log.Tags()["scalars"])
    for tag in tags:
        shown = [(e.step, e.value) for e in log.Scalars(tag)]
        assert shown == [(row["step"], pytest.approx(row[tag])) for row in rows if tag in row], tag
    starts = [
        e
        for f in sorted(killed.glob("events.*"))
        for e in EventFileLoader(str(f)).Load()
        if e.HasField("session_log")
    ]
    assert [e.step for e in starts][-1] == 3, (
        "and a reader that is looking on is told from where on to forget"
    )
    pages = [e.step for e in log.Tensors("samples/group_1_best/text_summary")]
    assert pages == list(range(1, 5))


WHOLE = ["--steps=3", "--eval_interval=2", *ALWAYS]  # of a shared run that is never stopped


def test_killed_before_the_first_checkpoint(tiny_run):
    """Nothing to resume from but the folder: the run begins again, and step 0 is in the log
    once."""
    killed = tiny_run("killed", *WHOLE, "--steps=1", "--checkpoint_interval=0")
    tiny_run("killed", f"--resume={killed}", "--steps=3", "--checkpoint_interval=2")
    whole = shared_run(*WHOLE)
    assert metrics(killed) == metrics(whole) and len(metrics(whole)) == 4


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Whoever runs the tests may ignore some: nohup, or a shell that has put them in the
    background."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers():
    """What happens at each of the three signals now."""
    return {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


def kill_in_step(monkeypatch, number, step=1):
    """Have the process killed in the middle of a step."""
    real, calls = train.add_log_probs, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(train, "add_log_probs", interrupt)
    return lambda: monkeypatch.setattr(train, "add_log_probs", real)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_polite_kill_saves_first_and_loses_nothing(
    tiny_run, monkeypatch, signals_as_in_a_terminal, number
):
    """The signal comes in step 2 of 3; the step is finished and saved, and the resumed run equals
    the whole one."""
    whole = shared_run(*WHOLE)
    flags = [*WHOLE, "--checkpoint_interval=100"]
    undo = kill_in_step(monkeypatch, number, step=2)
    stopped = tiny_run("stopped", *flags)
    assert [p.name for p in checkpoint.checkpoints(stopped)] == ["checkpoint-2"]
    assert [row["step"] for row in metrics(stopped)] == [0, 1, 2]
    assert handlers() == signals_as_in_a_terminal, "what was there before is there again"
    undo()
    tiny_run("stopped", f"--resume={stopped}")
    assert metrics(stopped) == metrics(whole)
    assert same_checkpoint(stopped, whole, "checkpoint-3")


def test_the_second_ctrl_c_stops_at_once(
    tiny_run, tmp_path, monkeypatch, capsys, signals_as_in_a_terminal
):
    real = train.add_log_probs

    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train, "add_log_probs", interrupt)
    with pytest.raises(SystemExit) as caught:
        tiny_run("stopped", "--eval_interval=0")
    assert caught.value.code == 130 and "once more stops at once" in capsys.readouterr().out
    assert not checkpoint.checkpoints(tmp_path / "stopped") and not metrics(tmp_path / "stopped")
    assert handlers() == signals_as_in_a_terminal, "what was there before is there again"


@pytest.mark.parametrize(
    ("place", "error", "raised"),
    [
        ("add_log_probs", UserError("the input is wrong"), SystemExit),
        ("add_log_probs", RuntimeError("the code is wrong"), RuntimeError),
        ("update", RuntimeError("the code is wrong"), RuntimeError),
        ("update", OSError(28, "No space left on device"), SystemExit),
    ],
    ids=["input", "code", "code in the update", "disk"],
)
def test_after_an_error_in_a_step_the_signals_are_what_they_were(
    tiny_run, tmp_path, monkeypatch, signals_as_in_a_terminal, place, error, raised
):
    """And the folder is free again."""
    seen = []

    def fail(*args):
        seen.append(handlers())
        raise error

    monkeypatch.setattr(train, place, fail)
    with pytest.raises(raised):
        tiny_run("failed", *ALWAYS, "--steps=1", "--eval_interval=0", "--group_size=2")
    assert [type(h.__self__) for h in seen[0].values()] == [schedule.Interruption] * 3
    assert handlers() == signals_as_in_a_terminal
    checkpoint.lock(tmp_path / "failed").release()


def test_a_reward_that_fails_costs_no_step(tiny_run, tmp_path, capsys):
    """It fails in step 3, once; the steps that were done are saved, and the run goes on as if
    nothing had been."""
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "def short(prompts, completions, **columns):\n"
        "    calls = Path(__file__).with_name('calls')\n"
        "    calls.write_text(calls.read_text() + '.' if calls.exists() else '.')\n"
        "    if len(calls.read_text()) == 3:\n"
        "        raise OSError('the judge does not answer')\n"
        "    return [-len(c) / 50 for c in completions]\n"
    )
    flags = [
        f"--reward={tmp_path}/mine.py:short",
        "--checkpoint_interval=100",
        "--steps=4",
        "--eval_interval=3",
    ]
    with pytest.raises(SystemExit):
        tiny_run("failed", *flags)
    said, failed = capsys.readouterr().err, tmp_path / "failed"
    assert "the judge does not answer" in said and f"go on with --resume {failed}." in said
    assert [p.name for p in checkpoint.checkpoints(failed)] == ["checkpoint-2"]
    tiny_run("failed", f"--resume={failed}")
    (tmp_path / "calls").write_text("." * 10)
    whole = tiny_run("whole", *flags)
    assert metrics(failed) == metrics(whole) and same_checkpoint(failed, whole, "checkpoint-4")


def test_a_failure_does_not_save_a_checkpoint_twice(tiny_run, tmp_path, monkeypatch):
    """Where the last step was saved already, and where there is none; nor where the user wants no
    checkpoints."""
    folder = copy_of(shared_run(), tmp_path / "a")  # with a checkpoint of step 2, its last one
    saved, real = [], schedule.save
    monkeypatch.setattr(schedule, "save", lambda run, step: (saved.append(step), real(run, step)))
    (tmp_path / "mine.py").write_text(
        "def bad(prompts, completions, **columns):\n    return [1 / 0]\n"
    )
    flags = [f"--reward={tmp_path}/mine.py:bad", "--eval_interval=0"]
    for argv in ([f"--resume={folder}", "--steps=4", *flags], ["--checkpoint_interval=0", *flags]):
        with pytest.raises(SystemExit):
            tiny_run("a" if argv[0].startswith("--resume") else "b", *argv)
    assert saved == []
    (tmp_path / "late.py").write_text(
        "calls = []\ndef late(prompts, completions, **columns):\n"
        "    calls.append(1)\n    return [1 / (len(calls) != 3) for _ in completions]\n"
    )
    with pytest.raises(SystemExit):  # in step 3, and step 2 was saved in this process
        tiny_run("c", f"--reward={tmp_path}/late.py:late", "--steps=4", "--eval_interval=0")
    assert saved == [2]


def test_under_nohup_a_lost_terminal_stops_nothing(tiny_run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        kill_in_step(monkeypatch, signal.SIGHUP, step=1)
        rows = metrics(tiny_run("a", "--steps=2", "--eval_interval=0"))
        assert [row["step"] for row in rows] == [1, 2]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
