"""Bad input: one sentence that says what to change, exit code 2, no traceback."""

import difflib
import functools
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

MOST_SHOWN = 24  # names in one sentence
PATIENCE = 15.0  # seconds, longer than a launcher takes to end the others


class UserError(Exception):
    """Something that the user can put right; its text is the sentence that they read."""


def check_choice(name: str, options: Iterable[str], what: str, listed: str = "") -> str:
    """Return `name` if it is one of `options`; else UserError, with the nearest one as a guess.

    Args:
        what: what the options are, in the singular.
        listed: what lists them, for options that are too many for a sentence.
    """
    options = list(options)
    if name in options:
        return name
    near = difflib.get_close_matches(name.lower(), options, n=1)
    guess = f"did you mean {near[0]}?" if near else ""
    every = f"choose one of: {', '.join(options)}."
    if len(options) > MOST_SHOWN:
        every = f"{listed or 'the documentation'} lists them all." if not near else ""
    raise UserError(" ".join(filter(None, [f"There is no {what} {name[:80]!r};", guess, every])))


def quoted(path: object) -> str:
    """A path as a shell takes it, for a command that is printed to be copied."""
    return shlex.quote(str(path))


def is_of_the_disk(error: Exception) -> bool:
    """Whether a disk is the cause; safetensors, tokenizers and torch have no OSError for that."""
    words = "os error", "inline_container"
    return isinstance(error, OSError) or any(word in str(error).lower() for word in words)


def silence() -> None:
    """From here on what is printed goes nowhere: nobody reads it, and each write would fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_sentence(message: str) -> str:
    """A message of argparse with a capital letter and a full stop."""
    return message[0].upper() + message[1:].rstrip(".") + "."


def is_first() -> bool:
    """Whether this process speaks for those that a launcher (torchrun) has started with it."""
    return os.environ.get("LOCAL_RANK") in (None, "", "0")


def is_launched() -> bool:
    """Whether a launcher has started several processes, and this is one of them."""
    return os.environ.get("WORLD_SIZE") not in (None, "", "1")


def refuse_several() -> None:
    """UserError if this is one of several processes, where only one can work."""
    if is_launched():
        raise UserError(
            f"This is one of {os.environ['WORLD_SIZE']} processes, and only train.py works in "
            "several: start it with python, without torchrun or accelerate launch."
        )


def say(error: UserError) -> None:
    """Print it, in one of the processes that a launcher has started.

    What only this one knows it says itself: after a while, in which the launcher ends it if the
    first one has met with the same.
    """
    if not is_first():
        if getattr(error, "shared", False):
            return
        time.sleep(PATIENCE)
    print("error: " + " ".join(str(error).splitlines()), file=sys.stderr, flush=True)


def is_text(text: str) -> bool:
    """Whether text can be written as UTF-8: no half of a character (a lone surrogate) is in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def command(main: Callable[..., None] | None = None, several: bool = False) -> Callable[..., Any]:
    """Decorate a command's `main`: a UserError ends it with exit code 2, Ctrl-C with 130.

    Args:
        several: it works in several processes; others are refused there, and would write twice.
    """
    if main is None:
        return functools.partial(command, several=several)

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> None:
        if not is_first():
            silence()
        if hasattr(sys.stdout, "reconfigure"):  # a console of ASCII shows ? where it has no letter
            sys.stdout.reconfigure(errors="replace")
        code = 0
        try:
            if not several:
                refuse_several()
            main(sys.argv[1:] if argv is None else argv)
        except UserError as error:
            say(error)
            code = 2
        except KeyboardInterrupt:
            if is_first():
                print("stopped", file=sys.stderr)
            code = 130
        except BrokenPipeError:  # `python run.py | head`: whoever read has read enough
            silence()
            code = 141
        if code:  # outside of `except`, where a notebook would show both errors
            sys.exit(code)

    return wrapper
