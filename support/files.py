"""Files and folders that are there as a whole or not at all; and their place, looked at before."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from support.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file by one with this content, which is on the disk before the other one goes.

    Raises:
        OSError: it cannot be written; the file that was there still is.
    """
    fresh = path.with_suffix(".partial")
    try:
        with fresh.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise


def new_folder(text: str | None, flag: str, what: str) -> Path:
    """The folder that a command is to write; UserError if there is something in its place.

    Args:
        text: what stands behind the flag, or None.
        what: what is to be written, with its verb: `the files are`.
    """
    if not text:
        raise UserError(f"Say where {what} to be written: {flag} FOLDER.")
    folder = Path(text).expanduser()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already; choose another {flag}.")
    return folder


@contextmanager
def written_whole(
    folder: Path, flag: str, errors: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[Path]:
    """A new, empty folder beside the place of `folder`, which is renamed to it at the end.

    Args:
        errors: what may be raised where it cannot be written, to be said as a UserError.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    with removed_on_failure(partial):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            partial.replace(folder)
        except errors as error:
            raise UserError(f"Cannot write {folder}: {error}; choose another {flag}.") from error


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Around what fills a folder: nothing of it stays if that fails, or is interrupted."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def open_to_readers(folder: Path) -> None:
    """Let others read the weights in a folder: safetensors writes them for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)
