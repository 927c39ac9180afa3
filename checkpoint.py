"""Save, and resume exactly: run folders, checkpoints, the lock that keeps two runs out of one folder.

A checkpoint `<run_dir>/checkpoint-<step>` is an ordinary Hugging Face folder (model and tokenizer), the run's
config.yaml, and trainer_state.pt: the optimizer, the step and the position in the questions. There is no schedule to
save, since the learning rate is a function of the step, and no state of a random generator, since everything drawn
in a step follows from (seed, step); so an evaluation, or a resume, can never change what the training draws.
A checkpoint is written beside its place and renamed, so it is whole or absent.
"""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from config import Config
from errors import UserError

PREFIX = "checkpoint-"


def new_run_dir(config: Config) -> Path:
    """Make the run's folder and write config.yaml into it; UserError if it holds something already."""
    folder = Path(config.run_dir or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(
                f"{folder} is not empty; choose another --run_dir, or continue the run in it with --resume {folder}."
            )
        config.save(folder / "config.yaml")
    except OSError as error:
        raise UserError(
            f"Cannot write to the run folder {folder}: {error.strerror}; choose another --run_dir."
        ) from error
    return folder


def lock(run_dir: Path) -> FileLock:
    """Hold the folder until the process ends, however it ends; UserError if another process has it."""
    held = FileLock(run_dir / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{run_dir} is in use by another process; wait for it, or choose another --run_dir.") from error
    except OSError as error:
        raise UserError(f"Cannot write to {run_dir}: {error.strerror}; make it writable first.") from error
    return held


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in run_dir.glob(PREFIX + "*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def find_model(folder: str) -> str:
    """`folder`, or its newest checkpoint if it is a run folder; UserError if that has none yet."""
    found = checkpoints(Path(folder))
    if not found and Path(folder, "config.yaml").is_file() and not Path(folder, "config.json").is_file():
        raise UserError(f"The run {folder} has no checkpoint yet; a model is in checkpoint-STEP, or (sft.py) in model.")
    return str(found[-1]) if found else folder


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint holds besides the model."""

    step: int  # steps finished
    position: int  # questions taken
    optimizer: dict[str, Any]
    loss: dict[str, Any] = field(default_factory=dict)  # the adaptive entropy bonus


def save_checkpoint(run_dir: Path, state: TrainerState, model: nn.Module, tokenizer: Any, config: Config) -> Path:
    """Write checkpoint-<step>, then delete all but the newest `keep_checkpoints`.

    Raises:
        UserError: if it could not be written (a full disk); the earlier ones are untouched.
    """
    final, partial = run_dir / f"{PREFIX}{state.step}", run_dir / f".{PREFIX}{state.step}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        config.save(partial / "config.yaml")
        torch.save(vars(state), partial / "trainer_state.pt")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except Exception as error:  # safetensors and torch each report a full disk in a way of their own
        shutil.rmtree(partial, ignore_errors=True)
        kept = ", ".join(p.name for p in checkpoints(run_dir)) or "none"
        raise UserError(f"Cannot write {final}: {error}. Checkpoints that are there: {kept}.") from error
    for old in checkpoints(run_dir)[: -config.keep_checkpoints]:
        shutil.rmtree(old)
    return final


def load_state(checkpoint: Path) -> TrainerState:
    """The trainer's state in a checkpoint, read without unpickling code."""
    try:
        state = torch.load(checkpoint / "trainer_state.pt", map_location="cpu", weights_only=True)
        return TrainerState(**state)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UserError(
            f"{checkpoint} cannot be resumed from: trainer_state.pt is missing or damaged ({type(error).__name__}); "
            "remove this checkpoint to continue from the one before it."
        ) from error
