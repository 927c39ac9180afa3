"""What the benchmarks share: the project on the path, words about the machine, files, pictures.

Import it before anything of the project; then `python benchmarks/NAME.py` works from everywhere.
"""

import contextlib
import io
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))

from support.errors import UserError, check_choice  # noqa: E402

# Student's t, 97.5 %, by degrees of freedom.
QUANTILES = [math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


# --------------------------------------------------------------------- words for a report


def machine(device: str = "cpu") -> str:
    """The machine in words: cores and names, never where it is."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = names[0] if names else name
    words = f"{os.cpu_count()} CPU cores, {name}"
    return f"{words}, {torch.cuda.get_device_name()}" if device == "cuda" else words


def versions() -> str:
    """What ran."""
    return (
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def command_line(argv: list[str]) -> str:
    """The command, each absolute path shortened to its last name."""
    words = [Path(a).name if Path(a).expanduser().is_absolute() else a for a in argv]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval (Student's t); nan of a single value."""
    count = len(values)
    if count < 2:
        return values[0], math.nan
    quantile = QUANTILES[min(count, len(QUANTILES)) - 1]
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(count)


# --------------------------------------------------------------------- the command line


def whole(text: str) -> int:
    """A whole number of 0 or more."""
    if not text.isdecimal():
        raise UserError(f"{text!r} is not a whole number of 0 or more.")
    return int(text)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{text!r} is not a whole number of 1 or more.")
    return int(text)


def available(device: str) -> str:
    """The device, with `auto` decided; UserError for one that is not there."""
    check_choice(device, ("auto", "cuda", "cpu"), "device")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA GPU here; --device cpu measures on the CPU.")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


# --------------------------------------------------------------------- time


def synchronize() -> None:
    """Wait for what was asked of a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


# --------------------------------------------------------------------- files


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; of a file that is being written, those that are whole."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without what depends on the clock or the machine."""
    rows = read_jsonl(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_lines(path: Path, lines: list[str]) -> None:
    """A report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def folder_of(path: Path) -> Path:
    """The folder, made if it is not there; UserError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be a folder ({error.strerror}); name another.") from error
    return path


def silent_run(
    name: str, train: Callable[[list[str]], Any], flags: list[str]
) -> list[dict[str, Any]]:
    """The metrics of a run of train.py in this process, without a word and with no folder left.

    Args:
        name: of the run, for the sentence of an error.
        train: takes the flags.
    Raises:
        UserError: what the run ended with.
    """
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        run_dir = Path(folder) / "run"
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(said):
            try:
                train([*flags, f"--run_dir={run_dir}"])
            except SystemExit as error:
                told = said.getvalue().strip().splitlines() or [f"exit code {error.code}"]
                raise UserError(f"{name}: {told[-1].removeprefix('error: ')}") from None
        return read_jsonl(run_dir / "metrics.jsonl")


def put_between(page: Path, name: str, lines: list[str]) -> None:
    """Put lines between `<!-- name -->` and `<!-- /name -->` of a page; the rest of it stays.

    Raises:
        UserError: the page has no such marks. It is left as it is.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    made, text = "\n".join([begin, *lines, end]), page.read_text(encoding="utf-8")
    text, found = re.subn(f"{begin}.*?{end}", lambda _: made, text, flags=re.S)
    if not found:
        raise UserError(f"Put the marks {begin} and {end} into {page.name}, where the text goes.")
    page.write_text(text, encoding="utf-8")


def table(head: list[str], rows: Iterable[list[Any]]) -> list[str]:
    """A Markdown table, as lines."""
    first, *others = ("| " + " | ".join(map(str, cells)) + " |" for cells in [head, *rows])
    return [first, "|" + "---|" * len(head), *others]


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files, without frames at the top and on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    return plt
