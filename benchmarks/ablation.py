"""What the choices do: every recipe and every textbook ablation on the bundled task, by seeds.

    python benchmarks/ablation.py             all, then results/ablation.md, .jsonl and .png
    python benchmarks/ablation.py --only gspo dapo     what ablation.jsonl has is not repeated
    python benchmarks/ablation.py --report    only the table and the picture, from ablation.jsonl

Each run is `python train.py --preset tiny` with the flags in RUNS, the same learning rate for all.
Runs go side by side, one thread each, seed after seed, and each is written down when it ends: stop
at any time, go on later. All but one make four optimizer steps of each rollout (three of them on
data that is no longer on-policy): with a single one every ratio is 1, and clip, CISPO, SAPO, GMPO,
GSPO and DPPO are the same method. The learning rate is three times the preset's, so that the clip
has something to do: 6 % of the tokens in the first step.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from common import (
    RESULTS,
    interval,
    machine,
    pyplot,
    read_jsonl,
    silent_run,
    table,
    versions,
    write_jsonl,
    write_lines,
)

from objectives.table import OBJECTIVES
from support.errors import command

TARGET = 0.8
COMMON = (
    "--preset tiny --device cpu --steps 12 --rollouts_per_step 16 --train_batch_size 32 --lr 1e-4 "
    "--eval_interval 1 --eval_questions 250 --checkpoint_interval 0 --log_completions 0"
)
# name: (family, flags). The preset has no KL; a recipe is the whole row, with its KL. Another group
# size has another number of questions, so that a rollout has 128 sequences in all.
RUNS: dict[str, tuple[str, str]] = {
    **{row: ("recipe", f"--objective {row}") for row in OBJECTIVES},
    "base": ("ablation", ""),
    "one optimizer step": ("ablation", "--train_batch_size 128"),
    "without std": ("ablation", "--advantage_std none"),
    "batch std": ("ablation", "--advantage_std batch"),
    "token-mean": ("ablation", "--loss_agg_mode token-mean"),
    "without length normalisation": ("ablation", "--loss_agg_mode seq-mean-token-sum-norm"),
    "raw reward": ("ablation", "--advantage raw --advantage_std none"),
    "KL 0.001": ("ablation", "--kl_weight 0.001"),
    "KL 0.01": ("ablation", "--kl_weight 0.01"),
    "KL 0.1": ("ablation", "--kl_weight 0.1"),
    "group size 2": ("ablation", "--rollouts_per_step 64 --group_size 2"),
    "group size 4": ("ablation", "--rollouts_per_step 32 --group_size 4"),
    "group size 16": ("ablation", "--rollouts_per_step 8 --group_size 16"),
    "4 epochs, clip 0.2": ("ablation", "--epochs_per_step 4"),
    "4 epochs, no clip": (
        "ablation",
        "--epochs_per_step 4 --clip_eps 1 --clip_eps_high 1e6",
    ),
    "4 epochs, no ratio": ("ablation", "--epochs_per_step 4 --surrogate reinforce"),
}
KEPT = (
    "step",
    "eval/accuracy",
    "eval/completion_tokens",
    "rollout/success_rate",
    "rollout/tokens_right",
    "rollout/tokens_wrong",
    "rollout/rounds",
    "rollout/entropy",
    "train/clipped_share",
    "train/kl_divergence",
    "train/grad_norm",
    "train/ratio_mean",
    "time/step",
)


def one_run(job: tuple[str, int]) -> dict:
    """Train once, in this process, and return the curve."""
    torch.set_num_threads(1)
    import train

    name, seed = job
    start = time.perf_counter()
    rows = silent_run(name, train.main, f"{COMMON} {RUNS[name][1]} --seed {seed}".split())
    curve = [{k: round(v, 5) for k, v in row.items() if k in KEPT} for row in rows]
    seconds = round(time.perf_counter() - start, 1)
    return {"name": name, "seed": seed, "seconds": seconds, "curve": curve}


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


def summary(name: str, runs: dict[str, list[dict]]) -> list[str]:
    """One configuration as a row of the table."""
    mine, base = runs[name], {run["seed"]: final(run) for run in runs.get("base", [])}
    paired = [final(run) - base[run["seed"]] for run in mine if run["seed"] in base]
    more, give = interval(paired) if paired else (math.nan, math.nan)
    family, given = RUNS[name]
    return [
        name,
        *([f"`{given}`" if given else ""] if family == "ablation" else []),
        "{:.3f} ± {:.3f}".format(*interval([final(run) for run in mine])),
        f"{more:+.3f} ± {give:.3f}",
        "{:.3f} ± {:.3f}".format(*interval(late(mine, "rollout/success_rate"))),
        steps_to_target(mine, "eval/accuracy"),
        steps_to_target(mine, "rollout/success_rate"),
        f"{statistics.mean(late(mine, 'rollout/tokens_right')):.1f}",
        f"{statistics.mean(late(mine, 'rollout/tokens_wrong')):.1f}",
        f"{statistics.mean(late(mine, 'train/clipped_share') or [math.nan]):.3f}",
    ]


def report(log: Path, out: Path) -> None:
    """The table and the picture, from whatever has been run so far."""
    runs: dict[str, list[dict]] = {}
    for run in read_jsonl(log):
        runs.setdefault(run["name"], []).append(run)
    columns = [
        "greedy at the end",
        "less base, by seed",
        "sampled, late",
        f"steps to {TARGET}, greedy",
        f"steps to {TARGET}, sampled",
        "tokens, right",
        "tokens, wrong",
        "clipped share",
    ]
    seeds = sorted({len(r) for r in runs.values()})
    lines = [
        f"`python benchmarks/ablation.py` on {machine()}; {versions()}; every run: `{COMMON}`; "
        f"seeds per row: {seeds}"
    ]
    for family, title in (("recipe", "Recipes"), ("ablation", "Ablations, of GRPO without a KL")):
        names = [name for name, (kind, _) in RUNS.items() if kind == family and name in runs]
        head = ["recipe"] if family == "recipe" else ["", "flags"]
        lines += ["", f"## {title}", ""]
        lines += table(head + columns, [summary(name, runs) for name in names])
    write_lines(out / "ablation.md", lines)
    picture(runs, out / "ablation.png")


SAMPLED, GREEDY = "rollout/success_rate", "eval/accuracy"
WRONG = "rollout/tokens_wrong"
# metric: its words, and the upper end of its axis
AXES = {
    SAMPLED: ("accuracy, sampled", 1.02),
    GREEDY: ("accuracy, greedy", 1.5),  # the room above 1 is the legend's
    WRONG: ("tokens of wrong answers", None),
}
PANELS = {
    "policy term": (SAMPLED, ["grpo", "gspo", "gmpo", "cispo", "sapo", "dppo"]),
    "advantage": (SAMPLED, ["base", "without std", "batch std", "raw reward"]),
    "KL weight": (SAMPLED, ["base", "KL 0.001", "KL 0.01", "KL 0.1"]),
    "group size, 128 sequences": (
        SAMPLED,
        ["group size 2", "group size 4", "base", "group size 16"],
    ),
    "stale data: one epoch (base) and four": (
        GREEDY,
        ["base", "4 epochs, clip 0.2", "4 epochs, no clip", "4 epochs, no ratio"],
    ),
    "mean over tokens": (WRONG, ["base", "token-mean", "without length normalisation"]),
}


def picture(runs: dict[str, list[dict]], path: Path) -> None:
    """What each family does, against steps: mean over the seeds, and their range in the shade."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), constrained_layout=True)
    for ax, (title, (metric, names)) in zip(axes.flat, PANELS.items(), strict=True):
        for i, name in enumerate(n for n in names if n in runs):
            curves = [
                {row["step"]: row[metric] for row in run["curve"] if metric in row}
                for run in runs[name]
            ]
            steps = sorted(set.intersection(*map(set, curves)))
            values = [[curve[s] for curve in curves] for s in steps]
            color = f"C{i}"
            ax.plot(steps, list(map(statistics.mean, values)), color=color, lw=1.6, label=name)
            low, high = list(map(min, values)), list(map(max, values))
            ax.fill_between(steps, low, high, color=color, alpha=0.12, lw=0)
        words, top = AXES[metric]
        ax.set(title=title, xlabel="step", ylabel=words, ylim=(0, top))
        if metric == GREEDY:
            ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@command
def main(argv: list[str]) -> None:
    """Run what is missing, two at a time, and report after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args(argv)
    log = args.out / "ablation.jsonl"
    if not log.exists():
        write_jsonl(log, [])
    done = {(run["name"], run["seed"]) for run in read_jsonl(log)}
    jobs = [(name, seed) for seed in args.seeds for name in args.only if (name, seed) not in done]
    if not args.report and jobs:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(one_run, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    run = future.result()
                    write_jsonl(log, [*read_jsonl(log), run])
                    seconds = f"{final(run):.3f} in {run['seconds']} s"
                    print(f"{run['name']}, seed {run['seed']}: {seconds}", flush=True)
                    report(log, args.out)
            finally:
                pool.shutdown(cancel_futures=True)  # of a run that ended with an error
    report(log, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
