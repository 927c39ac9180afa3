"""support/checkpoint.py: whole or absent, what is damaged is named, and the only good one is never
deleted."""

import ctypes
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FEW, ROOT, metrics
from steps import copy_of, forked, shared_run

import train
from support import checkpoint
from support.checkpoint import (
    PREFIX,
    SUMS,
    TrainerState,
    checkpoints,
    discard,
    find_damage,
    save_checkpoint,
)
from support.config import Config
from support.errors import UserError


@pytest.fixture
def saved(tmp_path, model, tokenizer):
    """Saves checkpoints of a random network into one run folder, by step."""

    def save(step, **options):
        state = TrainerState(step, 8 * step, {"step": step})
        return save_checkpoint(
            tmp_path, state, model, tokenizer, Config(preset="tiny", model="tiny/model", **options)
        )

    return save


def names(run_dir):
    return [p.name for p in checkpoints(run_dir)]


def flip(file, place=-100):
    """One bit of a file."""
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= 1
    file.write_bytes(data)


def test_the_sums_are_those_of_sha256sum(saved, tmp_path):
    folder = saved(3)
    lines = (folder / SUMS).read_text().splitlines()
    assert sorted(line[66:] for line in lines) == sorted(
        p.name for p in folder.iterdir() if p.name != SUMS
    )
    for line in lines:
        assert hashlib.sha256((folder / line[66:]).read_bytes()).hexdigest() == line[:64]
    found = subprocess.run(
        ["sha256sum", "--strict", "-c", SUMS], cwd=folder, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"


def saved_without(folder, name):
    """As a process leaves it that has saved everything but this file."""
    (folder / name).unlink()
    (folder / SUMS).unlink()
    checkpoint.write_sums(folder)


BROKEN = {
    "a bit of the weights": (
        lambda f: flip(f / "model.safetensors"),
        "model.safetensors is not what was written",
    ),
    "a bit of the optimizer": (
        lambda f: flip(f / "trainer_state.pt"),
        "trainer_state.pt is not what was written",
    ),
    "a bit of the sums": (
        lambda f: flip(f / SUMS, 0),
        "chat_template.jinja is not what was written",
    ),
    "weights cut short": (
        lambda f: os.truncate(f / "model.safetensors", 1000),
        "model.safetensors is not what was",
    ),
    "empty weights": (
        lambda f: os.truncate(f / "model.safetensors", 0),
        "model.safetensors is not what was written",
    ),
    "a file is gone": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "the sums are gone": (lambda f: (f / SUMS).unlink(), "SHA256SUMS cannot be read"),
    "the sums are empty": (lambda f: (f / SUMS).write_text(""), "SHA256SUMS is empty"),
    "the sums are cut short": (lambda f: os.truncate(f / SUMS, 40), "SHA256SUMS is cut short"),
    "the sums are binary": (
        lambda f: (f / SUMS).write_bytes(b"\xff\xfe\x00"),
        "SHA256SUMS cannot be read",
    ),
    "weights that nobody has saved, and sums that agree": (
        lambda f: saved_without(f, "model.safetensors"),
        "SHA256SUMS names no weights, or no config.json",
    ),
    "no config.json, and sums that agree": (
        lambda f: saved_without(f, "config.json"),
        "SHA256SUMS names no weights, or no config.json",
    ),
    "another config": (
        lambda f: (f / "config.yaml").write_text("preset: tiny\n"),
        "config.yaml is not what was",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_damaged_is_named_and_the_one_before_offered(saved, tmp_path, case):
    for step in (2, 4, 6):
        folder = saved(step)
    spoil, reason = BROKEN[case]
    spoil(folder)
    config = Config(preset="tiny", model="tiny/model")
    with pytest.raises(UserError) as caught:
        checkpoint.load_state(folder, config)
    said = str(caught.value)
    assert f"{folder} is damaged: {reason}" in said and said.endswith(
        f"remove it (rm -r {folder}) to go on from checkpoint-4."
    )
    if (folder / SUMS).exists():
        for path in (tmp_path, folder):
            with pytest.raises(UserError, match="is damaged"):
                checkpoint.find_model(str(path))
    flip(tmp_path / "checkpoint-4" / "config.json")
    with pytest.raises(UserError, match="to go on from checkpoint-2"):
        checkpoint.load_state(folder, config)
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match="begin again: there is no whole one before it"):
        checkpoint.load_state(folder, config)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"], "and nothing is deleted by us"


def test_a_checkpoint_of_another_run_is_refused(saved, tmp_path):
    folder = saved(2)
    with pytest.raises(UserError, match=r"belongs to another run \(step 2 of tiny/model\)"):
        checkpoint.load_state(folder, Config(preset="tiny", model="another/model"))
    moved = folder.rename(tmp_path / "checkpoint-9")
    with pytest.raises(UserError, match="belongs to another run"):
        checkpoint.load_state(moved, Config(preset="tiny", model="tiny/model"))


class Boom:
    """What unpickling without care would run."""

    def __reduce__(self):
        return os.mkdir, ("boom",)


@pytest.mark.parametrize(
    "write", [pickle.dump, lambda thing, file: torch.save({"step": thing}, file)]
)
def test_nothing_is_unpickled(saved, tmp_path, monkeypatch, write):
    """A stranger's folder, with sums that agree: torch's loader for plain tensors refuses what is
    not one."""
    monkeypatch.chdir(tmp_path)
    folder = saved(2)
    with (folder / "trainer_state.pt").open("wb") as file:
        write(Boom(), file)
    (folder / SUMS).unlink()
    checkpoint.write_sums(folder)
    assert find_damage(folder) is None
    with pytest.raises(UserError, match="made by another program or version"):
        checkpoint.load_state(folder, Config(preset="tiny", model="tiny/model"))
    assert not (tmp_path / "boom").exists()


def test_keep_checkpoints_never_deletes_the_one_just_written(saved, tmp_path):
    for step in (1, 2, 3):
        saved(step, keep_checkpoints=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    (tmp_path / "checkpoint-999").mkdir()  # somebody's; newer by its name only
    saved(4, keep_checkpoints=1)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-999"]


def test_a_write_that_fails_anywhere_leaves_the_others(saved, tmp_path, monkeypatch):
    """At every call that touches the disk in turn, until none fails: the disk is full, and the
    older one stays good."""
    good = saved(2)
    real = {name: getattr(checkpoint, name) for name in ("write_sums", "sync", "sha256", "discard")}
    for fatal in range(1000):
        calls = []

        def counted(name, calls=calls, fatal=fatal):
            def call(*args):
                calls.append(name)
                if len(calls) == fatal + 1:
                    raise OSError(28, "No space left on device")
                return real[name](*args)

            return call

        for name in real:
            monkeypatch.setattr(checkpoint, name, counted(name))
        try:
            saved(4, keep_checkpoints=5)
        except UserError as error:
            assert "No space left on device" in str(error) and "checkpoint-2" in str(error)
            assert names(tmp_path) in (["checkpoint-2"], ["checkpoint-2", "checkpoint-4"])
            for name, function in real.items():
                monkeypatch.setattr(checkpoint, name, function)
            assert find_damage(good) is None and not list(tmp_path.glob(".*"))
            if (
                names(tmp_path)[-1] == "checkpoint-4"
            ):  # only the last sync failed: what is there is whole
                assert find_damage(tmp_path / "checkpoint-4") is None
                discard(tmp_path / "checkpoint-4")
            continue
        break
    assert fatal > 10 and names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_everything_is_on_the_disk_before_it_has_its_name(saved, tmp_path, monkeypatch):
    """Each file is synced before its hash is written, the hashes before the name, and the name at
    last."""
    done = []
    real_sync, real_rename, real_sha = checkpoint.sync, type(tmp_path).rename, checkpoint.sha256
    monkeypatch.setattr(
        os, "fsync", lambda handle: done.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
    )
    monkeypatch.setattr(checkpoint, "sync", lambda path: real_sync(path))
    monkeypatch.setattr(
        checkpoint, "sha256", lambda file: (done.append(("hash", str(file))), real_sha(file))[1]
    )
    monkeypatch.setattr(
        type(tmp_path),
        "rename",
        lambda a, b: (done.append(("rename", str(a))), real_rename(a, b))[1],
    )
    final = saved(3)
    partial = str(tmp_path / ".checkpoint-3.partial")
    files = [f"{partial}/{p.name}" for p in final.iterdir() if p.name != SUMS]
    assert len(files) >= 5
    for file in files:
        assert done.index(("sync", file)) < done.index(("hash", file))
    last = [
        ("sync", f"{partial}/{SUMS}"),
        ("sync", partial),
        ("rename", partial),
        ("sync", str(tmp_path)),
    ]
    assert [step for step in done if step in last] == last and done[-4:] == last


def test_a_checkpoint_that_is_deleted_in_part_has_no_name(saved, tmp_path, monkeypatch):
    saved(1)

    def stopped(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "remove", lambda path: stopped(path) if path.exists() else None)
    with pytest.raises(KeyboardInterrupt):
        discard(tmp_path / "checkpoint-1")
    assert names(tmp_path) == [] and (tmp_path / ".checkpoint-1.deleted").is_dir()


def test_links_and_files_with_a_checkpoints_name(tiny_run, tmp_path):
    """A checkpoint that was moved to a larger disk, and a file where the next one will be; the
    link's target stays."""
    folder = tiny_run("a", "--steps=2", "--checkpoint_interval=1", "--eval_interval=0")
    (folder / "checkpoint-1").rename(tmp_path / "elsewhere")
    (folder / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    (folder / "checkpoint-3").write_text("hi")
    (folder / ".checkpoint-9.deleted").symlink_to(tmp_path / "elsewhere")
    tiny_run("a", f"--resume={folder}", "--steps=4", "--keep_checkpoints=2")
    assert names(folder) == ["checkpoint-3", "checkpoint-4"]
    assert find_damage(tmp_path / "elsewhere") is None
    assert not list(folder.glob(".checkpoint*"))


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(
    saved, tmp_path, monkeypatch, capsys
):
    for step in (1, 2):
        saved(step)

    def busy(path):
        if path.name == ".checkpoint-1.deleted":
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoint, "remove", busy)
    saved(3, keep_checkpoints=1)
    checkpoint.sweep(tmp_path)
    assert (
        capsys.readouterr().out.count("checkpoint-1 cannot be deleted: Device or resource busy")
        == 1
    )
    assert names(tmp_path)[-1] == "checkpoint-3"
    (tmp_path / ".checkpoint-1.deleted").mkdir()
    checkpoint.sweep(tmp_path)
    assert ".checkpoint-1.deleted cannot be deleted" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_not_saved(saved, tmp_path, model):
    saved(2, keep_checkpoints=1)
    with torch.no_grad():
        list(model.parameters())[-1][0] = float("inf")
    with pytest.raises(UserError, match="not finite, so it is not saved.*checkpoint-2.*lower --lr"):
        saved(4, keep_checkpoints=1)
    assert names(tmp_path) == ["checkpoint-2"] and find_damage(tmp_path / "checkpoint-2") is None


def test_what_a_killed_process_left_is_swept(tiny_run, tmp_path):
    folder = copy_of(shared_run(), tmp_path / "a")
    for name in (".checkpoint-3.partial", ".checkpoint-1.deleted"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    assert names(folder) == ["checkpoint-2"]
    tiny_run("a", f"--resume={folder}", "--steps=3")
    assert not list(folder.glob(".checkpoint*")) and names(folder)[-1] == "checkpoint-3"


@pytest.mark.parametrize(
    ("done", "words"), [(False, "in use by another process"), (True, "is not empty")]
)
def test_two_processes_that_begin_at_once(tmp_path, monkeypatch, done, words):
    """The second comes between the first one's look at the folder and its lock, and is still at
    work, or done."""
    config = Config(preset="tiny", run_dir=str(tmp_path / "run"))
    real, inner = checkpoint.lock, []

    def late(folder):
        if not inner:
            inner.append(None)
            inner[0] = checkpoint.new_run_dir(config)
            if done:
                inner[0][1].release()
        return real(folder)

    monkeypatch.setattr(checkpoint, "lock", late)
    with pytest.raises(UserError, match=words):
        checkpoint.new_run_dir(config)
    assert (tmp_path / "run" / "config.yaml").is_file()
    inner[0][1].release()


def test_a_damaged_checkpoint_as_the_model_of_another_run(tiny_run, tmp_path, capsys):
    """What the alarm reward_falls advises: --model runs/NAME/checkpoint-STEP."""
    folder = copy_of(shared_run(), tmp_path / "a")
    flip(folder / "checkpoint-2" / "model.safetensors")
    with pytest.raises(SystemExit):
        tiny_run("b", f"--model={folder}/checkpoint-2")
    assert (
        "model.safetensors is not what was written" in capsys.readouterr().err
        and not (tmp_path / "b").exists()
    )


def test_a_new_run_that_cannot_write_leaves_no_folder(tmp_path, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Config, "save", full)
    with pytest.raises(UserError, match="No space left on device; choose another --run_dir"):
        checkpoint.new_run_dir(Config(preset="tiny", run_dir=str(tmp_path / "a" / "b" / "run")))
    assert not list(tmp_path.iterdir())


def test_another_model_on_resume_is_refused(tmp_path, capsys):
    folder = copy_of(shared_run(), tmp_path / "a")
    before = metrics(folder, timeless=False)
    with pytest.raises(SystemExit):
        train.main([f"--resume={folder}", "--model=tiny/other", "--steps=4"])
    assert "trains tiny/model; to begin with another model" in capsys.readouterr().err
    assert metrics(folder, timeless=False) == before
    assert PREFIX + "2" in names(folder)


CAN_MOUNT = not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode


@pytest.mark.skipif(CAN_MOUNT, reason="the tests below do it with a file system that is full")
def test_a_disk_that_takes_no_more(tmp_path):
    """The real thing, in a process of its own: no file may grow beyond 2 MB, less than the weights
    need."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20, 2 * 2**20));"
        "import train; train.main(sys.argv[1:])"
    )
    flags = [
        "--preset=tiny",
        "--device=cpu",
        "--steps=2",
        "--rollouts_per_step=2",
        "--group_size=2",
        "--train_batch_size=4",
    ]
    flags += ["--max_new_tokens=4", "--eval_interval=0", f"--run_dir={tmp_path}/run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Cannot write" in errors[0] and "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("*checkpoint*"))


def may_mount():
    """Give this process, which has one thread, a file system of its own: `unshare -rm`."""
    ids = {"uid_map": f"0 {os.getuid()} 1", "setgroups": "deny", "gid_map": f"0 {os.getgid()} 1"}
    new_namespace, new_user = 0x20000, 0x10000000
    if ctypes.CDLL(None, use_errno=True).unshare(new_namespace | new_user):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in ids.items():
        Path("/proc/self", name).write_text(text)


def mount(folder, size):
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(["mount", *options], check=True)


def use_small_disks(here):
    """Train until a disk is full, go on with more room; and on one that the logs fill."""
    may_mount()
    told, run, flags = {}, here / "disk" / "run", short_run()

    def command(name, *argv):
        code, _, error = forked(lambda: train.main(list(argv)))
        told[name] = code, error

    mount(here / "disk", "15m")
    command("full", *flags, f"--run_dir={run}", "--checkpoint_interval=1")
    for folder in run.glob("checkpoint-*"):
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)
    told["files"] = os.listdir(run)
    subprocess.run(["mount", "-o", "remount,size=64m", str(here / "disk")], check=True)
    command("resumed", f"--resume={run}")
    shutil.copytree(run, here / "resumed")
    mount(here / "logs", "40k")
    many = ["--steps=40", "--checkpoint_interval=0"]
    command("logs", *flags, f"--run_dir={here}/logs/run", *many)
    (here / "told.json").write_text(json.dumps(told))


@cache
def small_disks():
    """What happened on two small file systems: a folder, and by name the exit code and stderr."""
    here = FEW[0].parent / "small-disks"
    here.mkdir()
    code, _, error = forked(lambda: use_small_disks(here))
    assert code == 0, error
    return here, json.loads((here / "told.json").read_text())


def short_run():
    """The flags of a short run, but for its folder."""
    sizes = [
        "--rollouts_per_step=2",
        "--group_size=4",
        "--train_batch_size=8",
        "--max_new_tokens=8",
    ]
    run = ["--preset=tiny", "--device=cpu", "--steps=4", "--eval_interval=0"]
    return [*run, *sizes, f"--dataset={FEW[0]}"]


needs_mount = pytest.mark.skipif(
    not CAN_MOUNT,
    reason="this system does not let a process mount a file system of its own; see the test before",
)


@needs_mount
def test_a_full_disk(tmp_path):
    """No room for all checkpoints: a sentence, those before it whole; with room again the run goes
    on exactly."""
    here, told = small_disks()
    code, said = told["full"]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in said, said
    assert "were free); make room, then go on with --resume" in said
    assert "Checkpoints that are there: checkpoint-1" in said
    assert "checkpoint-1" in told["files"] and ".partial" not in str(told["files"])
    assert told["resumed"][0] == 0, told["resumed"][1]
    train.main([*short_run(), f"--run_dir={tmp_path}/whole"])
    assert metrics(here / "resumed") == metrics(tmp_path / "whole")
    resumed, whole = (
        (run / "checkpoint-4" / "model.safetensors").read_bytes()
        for run in (here / "resumed", tmp_path / "whole")
    )
    assert resumed == whole


@needs_mount
def test_a_disk_that_is_full_of_logs():
    """TensorBoard's file, or the metrics, whichever is first."""
    code, said = small_disks()[1]["logs"]
    assert code == 2 and "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error: Cannot write")]
    assert len(errors) == 1


def accuracies(monkeypatch, *values):
    """Evaluations that find these, one after another."""
    left = iter(values)

    def evaluate(*arguments):
        value = next(left)
        found = {"eval/accuracy": value, "eval/accuracy_low": value, "eval/accuracy_high": value}
        found |= {"eval/accuracy_flexible": value, "eval/completion_tokens": 5.0}
        return {name: (number, 1) for name, number in found.items()}

    monkeypatch.setattr("support.schedule.evaluate", evaluate)


BEST = ["--keep_best=true", "--keep_checkpoints=1", "--eval_interval=1", "--rollouts_per_step=2", "--max_new_tokens=4"]  # fmt: skip


def test_the_best_checkpoint_is_kept(tiny_run, monkeypatch, capsys):
    """Saved when it is evaluated, kept beside the newest, replaced by a better one alone."""
    accuracies(monkeypatch, 0.1, 0.5, 0.3, 0.5, 0.2)
    folder = tiny_run("run", *BEST, "--steps=4", "--checkpoint_interval=4")
    assert names(folder) == ["checkpoint-1", "checkpoint-4"], "the first of two equal ones"
    assert f"best held-out accuracy: 0.500, by {folder}/checkpoint-1" in capsys.readouterr().out
    accuracies(monkeypatch, 0.4, 0.6, 0.0)
    tiny_run("run", f"--resume={folder}", "--steps=7")
    assert names(folder) == ["checkpoint-6", "checkpoint-7"], "the resumed run knows the best"
    assert f"0.600, by {folder}/checkpoint-6" in capsys.readouterr().out


def test_the_best_alone_and_none_at_all(tiny_run, monkeypatch, capsys):
    """With no other checkpoint; and where training has made it worse."""
    accuracies(monkeypatch, 0.1, 0.2, 0.1)
    folder = tiny_run("a", *BEST, "--steps=2", "--checkpoint_interval=0")
    assert names(folder) == ["checkpoint-1"]
    accuracies(monkeypatch, 0.9, 0.2, 0.1)
    folder = tiny_run("b", *BEST, "--steps=2", "--checkpoint_interval=0")
    assert names(folder) == []
    assert "0.900, by the model before training" in capsys.readouterr().out


def test_a_best_step_that_was_not_saved(tiny_run, monkeypatch, capsys):
    """Asked for on resume, after the step that was best."""
    accuracies(monkeypatch, 0.1, 0.5, 0.3)
    folder = tiny_run("run", *BEST, "--keep_best=false", "--steps=2", "--checkpoint_interval=2")
    accuracies(monkeypatch, 0.2)
    tiny_run("run", f"--resume={folder}", "--steps=3", "--keep_best=true")
    assert names(folder) == ["checkpoint-3"]
    assert "0.500, at step 1, which was not saved" in capsys.readouterr().out


def test_other_questions_are_other_questions_after_a_second_resume_too(tiny_run, monkeypatch):
    """An accuracy on other questions is no rival, however often the run is resumed after that."""
    accuracies(monkeypatch, 0.9, 0.9)
    folder = tiny_run("run", *BEST, "--steps=1", "--eval_questions=2")
    accuracies(monkeypatch, 0.5, 0.1)
    tiny_run("run", f"--resume={folder}", "--steps=3", "--eval_questions=3")
    assert names(folder) == ["checkpoint-2", "checkpoint-3"]
    accuracies(monkeypatch, 0.2)
    tiny_run("run", f"--resume={folder}", "--steps=4")
    assert names(folder) == ["checkpoint-2", "checkpoint-4"], "the best on these questions stays"


def test_a_resume_that_was_killed_does_not_bring_other_questions_back(tiny_run, monkeypatch):
    """It had not come to a checkpoint: its log is taken back, and what it knew of the questions."""
    accuracies(monkeypatch, 0.9, 0.9)
    folder = tiny_run("run", *BEST, "--steps=1", "--eval_questions=2")
    accuracies(monkeypatch)  # the first evaluation fails
    with pytest.raises(RuntimeError):  # a generator cannot let StopIteration out
        tiny_run("run", f"--resume={folder}", "--steps=3", "--eval_questions=3")
    accuracies(monkeypatch, 0.5, 0.1)
    tiny_run("run", f"--resume={folder}", "--steps=3")
    assert names(folder) == ["checkpoint-2", "checkpoint-3"]
