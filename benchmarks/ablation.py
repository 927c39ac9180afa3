"""What the choices do: every recipe and every textbook ablation on the bundled task, over several seeds.

    python benchmarks/ablation.py                    all of them, then results/ablation.md, .jsonl and .png
    python benchmarks/ablation.py --only gspo dapo   some of them; runs that ablation.jsonl already has are not repeated
    python benchmarks/ablation.py --report           only the table and the picture, from ablation.jsonl

Each run is `python train.py --preset tiny` with the flags in RUNS, the same learning rate for all. Runs go side by
side, one thread each, seed after seed, and each is written down when it ends: stop at any time, go on later. All but
one make four optimizer steps of each rollout (three of them on data that is no longer on-policy): with a single one
every ratio is 1, and clip, CISPO, SAPO, GMPO, GSPO and DPPO are the same method. The learning rate is three times
the preset's, so that the clip has something to do: 6 % of the tokens in the first step.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loss import OBJECTIVES  # noqa: E402

TARGET = 0.8
COMMON = [
    "--preset", "tiny", "--device", "cpu", "--steps", "12", "--rollouts_per_step", "16", "--train_batch_size", "32",
    "--lr", "1e-4", "--eval_interval", "1", "--eval_questions", "250", "--checkpoint_interval", "0",
    "--log_completions", "0",
]  # fmt: skip


def sampled(questions: int, group: int) -> list[str]:
    """So many questions with so many completions each: 128 sequences in all."""
    return ["--rollouts_per_step", str(questions), "--group_size", str(group)]


# name: (family, flags). The preset has no KL; a recipe is the whole row, with its KL.
RUNS: dict[str, tuple[str, list[str]]] = {
    **{row: ("recipe", ["--objective", row]) for row in OBJECTIVES},
    "base": ("ablation", []),
    "one optimizer step": ("ablation", ["--train_batch_size", "128"]),
    "without std": ("ablation", ["--advantage_std", "none"]),
    "batch std": ("ablation", ["--advantage_std", "batch"]),
    "token-mean": ("ablation", ["--loss_agg_mode", "token-mean"]),
    "without length normalisation": ("ablation", ["--loss_agg_mode", "seq-mean-token-sum-norm"]),
    "raw reward": ("ablation", ["--advantage", "raw", "--advantage_std", "none"]),
    "KL 0.001": ("ablation", ["--kl_weight", "0.001"]),
    "KL 0.01": ("ablation", ["--kl_weight", "0.01"]),
    "KL 0.1": ("ablation", ["--kl_weight", "0.1"]),
    "group size 2": ("ablation", sampled(64, 2)),
    "group size 4": ("ablation", sampled(32, 4)),
    "group size 16": ("ablation", sampled(8, 16)),
    "4 epochs, clip 0.2": ("ablation", ["--epochs_per_step", "4"]),
    "4 epochs, no clip": (
        "ablation",
        ["--epochs_per_step", "4", "--clip_eps", "1", "--clip_eps_high", "1e6"],
    ),
    "4 epochs, no ratio": ("ablation", ["--epochs_per_step", "4", "--surrogate", "reinforce"]),
}


def one_run(job: tuple[str, int]) -> dict:
    """Train once, in this process, and return the curve."""
    import torch

    torch.set_num_threads(1)
    import train

    name, seed = job
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:
        run_dir = Path(folder) / "run"
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            train.main([*COMMON, *RUNS[name][1], "--seed", str(seed), "--run_dir", str(run_dir)])
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "eval/accuracy", "eval/completion_tokens", "rollout/success_rate", "rollout/tokens_right",
            "rollout/tokens_wrong", "rollout/rounds", "train/clipped_share", "train/kl_divergence", "rollout/entropy",
            "train/grad_norm", "train/ratio_mean", "time/step")  # fmt: skip
    curve = [{k: round(v, 5) for k, v in row.items() if k in kept} for row in rows]
    return {
        "name": name,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "curve": curve,
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over seeds (Student's t)."""
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), quantile[len(values)] * statistics.stdev(values) / math.sqrt(
        len(values)
    )


def late(runs: list[dict], metric: str) -> list[float]:
    """For each run that has it, the mean of a metric over the last four steps."""
    values = [[row[metric] for row in run["curve"][-4:] if metric in row] for run in runs]
    return [statistics.mean(v) for v in values if v]


def steps_to_target(runs: list[dict], metric: str) -> str:
    """Median over the seeds of the first step at TARGET, and its range."""
    reached = [
        next((row["step"] for row in run["curve"] if row.get(metric, 0) >= TARGET), math.inf)
        for run in runs
    ]
    median, low, high = (
        "never" if v == math.inf else f"{v:.0f}"
        for v in (statistics.median(reached), min(reached), max(reached))
    )
    return median if low == high else f"{median} ({low}–{high})"


def final(run: dict) -> float:
    """Greedy accuracy after the last step."""
    return run["curve"][-1]["eval/accuracy"]


def summary(name: str, runs: dict[str, list[dict]]) -> str:
    """One configuration as a row of the table."""
    mine, base = runs[name], {run["seed"]: final(run) for run in runs.get("base", [])}
    mean, half = interval([final(run) for run in mine])
    paired = [final(run) - base[run["seed"]] for run in mine if run["seed"] in base]
    more, give = interval(paired) if paired else (math.nan, math.nan)
    mean_sampled, half_sampled = interval(late(mine, "rollout/success_rate"))
    greedy, sampled = (
        steps_to_target(mine, metric) for metric in ("eval/accuracy", "rollout/success_rate")
    )
    right, wrong = (statistics.mean(late(mine, f"rollout/tokens_{w}")) for w in ("right", "wrong"))
    clipped = statistics.mean(late(mine, "train/clipped_share") or [math.nan])
    family, given = RUNS[name]
    flags = f" | {'`' + ' '.join(given) + '`' if given else ''}" if family == "ablation" else ""
    return (
        f"| {name}{flags} | {mean:.3f} ± {half:.3f} | {more:+.3f} ± {give:.3f} "
        f"| {mean_sampled:.3f} ± {half_sampled:.3f} | {greedy} | {sampled} | {right:.1f} | {wrong:.1f} "
        f"| {clipped:.3f} |"
    )


def report(log: Path, out: Path) -> None:
    """The table and the picture, from whatever has been run so far."""
    runs: dict[str, list[dict]] = {}
    for line in log.read_text().splitlines():
        run = json.loads(line)
        runs.setdefault(run["name"], []).append(run)
    machine = (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"
    )
    columns = [
        "greedy at the end", "less base, by seed", "sampled, late", f"steps to {TARGET}, greedy",
        f"steps to {TARGET}, sampled", "tokens, right", "tokens, wrong", "clipped share",
    ]  # fmt: skip
    seeds = sorted({len(r) for r in runs.values()})
    lines = [
        f"`python benchmarks/ablation.py` on {machine}; every run: `{' '.join(COMMON)}`; seeds per row: {seeds}",
        "",
    ]
    for family, title in (("recipe", "Recipes"), ("ablation", "Ablations, of GRPO without a KL")):
        head = ["recipe"] if family == "recipe" else ["", "flags"]
        lines += [
            f"## {title}",
            "",
            f"| {' | '.join(head + columns)} |",
            "|" + "---|" * len(head + columns),
        ]
        lines += [
            summary(name, runs)
            for name, (kind, _) in RUNS.items()
            if kind == family and name in runs
        ]
        lines.append("")
    (out / "ablation.md").write_text("\n".join(lines), encoding="utf-8")
    picture(runs, out / "ablation.png")


def picture(runs: dict[str, list[dict]], path: Path) -> None:
    """What each family does, against steps: mean over the seeds, and in the shade the lowest and highest of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sampled, greedy, wrong = "rollout/success_rate", "eval/accuracy", "rollout/tokens_wrong"
    words = {
        sampled: "accuracy, sampled",
        greedy: "accuracy, greedy",
        wrong: "tokens of wrong answers",
    }
    panels = [
        ("policy term", sampled, ["grpo", "gspo", "gmpo", "cispo", "sapo", "dppo"]),
        ("advantage", sampled, ["base", "without std", "batch std", "raw reward"]),
        ("KL weight", sampled, ["base", "KL 0.001", "KL 0.01", "KL 0.1"]),
        (
            "group size, 128 sequences",
            sampled,
            ["group size 2", "group size 4", "base", "group size 16"],
        ),
        (
            "stale data: one epoch (base) and four",
            greedy,
            ["base", "4 epochs, clip 0.2", "4 epochs, no clip", "4 epochs, no ratio"],
        ),
        ("mean over tokens", wrong, ["base", "token-mean", "without length normalisation"]),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), constrained_layout=True)
    for ax, (title, metric, names) in zip(axes.flat, panels, strict=True):
        for i, name in enumerate(n for n in names if n in runs):
            curves = [
                {r["step"]: r[metric] for r in run["curve"] if metric in r} for run in runs[name]
            ]
            steps = sorted(set.intersection(*map(set, curves)))
            values = [[curve[s] for curve in curves] for s in steps]
            ax.plot(steps, [statistics.mean(v) for v in values], color=f"C{i}", lw=1.6, label=name)
            ax.fill_between(
                steps,
                list(map(min, values)),
                list(map(max, values)),
                color=f"C{i}",
                alpha=0.12,
                lw=0,
            )
        ax.set(
            title=title,
            xlabel="step",
            ylabel=words[metric],
            ylim=(0, {wrong: None, sampled: 1.02, greedy: 1.5}[metric]),
        )
        if metric == greedy:  # the room above is the legend's
            ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run what is missing, two at a time, and report after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "ablation.jsonl"
    log.touch()
    done = {(run["name"], run["seed"]) for run in map(json.loads, log.read_text().splitlines())}
    jobs = [(name, seed) for seed in args.seeds for name in args.only if (name, seed) not in done]
    if not args.report and jobs:
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            for run in pool.imap_unordered(one_run, jobs):
                with log.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                print(
                    f"{run['name']}, seed {run['seed']}: {run['curve'][-1]['eval/accuracy']:.3f} in {run['seconds']} s"
                )
                report(log, args.out)
    report(log, args.out)


if __name__ == "__main__":
    main()
