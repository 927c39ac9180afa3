"""Run folders, checkpoints, and the lock that keeps two runs out of one folder.

A checkpoint `<run_dir>/checkpoint-<step>` is an ordinary Hugging Face folder (model and tokenizer),
the run's config.yaml, and trainer_state.pt: the optimizer, the step and the position in the
questions. There is no schedule to save, since the learning rate is a function of the step, and no
state of a random generator, since everything drawn in a step follows from (seed, step); so an
evaluation, or a resume, can never change what the training draws.

A checkpoint is whole or absent: it is written beside its place, synced to the disk, and renamed.
SHA256SUMS, written last, has the hash of each file (`sha256sum -c SHA256SUMS` checks them too);
nothing is loaded that does not agree with it, and nothing in it is unpickled but by torch's loader
for plain tensors.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from support.config import Config, resolve_path
from support.config_file import read_config_file
from support.errors import UserError, is_of_the_disk, quoted
from support.files import open_to_readers
from support.model_card import save_tokenizer

PREFIX = "checkpoint-"
SUMS = "SHA256SUMS"


def new_run_dir(config: Config, resumable: bool = True) -> tuple[Path, FileLock]:
    """Make the run's folder, hold it, and write config.yaml; UserError if it is not empty.

    Args:
        resumable: what is begun in it can be resumed.
    """
    folder = Path(
        config.run_dir or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    ).expanduser()
    made = []
    try:
        made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        refuse_occupied(folder, resumable)
        held = lock(folder)
        refuse_occupied(folder, resumable)  # by one who was faster
        config.save(folder / "config.yaml")
    except OSError as error:
        with suppress(OSError):
            (folder / ".lock").unlink(missing_ok=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise UserError(
            f"Cannot write to the run folder {folder}: {error.strerror}; choose another --run_dir."
        ) from error
    return folder, held


def refuse_occupied(folder: Path, resumable: bool = True) -> None:
    """UserError if there is anything in the folder but a lock."""
    if any(p.name != ".lock" for p in folder.iterdir()):
        go_on = f", or continue the run in it with --resume {quoted(folder)}" if resumable else ""
        raise UserError(f"{folder} is not empty; choose another --run_dir{go_on}.")


def refuse_model(folder: Path) -> None:
    """UserError for a folder that holds a model and no run of train.py: not to be resumed."""
    models = [folder / "model", *folder.glob("*.safetensors")]
    found = next((path for path in models if path.exists()), None)
    if found is not None and not checkpoints(folder):
        model = found if found.is_dir() else folder
        raise UserError(
            f"{folder} holds a model and no run that could go on; begin a run with it: --model "
            f"{quoted(model)}."
        )


def lock(run_dir: Path, instead: str = "wait for it, or choose another --run_dir") -> FileLock:
    """Hold the folder until the process ends, in whatever way; UserError if another one has it."""
    held = FileLock(run_dir / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{run_dir} is in use by another process; {instead}.") from error
    except OSError as error:
        raise UserError(
            f"Cannot write to {run_dir}: {error.strerror}; make it writable first."
        ) from error
    return held


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [
        p
        for p in run_dir.glob(PREFIX + "*")
        if p.name.removeprefix(PREFIX).isdecimal() and p.is_dir()
    ]
    return sorted(found, key=step_of)


def find_model(folder: str) -> str:
    """`folder`, or its newest checkpoint if it is a run's; UserError if there is no whole one."""
    found = checkpoints(Path(folder))
    known = ("config.yaml", "config.json", "adapter_config.json", SUMS)
    there = [name for name in known if Path(folder, name).is_file()]
    if not found and there == ["config.yaml"]:
        raise UserError(
            f"The run {folder} has no checkpoint; a model is in checkpoint-STEP, or (sft.py) in "
            "model."
        )
    verify_model(found[-1] if found else Path(folder))
    return str(found[-1]) if found else folder


def verify_model(folder: Path) -> None:
    """UserError if the folder of a model is a checkpoint of ours, and damaged.

    Other programs write files of the same name, in formats of their own.
    """
    if (folder / SUMS).is_file() and (folder / "config.yaml").is_file():
        verify(folder)


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint holds besides the model."""

    step: int  # steps finished
    position: int  # questions taken
    optimizer: dict[str, Any]
    loss: dict[str, Any] = field(default_factory=dict)  # the adaptive entropy bonus
    skipped: int = 0  # optimizer steps without a finite gradient, the last ones in a row


def save_checkpoint(
    run_dir: Path,
    state: TrainerState,
    model: nn.Module,
    tokenizer: Any,
    config: Config,
    describe: Callable[[Path], None] = lambda folder: None,
    keep: int | None = None,
) -> Path:
    """Write checkpoint-<step>, then delete older ones: the newest `keep_checkpoints` stay.

    Args:
        describe: writes what a reader of the folder should know into it.
        keep: the step of one that stays, too.
    Raises:
        UserError: if it could not be written (a full disk), or if weights are not finite; the
            earlier ones are untouched.
    """
    final, partial = run_dir / f"{PREFIX}{state.step}", run_dir / f".{PREFIX}{state.step}.partial"
    kept = ", ".join(p.name for p in checkpoints(run_dir)) or "none"
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        raise UserError(
            f"Step {state.step} has left numbers in {broken[0]} that are not finite, so it is not "
            f"saved; go on from an earlier checkpoint ({kept}) with a lower --lr."
        )
    try:
        discard(partial)
        model.save_pretrained(partial)
        open_to_readers(partial)
        save_tokenizer(partial, tokenizer, config)
        describe(partial)
        config.save(partial / "config.yaml")
        torch.save(vars(state), partial / "trainer_state.pt")
        write_sums(partial)
        discard(final)
        partial.rename(final)
        sync(run_dir)
    except Exception as error:  # safetensors and torch each have their own for a full disk
        free = shutil.disk_usage(run_dir).free / 1e6
        shutil.rmtree(partial, ignore_errors=True)
        room = "); put that right"
        if is_of_the_disk(error):
            room = f"; {free:.0f} MB were free); make room"
        raise UserError(
            f"Cannot write {final} ({error}{room}, then go on with --resume {quoted(run_dir)}. "
            f"Checkpoints that are there: {kept}."
        ) from error
    delete_older(run_dir, state.step, config.keep_checkpoints, keep)
    return final


def delete_older(run_dir: Path, step: int, count: int, keep: int | None) -> None:
    """Of the checkpoints up to `step`, leave the newest `count`, and that of the step `keep`."""
    older = [p for p in checkpoints(run_dir) if step_of(p) <= step and step_of(p) != keep]
    for old in older[:-count]:
        tolerantly(discard, old)


def write_sums(folder: Path) -> None:
    """SHA256SUMS, when everything that it vouches for is on the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        sync(file)
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    sync(folder / SUMS)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """The hash of a file's bytes, as `sha256sum` prints it."""
    found = hashlib.sha256()
    with file.open("rb") as data:
        while piece := data.read(2**20):
            found.update(piece)
    return found.hexdigest()


def discard(folder: Path) -> None:
    """Delete a checkpoint; one that is deleted in part has no checkpoint's name any more."""
    if os.path.lexists(folder):
        doomed = folder.with_name(f".{folder.name.lstrip('.')}.deleted")
        remove(doomed)
        folder.rename(doomed)
        remove(doomed)


def remove(path: Path) -> None:
    """Delete a folder with all that is in it, a file, or a link (and not what it points to)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tolerantly(delete: Callable[[Path], None], path: Path) -> None:
    """Delete if that can be done, else say so: one folder too many is no reason to stop a run."""
    try:
        delete(path)
    except OSError as error:
        print(f"{path} cannot be deleted: {error.strerror}")


def sweep(run_dir: Path) -> None:
    """Delete what a killed process has left of checkpoints that it was writing or deleting."""
    for leftover in run_dir.glob(f".{PREFIX}*"):
        tolerantly(remove, leftover)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None if nothing is."""
    try:
        lines = (checkpoint / SUMS).read_text(encoding="utf-8").splitlines()
        for expected, _, name in (line.partition("  ") for line in lines):
            if not name:
                return f"{SUMS} is cut short"
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if sha256(checkpoint / name) != expected:
                return f"{name} is not what was written (its SHA-256 differs)"
    except (OSError, UnicodeDecodeError) as error:
        return f"{SUMS} cannot be read ({getattr(error, 'strerror', None) or error})"
    if not lines:
        return f"{SUMS} is empty"
    names = {line.partition("  ")[2] for line in lines}
    configs = {"config.json", "adapter_config.json"}
    if not configs & names or not any(name.endswith(".safetensors") for name in names):
        return f"{SUMS} names no weights, or no config.json"
    return None


def verify(checkpoint: Path) -> None:
    """UserError if a checkpoint is damaged, with the newest one before it that is whole."""
    reason = find_damage(checkpoint)
    if reason is None:
        return
    beside = checkpoints(checkpoint.parent)
    before = beside[: beside.index(checkpoint)] if checkpoint in beside else []
    whole = next((p.name for p in reversed(before) if find_damage(p) is None), None)
    instead = f"go on from {whole}" if whole else "begin again: there is no whole one before it"
    advice = f"remove it (rm -r {quoted(checkpoint)}) to {instead}"
    if not checkpoint.name.startswith(PREFIX):  # moved or copied by somebody
        advice = "copy it again from its run, or choose another model"
    raise UserError(f"{checkpoint} is damaged: {reason}; {advice}.")


def load_state(checkpoint: Path, config: Config) -> TrainerState:
    """The trainer's state in a checkpoint whose files are whole; no code in it is unpickled."""
    verify(checkpoint)
    try:
        state = TrainerState(
            **torch.load(checkpoint / "trainer_state.pt", map_location="cpu", weights_only=True)
        )
        model = read_config_file(checkpoint / "config.yaml")["model"]
    except Exception as error:  # torch.load raises many kinds for a file that it did not write
        raise UserError(
            f"{checkpoint} cannot be resumed from, it was made by another program or version "
            f"({type(error).__name__}: {error}); remove it to continue from the one before it."
        ) from error
    if state.step != step_of(checkpoint) or model != config.model:
        raise UserError(
            f"{checkpoint} belongs to another run (step {state.step} of {model}); remove it to "
            "continue this one."
        )
    return state


def load_newest(resume: str | None, config: Config) -> tuple[str | None, TrainerState | None]:
    """The newest checkpoint of the run that is resumed: its folder and its state; or None.

    A model that is one of our checkpoints is verified too, before anything is loaded from it.
    """
    found = checkpoints(Path(resume)) if resume else []
    state = load_state(found[-1], config) if found else None
    verify_model(Path(resolve_path(config.model)))
    return (str(found[-1]) if found else None), state
