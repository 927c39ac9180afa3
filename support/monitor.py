"""Where metrics go: TensorBoard, metrics.jsonl, the console and its progress bars."""

import json
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from support.alarms import LONGEST, QUIET, Alarm, active_alarms
from support.distributed import is_main
from support.errors import UserError, silence
from support.files import write_whole
from support.metrics import (
    GLOSSARY,
    OTHER_QUESTIONS,
    REWARD_MEANING,
    SOMETIMES,
    Metrics,
    Number,
    charts_of,
    console_line,
    fold,
    meaning,
)

try:
    import resource
except ImportError:  # Windows
    resource = None


def progress(items: Iterable, what: str, leave: bool = True) -> tqdm:
    """A progress bar, of the first process; silent where stderr is not a terminal."""
    return tqdm(
        items, desc=what, leave=leave, disable=None if is_main() else True, dynamic_ncols=True
    )


def quiet_progress(what: str) -> Callable[[Iterable], tqdm]:
    """A progress bar that disappears when it is done."""
    return partial(progress, what=what, leave=False)


def log_line(text: str) -> None:
    """Print beside a progress bar; when nobody reads it any more (`| head`), the run goes on."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        silence()


class Monitor:
    """Collects the metrics of a step, writes them out, and watches them with its alarms.

    Of several processes only the first one opens its monitor; the others collect, and forget.
    """

    def __init__(self, alarms: dict[str, Alarm] | None = None) -> None:
        self.sums: dict[str, list] = {}
        self.writer: SummaryWriter | None = None
        self.alarms = alarms or {}
        self.recording: Any = None  # what report.py shows: a Recording, if there is one
        self.charted, self.laid_out = set(SOMETIMES), False  # the charts of this run's metrics
        # What the alarms remember: the last steps, and all evaluations before them.
        self.rows: deque[dict[str, float]] = deque()
        self.evaluated: list[dict[str, float]] = []
        self.best: tuple[float, int] | None = None  # held-out accuracy, and the step that had it

    def open(self, run_dir: Path, start_step: int = 0) -> None:
        """Open the run's logs; what a resumed run had written after `start_step` is taken back."""
        self.file = run_dir / "metrics.jsonl"
        # A run that starts again from nothing evaluates at step 0 again.
        first = start_step + 1 if start_step else 0
        for row in keep_before(self.file, first):
            if OTHER_QUESTIONS in row:
                self.forget_evaluations()
            self.compare(row["step"], row)
            self.remember(row)
        for events in sorted(run_dir.glob("events.out.tfevents.*")):
            keep_events_before(events, first)
        threading.excepthook = ignore_full_disk
        self.writer = SummaryWriter(run_dir, purge_step=first)

    def add(self, name: str, total: Number, count: Number = 1) -> None:
        """Add to a metric; its value is sum / count. Tensors stay where they are until `flush`."""
        meaning(name)
        held = self.sums.setdefault(name, [0, 0])
        held[0] = held[0] + total
        held[1] = held[1] + count

    def add_up(self, name: str, value: Number) -> None:
        """Add to a metric whose value is the sum over the step, not a mean."""
        self.add(name, value, count=0 if name in self.sums else 1)

    def add_all(self, *metrics: Metrics) -> None:
        """Add several, given as name: (sum, count)."""
        for each in metrics:
            for name, (total, count) in each.items():
                self.add(name, total, count)

    @contextmanager
    def time(self, name: str) -> Iterator[SimpleNamespace]:
        """Time a block, to the end of its work on the GPU; the blocks of a step add up.

        Yields what has the time as its `seconds` when the block is over.
        """
        timer, start = SimpleNamespace(seconds=0.0), time.perf_counter()
        yield timer
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        timer.seconds = time.perf_counter() - start
        self.add_up(name, timer.seconds)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """A page of text in TensorBoard."""
        if self.writer is not None:
            self.writer.add_text(tag, markdown, step)

    def show_completions(
        self, groups: list[Any], advantages: Tensor, step: int, count: int
    ) -> None:
        """The best and the worst completion of the groups that teach most, as pages of text.

        They are recorded too.

        Args:
            advantages: float (Q, G).
            count: pages; two for each group, those with the largest spread first.
        """
        order = advantages.abs().sum(dim=-1).sort(descending=True, stable=True).indices.tolist()
        places = [(q, int(f(advantages[q]))) for q in order for f in (torch.argmax, torch.argmin)]
        if self.recording is not None:
            self.recording.choose(groups, advantages, places[:count], step)
        for page, (q, i) in enumerate(places[:count]):
            group, kind = groups[q], ("best", "worst")[page % 2]
            text = completion_page(
                group.question.question,
                group.question.reference,
                group.question.opened + group.completions[i].text,
                float(group.returns[i]),
                float(advantages[q][i]),
            )
            self.text(f"samples/group_{page // 2 + 1}_{kind}", text, step)

    def flush(self, step: int, steps: int) -> dict[str, float]:
        """Write the step's metrics everywhere, and forget them; returns them."""
        self.add("perf/peak_memory_gb", peak_memory_gb())
        row = {
            name: float(total) / float(count)
            for name, (total, count) in self.sums.items()
            if float(count)
        }
        self.sums.clear()
        if self.writer is None:
            return row
        self.compare(step, row)
        new = self.watch(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
            file.flush()
            # A checkpoint of this step must not be on the disk before its metrics are.
            os.fsync(file.fileno())
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.charted |= row.keys()
        if not self.laid_out and "time/step" in row:  # step 0 has an evaluation only
            self.laid_out = True
            self.writer.add_custom_scalars(charts_of(self.charted))
        for name in new:
            self.text(f"alarm/{name}", f"step {step}: {self.alarms[name].advice}", step)
        self.writer.flush()
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
        log_line(fold(console_line(step, steps, row), width))
        for name in new:
            log_line(f"ALARM {name}: {self.alarms[name].advice}")
        return row

    def watch(self, row: dict[str, float]) -> list[str]:
        """Note in the step's metrics which alarms are on; returns those that were not lately."""
        on = active_alarms(self.alarms, [*self.evaluated, *self.rows, row])
        lately = {name for past in list(self.rows)[-QUIET:] for name in past}
        row |= {f"alarm/{name}": 1.0 for name in on} | {"rollout/alarms": float(len(on))}
        self.remember(row)
        return [name for name in on if f"alarm/{name}" not in lately]

    def compare(self, step: int, row: dict[str, float]) -> None:
        """Note the first step with the best held-out accuracy."""
        accuracy = row.get("eval/accuracy")
        if accuracy is not None and (self.best is None or accuracy > self.best[0]):
            self.best = accuracy, step

    def remember(self, row: dict[str, float]) -> None:
        """Keep a step's metrics for the alarms; of a step long ago, its evaluation alone."""
        self.rows.append(row)
        if len(self.rows) > LONGEST:
            old = self.rows.popleft()
            held_out = {name: value for name, value in old.items() if name.startswith("eval/")}
            self.evaluated += [held_out] if held_out else []

    def forget_evaluations(self) -> None:
        """For the alarms and the best step: from here on other questions are asked."""
        self.evaluated.clear()
        self.best = None
        for row in self.rows:
            for name in [name for name in row if name.startswith("eval/")]:
                del row[name]

    def close(self) -> None:
        """Close the logs; if the disk is full, that has been said already."""
        if self.recording is not None:
            self.recording.close()
        with suppress(OSError):
            if self.writer is not None:
                self.writer.close()
        threading.excepthook = threading.__excepthook__


def ignore_full_disk(details: threading.ExceptHookArgs) -> None:
    """No traceback of TensorBoard's thread when the disk is full: the next `flush` raises."""
    if not issubclass(details.exc_type, OSError):
        threading.__excepthook__(details)


def keep_before(file: Path, step: int) -> list[dict[str, float]]:
    """Drop the lines of metrics.jsonl from `step` on, and an unfinished one; return the others."""
    kept, rows = [], []
    file.touch()
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            if row["step"] < step:
                kept.append(line)
                rows.append(row)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{file}, line {number} is not what was written; mend or remove that line."
            ) from error
    missing = max(0, step - 1) - sum(row["step"] > 0 for row in rows)
    if missing:
        print(f"{file} lacks {missing} of the {step - 1} steps that were done")
    write_whole(file, b"".join(kept))
    return rows


def keep_events_before(file: Path, step: int) -> None:
    """Drop the events of a TensorBoard file from `step` on, and an unfinished one.

    The new file's purge_step asks its readers for that; not all of them do it for steps that are
    not written again.
    """
    fresh, read = file.with_name(f".{file.name}.partial"), 0
    with fresh.open("wb") as out:
        writer = RecordWriter(out)
        for data in RawEventFileLoader(str(file)).Load():
            read += len(data) + 16  # its length and two checksums
            if Event.FromString(data).step < step:
                writer.write(data)
    # More than a record that a killed process did not finish.
    if file.stat().st_size - read > 100_000:
        print(
            f"{file}: only the first {read} bytes can be read, and are kept; metrics.jsonl has all "
            "metrics"
        )
    fresh.replace(file)


def peak_memory_gb() -> float:
    """Peak memory in GB: torch's on the GPU, else the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, kB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def describe_run(monitor: Monitor, config_yaml: str, summary: str) -> None:
    """Pages for a reader of TensorBoard: what the metrics mean, and the settings of the run.

    Args:
        summary: the sizes and the effective objective, as YAML.
    """
    rewards = {
        f"reward/NAME_{statistic}": text.format("NAME")
        for statistic, text in REWARD_MEANING.items()
    }
    texts = {name: text.replace("<", "`<").replace(">", ">`") for name, text in GLOSSARY.items()}
    lines = [f"- `{name}`: {text}" for name, text in (texts | rewards).items()]
    monitor.text("guide/metrics", "\n".join(lines))  # a table would break the names in two
    monitor.text("guide/config", f"```yaml\n{summary}```\n\n```yaml\n{config_yaml}```")


def completion_page(
    question: str, reference: str, completion: str, returns: float, advantage: float
) -> str:
    """One sample completion as Markdown."""
    quoted: list[Any] = [
        f"**{head}**\n\n```text\n{body}\n```"
        for head, body in (("Question", question), ("Completion", completion))
    ]
    return "\n\n".join(
        [*quoted, f"reference `{reference}` · reward {returns:.3f} · advantage {advantage:+.3f}"]
    )
