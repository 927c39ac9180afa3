"""Does another checkout of this project train to the same bits? Metrics, weights, optimizer state.

    git worktree add ../before 1aaccb7
    python benchmarks/same_numbers.py --against ../before

Short runs with the same seeds in both checkouts, one thread each: every objective, and every option
that changes the numbers. Compared are metrics.jsonl (without times), and the model and the
trainer's state in the last checkpoint. For a refactoring: it must not change a bit. Prints a table,
and exits with 1 if any run differs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from objectives.table import OBJECTIVES  # noqa: E402

SMALL = [
    "--preset=tiny",
    "--device=cpu",
    "--steps=3",
    "--rollouts_per_step=5",
    "--group_size=4",
    "--train_batch_size=10",
    "--micro_batch_size=4",
    "--max_new_tokens=24",
    "--eval_interval=3",
    "--eval_questions=20",
    "--checkpoint_interval=3",
    "--lr=1e-4",
]
REWARDS = """
def some(prompts, completions, **columns):
    return [None if i % 5 == 0 else len(c) / 40 for i, c in enumerate(completions)]
"""
RUNS = {name: f"--objective={name}" for name in OBJECTIVES} | {
    "the demo's first steps": "--rollouts_per_step=32 --group_size=8 --train_batch_size=256 "
    "--micro_batch_size=128 --max_new_tokens=48 --lr=3e-5",
    "one step for a rollout, KL": "--train_batch_size=20 --kl_weight=0.1",
    "two epochs": "--objective=grpo --epochs_per_step=2",
    "two epochs of dapo": "--objective=dapo --epochs_per_step=2",
    "dynamic sampling": "--dynamic_sampling=4",
    "KL in the reward": "--kl_weight=0.1 --kl_in_reward",
    "KL in the reward, one step for a rollout": "--objective=rloo --train_batch_size=20",
    "exact KL": "--kl_weight=0.3 --kl_estimator=full",
    "k3-ratio": "--kl_weight=0.3 --kl_estimator=k3-ratio",
    "k1+ and dual clip": "--kl_weight=0.3 --kl_estimator=k1+ --clip_ratio_c=3",
    "entropy bonus": "--objective=grpo --entropy_weight=0.01",
    "adaptive entropy bonus": "--objective=grpo --entropy_weight=0.01 --entropy_target=2",
    "top entropy": "--top_entropy=0.3",
    "top entropy, one step for a rollout": "--top_entropy=0.3 --train_batch_size=20",
    "sampler correction": "--sampler_correction=token_truncate --sampler_cap=1.01 --top_p=0.9",
    "sampler correction of sequences": "--objective=gspo --sampler_correction=sequence_mask "
    "--top_p=0.9",
    "truncated completions": "--mask_truncated --max_new_tokens=8 --epochs_per_step=2",
    "several rewards": "--reward accuracy format length_penalty --reward_weights 1 0.2 0.3",
    "several rewards, gdpo": "--objective=gdpo --reward accuracy soft_overlong repetition "
    "--reward_weights 1 0.5 -0.3",
    "the tutorial's reward": "--reward=tutorial",
    "your own reward, some None": "--reward accuracy REWARD:some --reward_weights 1 0.5 "
    "--epochs_per_step=2",
    "only None for some": "--reward=REWARD:some --objective=grpo --epochs_per_step=2",
    "reward weights": "--relative_reward_weight=0.5 --baseline_reward_weight=0.3",
    "temperature and nucleus": "--temperature=0.7 --top_p=0.8 --objective=grpo",
    "bf16": "--precision=bf16 --objective=grpo",
    "bf16-pure": "--precision=bf16-pure --objective=grpo",
    "gradient checkpointing": "--gradient_checkpointing --objective=grpo",
    "warm-up, weight decay, norm": "--warmup_steps=4 --weight_decay=0.1 --max_norm=0.2",
    "pass@k": "--eval_samples=3",
    "a model that cannot share prompts": "--model=BLOOM --objective=grpo",
    "the same, exact KL": "--model=BLOOM --kl_weight=0.3 --kl_estimator=full --entropy_weight=0.01",
    "small batches of the rollout": "--rollout_batch_size=7 --micro_batch_size=1",
}
# Two steps there, then on in both.
RESUMED = "--objective=grpo --epochs_per_step=2 --steps=2 --checkpoint_interval=2"
# Run in a checkout: the runs of its standard input, one after the other.
DRIVER = """
import contextlib, io, json, sys
import torch
torch.set_num_threads(1)
from accelerate.state import AcceleratorState
import train
for name, argv in json.load(sys.stdin):
    AcceleratorState._reset_state(reset_partial_state=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            train.main(argv)
    except SystemExit as error:
        print(name, "ended with", error.code, said.getvalue()[-2000:], flush=True)
"""


def make_bloom(folder: Path) -> None:
    """A random model with ALiBi, whose prompts cannot be shared, and the bundled tokenizer."""
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny" / "model")
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BloomForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def drive(checkout: Path, runs: list[tuple[str, list[str]]]) -> str:
    """Run them in a checkout; returns what went wrong."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(runs),
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout + ("" if done.returncode == 0 else done.stderr[-2000:])


# New since 1aaccb7; and read more strictly: whose last number is no answer.
ON_PURPOSE = {"rollout/alarms", "eval/accuracy_flexible"}


def metrics(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without what depends on the clock or the machine."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def equal(ours: object, theirs: object) -> bool:
    """Whether two nested states have the same keys, numbers and tensors."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return ours == theirs


def differences(ours: Path, theirs: Path) -> tuple[int, str]:
    """How many numbers of the metrics were compared, and what differs ("" if nothing does)."""
    if not all((run / "metrics.jsonl").is_file() for run in (ours, theirs)):
        return 0, "no metrics"
    a, b = metrics(ours), metrics(theirs)
    compared = sum(map(len, a))
    if len(a) != len(b):
        return compared, f"{len(a)} rows and {len(b)}"
    for row, other in zip(a, b, strict=True):
        both = (row.keys() | other.keys()) - ON_PURPOSE
        names = sorted(k for k in both if row.get(k) != other.get(k))
        if names:
            shown = ", ".join(f"{k} {row.get(k)} {other.get(k)}" for k in names[:3])
            return compared, f"step {row['step']}: {shown} ({len(names)} metrics)"
    last = [sorted(run.glob("checkpoint-*"))[-1] for run in (ours, theirs)]
    weights = {(p / "model.safetensors").read_bytes() for p in last}
    if len(weights) > 1:
        return compared, "weights"
    states = [torch.load(p / "trainer_state.pt", weights_only=True) for p in last]
    return compared, "" if equal(*states) else "trainer state"


def run_both(checkouts: dict[str, Path], names: list[str], work: Path) -> None:
    """Run everything in both checkouts, into WORK/SIDE-NUMBER; prints what went wrong."""
    lists: dict[str, list] = {side: [] for side in checkouts}
    resumed = len(names)
    for number, text in enumerate([*(RUNS[name] for name in names), RESUMED]):
        text = text.replace("BLOOM", str(work / "bloom"))
        flags = [*SMALL, *text.replace("REWARD", str(work / "mine.py")).split()]
        for side in checkouts if number != resumed else ["theirs"]:
            lists[side].append((str(number), [*flags, f"--run_dir={work}/{side}-{number}"]))
    with ThreadPoolExecutor() as pool:
        said = pool.map(lambda side: drive(checkouts[side], lists[side]), checkouts)
    print("".join(said), end="")
    shutil.copytree(work / f"theirs-{resumed}", work / f"ours-{resumed}")
    for side, checkout in checkouts.items():
        flags = [f"--resume={work}/{side}-{resumed}", "--steps=4"]
        print(drive(checkout, [("resumed", flags)]), end="")


def main() -> int:
    """Run everything in both checkouts and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", required=True, type=Path, help="the other checkout")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    given = parser.parse_args()
    names, found = given.only, []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_bloom(work / "bloom")
        (work / "mine.py").write_text(REWARDS, encoding="utf-8")
        run_both({"ours": HERE, "theirs": given.against.resolve()}, names, work)
        print("| run | metrics compared | differs |\n|---|---|---|")
        for number, name in enumerate([*names, "resumed from the other's checkpoint"]):
            count, what = differences(work / f"ours-{number}", work / f"theirs-{number}")
            found.append(what)
            print(f"| {name} | {count} | {what or 'nothing'} |")
    print(f"{len(found)} runs, {sum(map(bool, found))} differ")
    return int(any(found))


if __name__ == "__main__":
    sys.exit(main())
