"""What a report shows: a run's metrics and recording, and where each number is computed."""

import ast
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from support.alarms import ALARMS
from support.errors import UserError, quoted
from support.metrics import GLOSSARY
from support.recording_file import FILE, read_rows

ROOT = Path(__file__).resolve().parent.parent
MOST_STEPS = 1000  # of the curves

# A metric, and between which values a healthy run has it: the limits of the alarms.
BANDS = {
    "eval/accuracy": None,
    "rollout/returns": None,
    "rollout/success_rate": None,
    "rollout/completion_tokens": None,
    "train/kl_divergence": (0, 0.1),
    "train/clipped_share": (0, 0.3),
    "train/ratio_mean": (0.9, 1.1),
    "rollout/no_spread_share": (0, 0.8),
    "train/entropy": None,
    "train/grad_norm": None,
}
INTERVAL = {"eval/accuracy": ("eval/accuracy_low", "eval/accuracy_high")}
CHARTS = [
    {
        "name": name,
        "band": band,
        "low": INTERVAL.get(name, (None, None))[0],
        "high": INTERVAL.get(name, (None, None))[1],
        "alarms": [key for key, alarm in ALARMS.items() if alarm.metric.startswith(name)],
    }
    for name, band in BANDS.items()
]
# Where a number of a token is computed: a file, a function, and how the line begins.
PLACES = {
    "log_prob": ("loss.py", "token_log_probs", "return log_probs.gather"),
    "old": ("train.py", "add_log_probs", "passes.append((trainer.policy"),
    "ratio": ("loss.py", "GRPOLoss.policy_term", "ratio = "),
    "sequence_ratio": ("objectives/equations.py", "sequence_mean", "return"),
    "advantage": ("loss.py", "group_advantages", "return (center"),
    "other_advantage": ("objectives/equations.py", "normalize_rewards", "relative = "),
    "policy": ("loss.py", "GRPOLoss.policy_term", "return -torch.min"),
    "clipped": ("loss.py", "GRPOLoss.clipped_tokens", "too_high = "),
    "clipped_low": ("loss.py", "GRPOLoss.clipped_tokens", "too_low = "),
    "kl": ("loss.py", "approx_kl_divergence", "return"),
    "other_kl": ("objectives/equations.py", "kl_divergence", "value = "),
    "weight": ("loss.py", "GRPOLoss.token_weights", "return"),
    "other_weight": ("objectives/equations.py", "token_weights", "return"),
    "gradient": ("train.py", "add_gradients", "share.backward()"),
    "entropy": ("loss.py", "token_log_probs", "entropies = "),
}
SURROGATES = {
    "clip": "losses = -torch.min",
    "cispo": "return -weights",
    "sapo": "return -torch.sigmoid",
    "gmpo": "return -advantages",
    "reinforce": "return -advantages",
    "dppo": "return torch.where",
}
PLACES |= {f"surrogate:{n}": ("objectives/equations.py", n, w) for n, w in SURROGATES.items()}


@cache
def definition(file: str, name: str) -> ast.FunctionDef:
    """A function, or a method as Class.method, of a file of this project."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        (found,) = [node for node in body if getattr(node, "name", None) == part]
        body = found.body
    return found


def find_place(file: str, name: str, words: str) -> tuple[str, int, str]:
    """The first line of a function that begins with these words: file, number now, text."""
    function = definition(file, name)
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    start = function.body[1].lineno if ast.get_docstring(function) else function.body[0].lineno
    every = ((n, lines[n - 1].strip()) for n in range(start, function.end_lineno + 1))
    number, text = next((n, text) for n, text in every if text.startswith(words))
    return file, number, text


def first_line(file: str, name: str) -> str:
    """The first line of a function's docstring."""
    return ast.get_docstring(definition(file, name)).splitlines()[0]


def alarm_words() -> dict[str, dict[str, str]]:
    """What each alarm advises, and what each metric of a chart means."""
    return {
        "alarms": {name: alarm.advice for name, alarm in ALARMS.items()},
        "meanings": {name: GLOSSARY[name] for name in BANDS},
    }


def read_run(folder: Path) -> dict[str, Any]:
    """A run: its metrics, the steps and the held-out answers that were recorded, and a note.

    Raises:
        UserError: it is no folder of a run.
    """
    if not (folder / "metrics.jsonl").is_file():
        run = folder.parent
        instead = f"; its run is {quoted(run)}" if (run / "metrics.jsonl").is_file() else ""
        there = "holds no run: it has no metrics.jsonl" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {there}{instead}; give the folder of a run, as runs/NAME.")
    try:
        metrics, broken = read_metrics(folder / "metrics.jsonl")
        rows, more = read_rows(folder / FILE) if (folder / FILE).is_file() else ([], 0)
    except OSError as error:
        raise UserError(f"Cannot read the run {folder}: {error.strerror}.") from error
    damage = [(broken, "metrics.jsonl"), (more, FILE)]
    note = "; ".join(
        f"{n} {'line' if n == 1 else 'lines'} of {name} cannot be read" for n, name in damage if n
    )
    return {
        "name": folder.resolve().name,
        "metrics": thinned(metrics),
        "steps": [row for row in rows if "groups" in row],
        "answers": [row for row in rows if "answers" in row],
        "note": note,
    }


def read_metrics(file: Path) -> tuple[list[dict[str, float]], int]:
    """The rows of metrics.jsonl, charts and alarms alone; and how many lines are broken.

    The last line may be unfinished, since the run may be going on.
    """
    wanted = {"step", *BANDS, *(name for pair in INTERVAL.values() for name in pair)}
    rows, broken = [], 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            kept = {k: v for k, v in row.items() if k in wanted or k.startswith("alarm/")}
            rows.append({"step": int(kept["step"])} | {k: number(v) for k, v in kept.items()})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            broken += line.endswith(b"\n")
    return rows, broken


def number(value: float) -> float | None:
    """A metric with 6 digits; None where it is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def thinned(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most about MOST_STEPS rows: every n-th, and those with an evaluation or an alarm."""
    every = math.ceil(len(rows) / MOST_STEPS)
    told = ("eval/accuracy", *(f"alarm/{name}" for name in ALARMS))
    last = len(rows) - 1
    return [
        row
        for i, row in enumerate(rows)
        if i % every == 0 or i == last or any(name in row for name in told)
    ]
