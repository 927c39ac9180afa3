"""Every metric: its name, its meaning, TensorBoard, metrics.jsonl, the console and its progress bars.

Add to a metric where its number is born, as (sum, count); `flush` prints the mean of the step once. A name that is
not in GLOSSARY raises.
"""

import json
import os
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from alarms import ALARMS, LONGEST, QUIET, Alarm, sounding
from errors import UserError, silence

GLOSSARY = {
    "train/loss": "The loss. With the paper's mean over sequences and one optimizer step per rollout it is near 0 (plus"
    " kl_weight × KL) at every step, because the advantages of a group add up to 0: watch the returns, not this.",
    "train/kl_divergence": "How far the policy has moved from the reference, nats per token, by the objective's "
    "kl_estimator. Healthy: below 0.1. If it runs away: raise kl_weight or lower lr.",
    "train/grad_norm": "Norm of the gradient before clipping to max_norm. Single spikes are normal, a steady rise not.",
    "train/ratio_mean": "Mean of new/old probability of the trained tokens (without a KL, completions whose "
    "advantage is 0 are not trained, nor counted in the metrics of train/). Healthy: within a few percent of 1.",
    "train/clipped_share": "Share of tokens whose ratio was clipped and which taught nothing. Healthy: below 0.3; "
    "above that, lower lr or epochs_per_step (not gspo and luspo, whose narrow clip takes most tokens by design). "
    "Always 0 with one optimizer step per rollout.",
    "train/entropy": "Mean entropy of the trained tokens' distributions, nats. A slow fall is learning; a drop to 0 is "
    "collapse.",
    "train/sampler_gap": "Mean distance between the log-probability that a token was sampled with and the trainer's "
    "own, nats. Healthy: rounding (1e-6 in fp32, a few hundredths in bf16). More: sampler and trainer disagree.",
    "train/lr": "The learning rate.",
    "train/skipped_steps": "Optimizer steps left out because the loss or a gradient was not finite. Healthy: 0.",
    "rollout/returns": "Mean reward of the sampled completions (less the KL, with kl_in_reward): the curve that should "
    "rise.",
    "rollout/returns_std": "Standard deviation of the rewards over the whole rollout (with dynamic sampling: the mean "
    "over its rollouts).",
    "rollout/success_rate": "Share of sampled completions whose <answer> is right (training questions, sampled).",
    "rollout/success_easy": "The same on the third of the questions with the fewest solution steps.",
    "rollout/success_middle": "The same on the middle third.",
    "rollout/success_hard": "The same on the third with the most solution steps.",
    "rollout/completion_tokens": "Mean length of the completions, end token included.",
    "rollout/entropy": "Entropy of the sampler over all sampled tokens, nats: minus their mean log-probability. Unlike "
    "train/entropy it does not depend on which completions are trained.",
    "rollout/tokens_right": "Mean length of the completions that are right.",
    "rollout/tokens_wrong": "Mean length of those that are not. Growing while the right ones do not: the length bias.",
    "rollout/rounds": "Rollouts that dynamic sampling made in this step; the completions of each are paid for.",
    "rollout/idle_groups": "Groups without spread that dynamic sampling could not replace.",
    "rollout/truncated_share": "Share of completions cut off by max_new_tokens. If it grows, so should the budget.",
    "rollout/unscored_share": "Share of the scores that are None: a reward function could not score the completion.",
    "rollout/no_spread_share": "Share of groups whose rewards are all equal: they teach nothing. Above 0.8, the "
    "questions are too hard, too easy, or the reward too coarse.",
    "rollout/group_baseline_std": "Spread of the groups' mean rewards: how much the questions differ in difficulty.",
    "rollout/group_baseline": "Mean over groups of the group's mean reward, which each completion is compared with.",
    "rollout/advantage_mean": "Mean advantage. 0 by construction where rewards are compared with their group's mean.",
    "rollout/advantage_std": "Standard deviation of the advantages. Near 1 when divided by the group's std; lower by "
    "the groups without spread.",
    "eval/accuracy": "Greedy accuracy on held-out questions, strict: the <answer> tag holds the reference.",
    "eval/accuracy_low": "Lower end of its 95 % interval (Wilson).",
    "eval/accuracy_high": "Upper end of its 95 % interval (Wilson).",
    "eval/accuracy_flexible": "The same, but without a tag the last number counts.",
    "eval/completion_tokens": "Mean length of the greedy completions.",
    "eval/truncated_share": "Share of the greedy completions cut off by max_new_tokens.",
    "eval/sampled_accuracy": "Share of the sampled completions that are right, strict: pass@1.",
    "eval/pass_at_k": "Share of held-out questions with at least one right answer in eval_samples samples.",
    "time/rollout": "Seconds to sample the completions.",
    "time/log_probs": "Seconds for the log-probabilities of the policy that sampled and of the reference.",
    "time/update": "Seconds for the gradient steps.",
    "time/step": "Seconds for the whole step, without evaluation and checkpoint.",
    "time/evaluate": "Seconds for the evaluation.",
    "perf/tokens_per_second": "Completion tokens sampled per second of rollout.",
    "perf/peak_memory_gb": "Peak memory so far: of the GPU where there is one, of the process otherwise.",
}
GLOSSARY |= {f"alarm/{name}": f"1 while this alarm is on. {alarm.advice}" for name, alarm in ALARMS.items()}
REWARD_MEANING = {"mean": "Mean of the reward {}.", "std": "Standard deviation of the reward {} over the rollout."}


# The tab "Custom Scalars": three questions, each chart with the answer of a healthy run in its title.
CHARTS = {
    "Is it learning?": {
        "held-out accuracy, greedy, with its 95 % interval: rises": [
            "Margin", ["eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"]],
        "reward of the samples: rises": ["Multiline", ["rollout/returns$"]],
        "success of easy, middle and hard questions: all rise, easy first": [
            "Multiline", ["rollout/success_easy", "rollout/success_middle", "rollout/success_hard"]],
        "tokens in a completion: may rise (longer reasoning), not explode": [
            "Multiline", [
                "rollout/completion_tokens", "rollout/tokens_right", "rollout/tokens_wrong", "eval/completion_tokens"]],
    },
    "Is it healthy?": {
        "KL to the reference: below 0.1": ["Multiline", ["train/kl_divergence"]],
        "shares of groups without spread (below 0.8), truncated, clipped (below 0.3)": [
            "Multiline", ["rollout/no_spread_share", "rollout/truncated_share", "train/clipped_share"]],
        "entropy: falls slowly, never to 0": ["Multiline", ["train/entropy"]],
        "gradient norm: no steady rise": ["Multiline", ["train/grad_norm"]],
        "new/old probability: near 1": ["Multiline", ["train/ratio_mean"]],
        "gap between sampler and trainer: rounding": ["Multiline", ["train/sampler_gap"]],
        "skipped steps: 0": ["Multiline", ["train/skipped_steps"]],
        "alarms (what to do then is in the tab Text): none": ["Multiline", ["alarm/.*"]],
    },
    "Where does the time go?": {
        "seconds": ["Multiline", ["time/step", "time/rollout", "time/log_probs", "time/update"]],
        "tokens per second of rollout": ["Multiline", ["perf/tokens_per_second"]],
    },
}  # fmt: skip


def meaning(name: str) -> str:
    """What a metric means; KeyError for a name that nobody has explained."""
    if name.startswith("reward/"):
        reward, _, statistic = name.removeprefix("reward/").rpartition("_")
        return REWARD_MEANING[statistic].format(reward)
    return GLOSSARY[name]


def progress(items: Iterable, what: str, leave: bool = True) -> tqdm:
    """A progress bar; silent where stderr is not a terminal."""
    return tqdm(items, desc=what, leave=leave, disable=None, dynamic_ncols=True)


def tell(text: str) -> None:
    """Print beside a progress bar. When nobody listens any more (`| head`, a terminal that is gone), a run goes on."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        silence()


class Monitor:
    """Collects the metrics of a step and writes them out; watches them with the alarms that it is given."""

    def __init__(self, alarms: dict[str, Alarm] | None = None) -> None:
        self.sums: dict[str, list] = {}
        self.writer: SummaryWriter | None = None
        self.alarms = alarms or {}
        self.rows: deque[dict[str, float]] = deque(maxlen=LONGEST)  # what the alarms remember

    def open(self, run_dir: Path, start_step: int = 0) -> None:
        """Open the run's logs; what a run that is resumed had written after `start_step` is taken back."""
        self.file = run_dir / "metrics.jsonl"
        first = start_step + 1 if start_step else 0  # a run that starts again from nothing evaluates at step 0 again
        self.rows.extend(keep_before(self.file, first))
        for events in sorted(run_dir.glob("events.out.tfevents.*")):
            keep_events_before(events, first)
        threading.excepthook = not_of_the_disk
        self.writer = SummaryWriter(run_dir, purge_step=first)

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Add to a metric; its value for the step is sum / count. Tensors stay where they are until `flush`."""
        meaning(name)
        held = self.sums.setdefault(name, [0, 0])
        held[0] = held[0] + total
        held[1] = held[1] + count

    def add_all(self, metrics: dict[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Add several, given as name: (sum, count)."""
        for name, (total, count) in metrics.items():
            self.add(name, total, count)

    def add_spread(self, mean_name: str, std_name: str, values: Tensor) -> None:
        """Add the mean and the standard deviation (of the population) of `values`, NaNs left out."""
        values = values[~values.isnan()]
        if len(values):
            self.add(mean_name, values.sum(), len(values))
            self.add(std_name, values.std(correction=0) * len(values), len(values))

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time a block, to the end of its work on the GPU; the blocks of a step add up."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.add(name, time.perf_counter() - start, count=0 if name in self.sums else 1)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """A page of text in TensorBoard."""
        self.writer.add_text(tag, markdown, step)

    def flush(self, step: int, steps: int) -> dict[str, float]:
        """Write the step's metrics everywhere, and forget them; returns them."""
        self.add("perf/peak_memory_gb", peak_memory_gb())
        row = {name: float(total) / float(count) for name, (total, count) in self.sums.items() if float(count)}
        self.sums.clear()
        new = self.watch(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint of this step must not be on the disk before its metrics are
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        for name in new:
            self.text(f"alarm/{name}", f"step {step}: {self.alarms[name].advice}", step)
        self.writer.flush()
        tell(console_line(step, steps, row))
        for name in new:
            tell(f"ALARM {name}: {self.alarms[name].advice}")
        return row

    def watch(self, row: dict[str, float]) -> list[str]:
        """Note in the step's metrics which alarms are on; returns those that were not lately."""
        on = sounding(self.alarms, [*self.rows, row])
        lately = {name for past in list(self.rows)[-QUIET:] for name in past}
        row |= {f"alarm/{name}": 1.0 for name in on}
        self.rows.append(row)
        return [name for name in on if f"alarm/{name}" not in lately]

    def close(self) -> None:
        """Close the logs; if the disk is full, that has been said already."""
        with suppress(OSError):
            if self.writer is not None:
                self.writer.close()
        threading.excepthook = threading.__excepthook__


def not_of_the_disk(details: threading.ExceptHookArgs) -> None:
    """No traceback for TensorBoard's writer thread where the disk is full: the next `flush` raises its error."""
    if not issubclass(details.exc_type, OSError):
        threading.__excepthook__(details)


def keep_before(file: Path, step: int) -> list[dict[str, float]]:
    """Drop the lines of metrics.jsonl from `step` on, and one that was not written to its end; returns the others."""
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
            raise UserError(f"{file}, line {number} is not what was written; mend or remove that line.") from error
    missing = max(0, step - 1) - sum(row["step"] > 0 for row in rows)
    if missing:
        print(f"{file} lacks {missing} of the {step - 1} steps that were done")
    fresh = file.with_suffix(".partial")
    with fresh.open("wb") as out:
        out.write(b"".join(kept))
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(file)
    return rows


def keep_events_before(file: Path, step: int) -> None:
    """Drop the events of a TensorBoard file from `step` on, and one that was not written to its end.

    The new file's purge_step asks its readers for that; not all of them do it for steps that are not written again.
    """
    fresh, read = file.with_name(f".{file.name}.partial"), 0
    with fresh.open("wb") as out:
        writer = RecordWriter(out)
        for data in RawEventFileLoader(str(file)).Load():
            read += len(data) + 16  # its length and two checksums
            if Event.FromString(data).step < step:
                writer.write(data)
    if file.stat().st_size - read > 100_000:  # more than a record that a killed process did not finish
        print(f"{file}: only the first {read} bytes can be read, and are kept; metrics.jsonl has all metrics")
    fresh.replace(file)


def peak_memory_gb() -> float:
    """Peak memory in GB: torch's on the GPU, else the resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# name in the line, metric, format
CONSOLE = [
    ("reward", "rollout/returns", ".3f"), ("success", "rollout/success_rate", ".3f"),
    ("tokens", "rollout/completion_tokens", ".1f"), ("no spread", "rollout/no_spread_share", ".2f"),
    ("rounds", "rollout/rounds", ".0f"), ("clipped", "train/clipped_share", ".3f"),
    ("kl", "train/kl_divergence", ".4f"), ("entropy", "train/entropy", ".3f"), ("grad", "train/grad_norm", ".2f"),
    ("skipped", "train/skipped_steps", ".0f"), ("s", "time/step", ".2f"),
]  # fmt: skip


def console_line(step: int, steps: int, row: dict[str, float]) -> str:
    """The step in one readable line, and its evaluation in the words that matter."""
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    parts += [
        f"{word} {row[name]:{form}}"
        for word, name, form in CONSOLE
        if name in row and not (word in ("skipped", "clipped") and not row[name])
    ]
    on = [name.removeprefix("alarm/") for name in row if name.startswith("alarm/")]
    parts += [f"ALARM {', '.join(on)}"] if on else []
    if "eval/accuracy" in row:
        parts.append(
            f"held-out accuracy {row['eval/accuracy']:.3f} "
            f"({row['eval/accuracy_low']:.3f}–{row['eval/accuracy_high']:.3f}), "
            f"flexible {row['eval/accuracy_flexible']:.3f}, {row['eval/completion_tokens']:.1f} tokens"
        )
    return " | ".join(parts)


def describe_run(monitor: Monitor, config_yaml: str, arithmetic: str) -> None:
    """The pages that let a reader of TensorBoard understand the run: how to read it, and its settings."""
    rewards = {f"reward/NAME_{statistic}": text.format("NAME") for statistic, text in REWARD_MEANING.items()}
    lines = [f"| {name} | {text} |" for name, text in (GLOSSARY | rewards).items()]
    monitor.text("guide/metrics", "\n".join(["| metric | what it means |", "|---|---|", *lines]))
    monitor.writer.add_custom_scalars(CHARTS)
    monitor.text("guide/config", f"{arithmetic}\n\n```yaml\n{config_yaml}```")


def completion_page(question: str, reference: str, completion: str, returns: float, advantage: float) -> str:
    """One sample completion as Markdown."""
    quoted: list[Any] = [
        f"**{head}**\n\n```text\n{body}\n```" for head, body in (("Question", question), ("Completion", completion))
    ]
    return "\n\n".join([*quoted, f"reference `{reference}` · reward {returns:.3f} · advantage {advantage:+.3f}"])
