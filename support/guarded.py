"""Around code that is not ours: a time limit; and what it does to the process is undone.

Two clocks end it, whatever it does with alarms of its own. A timer of the process's computing time
wakes Python code and `re`, which hold the interpreter; a thread wakes what waits (a sleep, a
connection). Both send SIGVTALRM, which hardly anybody uses: reward functions, and math-verify in
them, set SIGALRM.
"""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class TimeUp(BaseException):
    """The time is over.

    Not an Exception, so that an `except Exception` inside the block cannot swallow it.
    """


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp inside the block after `seconds`, and again each second; 0 or less: no limit.

    Off the main thread, and on systems without these signals, there is no limit. A call into C that
    does not look for signals cannot be interrupted; it is noticed when it is over.
    """
    on_main = threading.current_thread() is threading.main_thread()
    if seconds <= 0 or not on_main or not hasattr(signal, "setitimer"):
        yield
        return
    end, over, late = time.monotonic() + seconds, threading.Event(), False

    def stop(number: int, frame: Any) -> None:
        nonlocal late
        if time.monotonic() >= end and not over.is_set():
            late = True
            raise TimeUp

    def wake(main: int) -> None:
        wait = seconds
        while not over.wait(wait):
            signal.pthread_kill(main, signal.SIGVTALRM)
            wait = 1.0

    thread = threading.Thread(target=wake, args=(threading.get_ident(),), daemon=True)
    handler = signal.signal(signal.SIGVTALRM, stop)
    try:
        try:
            thread.start()
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
            yield
        finally:  # the signal may interrupt this one, but then not the outer one
            over.set()
    finally:
        over.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        thread.join()
        # What the block has blocked comes now, while it is expected.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGVTALRM})
        signal.signal(signal.SIGVTALRM, handler or signal.SIG_DFL)
    if late or time.monotonic() >= end:  # swallowed by a bare `except:`, or by a call into C
        raise TimeUp


@contextlib.contextmanager
def restore_globals() -> Iterator[None]:
    """Around a user's code: folder, alarm, torch's modes and random numbers are put back after it.

    The random numbers of the CPU; what is sampled follows from those.
    """
    drawn = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    folder, dtype, grad = os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()
    alarm = signal.getsignal(signal.SIGALRM) if has_alarm() else None
    start, (waiting, interval) = time.monotonic(), timer() if has_alarm() else (0.0, 0.0)
    try:
        yield
    finally:
        if has_alarm() and (signal.getsignal(signal.SIGALRM) is not alarm or timer()[0]):
            left = max(waiting - (time.monotonic() - start), 1e-3) if waiting else 0.0
            signal.setitimer(signal.ITIMER_REAL, left, interval)
            signal.signal(signal.SIGALRM, alarm or signal.SIG_DFL)
        os.chdir(folder)
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        torch.random.set_rng_state(drawn[2])
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


def has_alarm() -> bool:
    """Whether there are alarms here: not on Windows, nor off the main thread."""
    return hasattr(signal, "SIGALRM") and (threading.current_thread() is threading.main_thread())


def timer() -> tuple[float, float]:
    """The alarm that is set: seconds until it rings, and between rings."""
    return signal.getitimer(signal.ITIMER_REAL)
