"""What benchmarks/gpu.sh writes itself: what machine it is, and what the real job has shown so far.

    python benchmarks/gpu_report.py environment --device cuda
    python benchmarks/gpu_report.py train --out FOLDER --work FOLDER --dataset FOLDER

`train` reads what is there of a speedrun (benchmarks/speedrun.py with these folders), which need
not be a record yet: greedy accuracy on the test questions before and after training, the steps in
between, and peak memory beside the plan.
"""

import argparse
import importlib.metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import machine, read_jsonl, table, versions
from memory_plan import of_run
from tracks import GSM8K
from verify_record import count_right

from support.command_line import Parser
from support.config import resolve_path
from support.data import Question, load_questions
from support.errors import command
from support.evaluation import wilson_interval

# What some pieces need; without one of them they are skipped, and say so.
PACKAGES = (
    "accelerate",
    "peft",
    "datasets",
    "bitsandbytes",
    "trl",
    "pytest",
    "xdist",
    "hypothesis",
)
COLUMNS = {
    "success": ("rollout/success_rate", "{:.3f}"),
    "tokens": ("rollout/completion_tokens", "{:.0f}"),
    "cut off": ("rollout/truncated_share", "{:.2f}"),
    "no spread": ("rollout/no_spread_share", "{:.2f}"),
    "entropy": ("rollout/entropy", "{:.3f}"),
    "KL": ("train/kl_divergence", "{:.4f}"),
    "gap": ("train/sampler_gap", "{:.4f}"),
    "s a step": ("time/step", "{:.1f}"),
    "rollout": ("time/rollout", "{:.1f}"),
    "log-probs": ("time/log_probs", "{:.1f}"),
    "update": ("time/update", "{:.1f}"),
    "tokens/s": ("perf/tokens_per_second", "{:.0f}"),
    "peak, GB": ("perf/peak_memory_gb", "{:.1f}"),
    "held out": ("eval/accuracy", "{:.3f}"),
}
MOST_ROWS = 20


def environment(device: str) -> list[str]:
    """The machine, what is installed, and what is not."""
    gpu = ""
    if device == "cuda":
        free, whole = (size / 1e9 for size in torch.cuda.mem_get_info())
        gpu = f"; {whole:.0f} GB of GPU memory, {free:.0f} of them free"
    there = [name for name in PACKAGES if find_spec(name)]
    names = {"xdist": "pytest-xdist"}
    numbers = (f"{n} {importlib.metadata.version(names.get(n, n))}" for n in there)
    missing = [name for name in PACKAGES if name not in there]
    return [
        f"{machine(device)}{gpu}; {versions()}.",
        "",
        f"Installed: {', '.join(numbers)}. Not installed: {', '.join(missing) or 'nothing'}.",
    ]


def accuracy_row(what: str, file: Path, questions: list[Question]) -> list[Any]:
    """What a file of greedy answers shows."""
    rows = read_jsonl(file)
    asked = [questions[row["index"]] for row in rows]
    (strict, flexible), count = count_right(rows, asked), len(rows)
    low, high = wilson_interval(strict, count)
    tokens = sum(row["tokens"] for row in rows) / count
    cut = sum(row["truncated"] for row in rows) / count
    shares = f"{strict / count:.3f} ({low:.3f}–{high:.3f})", f"{flexible / count:.3f}"
    return [what, *shares, f"{tokens:.0f}", f"{cut:.2f}", f"{count} of {len(questions)}"]


def step_rows(rows: list[dict[str, float]]) -> list[list[str]]:
    """Some of the steps, the first and the last ones among them, with the minutes until then."""
    minutes, cells = 0.0, []
    every = max(1, len(rows) // MOST_ROWS)
    for i, row in enumerate(rows):
        minutes += row.get("time/step", 0.0) / 60
        if i % every == 0 or i == len(rows) - 1 or "eval/accuracy" in row:
            found = (f.format(row[name]) if name in row else "" for name, f in COLUMNS.values())
            cells.append([str(row["step"]), f"{minutes:.1f}", *found])
    return cells


def train(out: Path, work: Path, dataset: str) -> list[str]:
    """Accuracy before and after, and the steps, of each seed."""
    questions = load_questions(resolve_path(dataset), "test")
    rows, lines = [], []
    for number, prompt in enumerate(GSM8K["prompts"]):
        file = out / "baseline" / f"{number}.jsonl"
        if file.exists():
            rows.append(accuracy_row(f"before; prompt: {prompt}", file, questions))
    for run in sorted(work.glob("seed-*/metrics.jsonl")):
        name, steps = run.parent.name, read_jsonl(run)
        answers = out / name / "evaluation.jsonl"
        if answers.exists():
            last = read_jsonl(answers.with_name("metrics.jsonl"))[-1]["step"]
            rows.append(accuracy_row(f"{name}, after step {last}", answers, questions))
        lines += ["", f"## {name}", "", *table(["step", "minutes", *COLUMNS], step_rows(steps))]
        lines += ["", *of_run(run.parent)]
    head = ["greedy, test questions", "strict (95 %)", "flexible", "tokens", "cut off", "questions"]
    return [*table(head, rows), *lines] if rows else lines


@command
def main(argv: list[str]) -> None:
    """Print what is asked for."""
    how = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=how, allow_abbrev=False)
    parser.add_argument("what", choices=["environment", "train"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="of the speedrun's record")
    parser.add_argument("--work", type=Path, help="of its runs")
    parser.add_argument("--dataset")
    args = parser.parse_args(argv)
    lines = (
        environment(args.device)
        if args.what == "environment"
        else train(args.out, args.work, args.dataset)
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
