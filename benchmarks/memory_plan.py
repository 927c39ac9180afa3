"""Does it fit? The memory that a run needs, from a model's sizes, before it is downloaded.

    python benchmarks/memory_plan.py                   the table of docs/memory.md
    python benchmarks/memory_plan.py --check FOLDER    beside measured peaks and seconds, on a CPU
    python benchmarks/memory_plan.py --check FOLDER --device cuda --out memory.jsonl
    python benchmarks/memory_plan.py --run runs/NAME   the peak of a run beside the plan for it

The sizes are those of each model's config; the model itself is built on the meta device, which
holds no numbers. What is counted, in bytes:

    weights      4 for each parameter (fp32), 2 in bf16-pure and for frozen ones under adapters,
                 about 0.52 in NF4 (4 bits, and a scale for 64 of them in 8 bits)
    optimizer    Adam's two moments of what is trained
    sampler      a bf16 copy for the rollout
    reference    a second model, where there is a KL and no adapter
    rollout      keys, values and logits of all sequences of a batch; or its prompts, being read
    update       gradients; the weights that autocast keeps in bf16; what the backward pass needs of
                 one micro-batch: with gradient checkpointing the input of each layer, and all of
                 one layer; and some pieces of logits

The peak is what stays there, and the larger one of rollout and update.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import (
    ROOT,
    available,
    machine,
    put_between,
    read_jsonl,
    table,
    versions,
    write_jsonl,
    write_lines,
)
from transformers import AutoConfig, AutoModelForCausalLM

from objectives.table import objective_of
from support.command_line import parse_config
from support.config import PRESETS, Config, resolve_path
from support.errors import command
from support.pieces import LOGITS_AT_A_TIME

GB = 1e9
CARDS = (16, 24, 40, 48, 80, 141)


def shape(hidden: int, layers: int, heads: int, inner: int) -> dict[str, int]:
    """The sizes of a model under their names in config.json."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }


QWEN = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 151_936}
LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128_256}
TIED = {"tie_word_embeddings": True}
# From the config.json of each model on the hub.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": QWEN | TIED | shape(896, 24, 14, 4864),
    "Qwen2.5-1.5B": QWEN | TIED | shape(1536, 28, 12, 8960),
    "Qwen2.5-3B": QWEN | TIED | shape(2048, 36, 16, 11008),
    "Qwen2.5-7B": QWEN
    | shape(3584, 28, 28, 18944)
    | {"num_key_value_heads": 4, "vocab_size": 152_064},
    "Llama-3.2-1B": LLAMA | TIED | shape(2048, 16, 32, 8192) | {"head_dim": 64},
    "Llama-3.1-8B": LLAMA | shape(4096, 32, 32, 14336),
}


@dataclass(frozen=True)
class Plan:
    """What decides the memory of a run, beside its model."""

    words: str
    config: Config


def sizes_of(config: Any) -> dict[str, float]:
    """What is counted of a model, from its config, without a single number of it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tables = {
        id(m.weight): m.weight.numel() for m in model.modules() if hasattr(m, "num_embeddings")
    }
    head = model.get_output_embeddings().weight
    tables[id(head)] = head.numel()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head]
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tables": sum(tables.values()),
        "linear": sum(m.weight.numel() for m in linear),
        "adapter": sum(m.in_features + m.out_features for m in linear),  # for each rank
        "head": head.numel(),
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "inner": text.intermediate_size,
        "heads": text.num_attention_heads * head_dim,
        "cache": 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim,  # for a token
        "vocabulary": text.vocab_size,
    }


def plan(sizes: dict[str, float], config: Config, device: str = "cuda") -> dict[str, float]:
    """The parts of the peak, in bytes."""
    count, rank = sizes["parameters"], config.adapter_rank
    fp32 = config.precision == "fp32"
    width, number = (4 if fp32 else 2), (2 if config.precision == "bf16-pure" else 4)
    copies = 2 * count if config.precision == "bf16" and not rank else 0  # a bf16 model beside fp32
    trained = rank * sizes["adapter"] if rank else count
    if rank:
        weight, number = width, 4
        linear = 0.52 if config.quantize == "4bit" else weight
        weights = linear * sizes["linear"] + weight * (count - sizes["linear"]) + 4 * trained
    else:
        weights = number * count
    has_kl = objective_of(config).kl_weight > 0
    return {
        "weights": weights,
        "optimizer": trained * (2 if config.optimizer == "adamw_8bit" else 2 * number),
        "sampler": copies,
        "reference": weights if has_kl and not rank else 0,
        "rollout": rollout_bytes(sizes, config, width),
        "update": number * trained + update_bytes(sizes, config, width, device, copies),
    }


def rollout_bytes(sizes: dict[str, float], config: Config, width: int) -> float:
    """Keys, values and logits of a batch; or what its prompts take while they are read.

    A rollout reads each question once, an evaluation as many as the batch has.
    """
    batch, evaluated = config.rollout_batch_size, config.eval_questions or config.rollout_batch_size
    prompts = min(batch, evaluated) if config.eval_interval else -(-batch // config.group_size)
    read = config.max_prompt_tokens * (3 * sizes["inner"] + sizes["cache"]) * width
    length = config.max_prompt_tokens + config.max_new_tokens
    sampled = min(batch, config.sequences_per_step)
    decode = length * sizes["cache"] * width + 14 * sizes["vocabulary"]
    return max(prompts * read, sampled * decode)


def update_bytes(
    sizes: dict[str, float], config: Config, width: int, device: str, copies: float
) -> float:
    """Of one micro-batch: activations, pieces of logits, and the gradient of the head.

    A layer keeps about 8 rows of its hidden size and 4 of its inner one for the backward pass.
    Autocast keeps its bf16 weights until the forward pass is over, and with gradient checkpointing
    makes those of one layer again.
    """
    prompts = -(-config.micro_batch // config.group_size)  # each stands once for its group
    tokens = config.micro_batch * config.max_new_tokens + prompts * config.max_prompt_tokens
    stream = 4 if config.precision == "bf16" and not config.adapter_rank else width
    layer = tokens * width * (8 * sizes["hidden"] + 2 * sizes["heads"] + 4 * sizes["inner"])
    if config.adapter_rank:  # which read their inputs in fp32
        layer += tokens * 4 * (6 * sizes["hidden"] + sizes["inner"])
    kept = tokens * sizes["hidden"] * stream * sizes["layers"]
    head = 0 if config.adapter_rank else sizes["head"] * width
    pieces = 3 * 4 * LOGITS_AT_A_TIME[device] + head
    if config.gradient_checkpointing:
        return kept + max(copies, layer + pieces)
    return kept + copies + layer * sizes["layers"] + pieces


def peak(parts: dict[str, float]) -> float:
    """What stays, and the larger one of rollout and update."""
    staying = sum(parts[name] for name in ("weights", "optimizer", "sampler", "reference"))
    return staying + max(parts["rollout"], parts["update"])


# ------------------------------------------------------------------------------------- the tables

GSM8K = PRESETS["gsm8k-24gb"] | {"micro_batch_size": 8}
PLANS = [
    Plan("all weights", Config(**GSM8K)),
    Plan("all weights, Adam in 8 bits", Config(**GSM8K, optimizer="adamw_8bit")),
    Plan("all weights, in bf16-pure", Config(**GSM8K, precision="bf16-pure")),
    Plan("LoRA, rank 16", Config(**GSM8K, adapter_rank=16)),
    Plan("LoRA on 4 bits, rank 16", Config(**GSM8K, adapter_rank=16, quantize="4bit")),
]


def tables() -> list[str]:
    """A row for each model and each way to train it, with the smallest card that holds it."""
    cells = []
    for name, settings in MODELS.items():
        sizes = sizes_of(AutoConfig.for_model(**settings))
        for each in PLANS:
            parts = {part: value / GB for part, value in plan(sizes, each.config).items()}
            total = peak(parts)
            card = next((str(card) for card in CARDS if 0.92 * card >= total), "none of these")
            cells.append([name, each.words, *(f"{value:.1f}" for value in parts.values())])
            cells[-1] += [f"**{total:.1f}**", card]
    head = ["model", "what is trained", "weights", "optimizer", "sampler", "reference", "rollout"]
    return table([*head, "update", "peak, GB", "card, GB"], cells)


INTERPRETER = 0.45  # GB of Python and its libraries
# A reward that differs, and so a gradient, whatever is said.
DIFFERS = """
def differs(prompts, completions, **columns):
    return [sum(map(ord, text)) % 97 / 97 for text in completions]
"""


# What a plan needs beside requirements.txt.
PACKAGES = {"adapter_rank": "peft", "quantize": "bitsandbytes", "optimizer": "bitsandbytes"}
SIZES = {
    "cpu": {"rollouts_per_step": 2, "group_size": 8, "train_batch_size": 16, "max_new_tokens": 64},
    "cuda": {"rollouts_per_step": 8, "train_batch_size": 96, "micro_batch_size": 16},
}


def measured(model: str, config: Config, flags: list[str], device: str) -> dict[str, Any]:
    """Three steps of a run: planned and measured GB, median seconds of the last two."""
    # Else freed memory of the size of a matrix stays in the process, in pieces.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "0"}
    with tempfile.TemporaryDirectory() as work:
        Path(work, "own.py").write_text(DIFFERS)
        own = replace(config, run_dir=f"{work}/run", reward=[f"{work}/own.py:differs"])
        own.save(Path(work, "config.yaml"))
        flags = [f"--config={work}/config.yaml", *flags, f"--run_dir={work}/run"]
        sizes = sizes_of(AutoConfig.from_pretrained(resolve_path(model)))
        planned = planned_peak(sizes, parse_config(flags)[0], device)
        line = [sys.executable, "train.py", *flags]
        subprocess.run(line, cwd=ROOT, check=True, env=os.environ | malloc)
        rows = read_jsonl(Path(work, "run", "metrics.jsonl"))
    assert all(row["train/grad_norm"] > 0 for row in rows), "every step has a gradient"
    times = ("time/step", "time/rollout", "time/update")
    seconds = [statistics.median(row[part] for row in rows[1:]) for part in times]
    found = {"planned": planned, "measured": max(row["perf/peak_memory_gb"] for row in rows)}
    return found | {"seconds": seconds}


def planned_peak(sizes: dict[str, float], config: Config, device: str) -> float:
    """In GB; on a CPU with the interpreter, whose memory is measured too."""
    return peak(plan(sizes, config, device)) / GB + (INTERPRETER if device == "cpu" else 0)


def check(model: str, device: str, flags: list[str], out: Path | None) -> list[str]:
    """Every plan with a model that is here: peak beside plan, and seconds.

    Args:
        flags: further flags of train.py.
        out: each row is added to this file as it is measured; what is in it is not done again.
    """
    same = {"kl_weight": 0.0, "steps": 3, "max_prompt_tokens": 384, "dataset": "tiny/task"}
    same |= {"device": device, "model": model, "eval_interval": 0, "checkpoint_interval": 0}
    rows = read_jsonl(out) if out else []
    done = {row["what"] for row in rows}
    for each in (each for each in PLANS if each.words not in done):
        needs = {p for n, p in PACKAGES.items() if getattr(each.config, n) != getattr(Config, n)}
        missing = sorted(name for name in needs if find_spec(name) is None)
        row = {"what": each.words, "missing": missing}
        if not missing:
            row |= measured(model, replace(each.config, **same, **SIZES[device]), flags, device)
        rows.append(row)
        print(row, flush=True)
        if out:
            write_jsonl(out, rows)
    head = [Path(model).name, "plan, GB", "measured, GB", "measured ÷ plan"]
    head += ["s a step", "s of the rollout", "s of the update"]
    return [*table(head, map(cells_of, rows)), "", f"{machine(device)}; {versions()}"]


def cells_of(row: dict[str, Any]) -> list[str]:
    """A line of the table; of a plan whose packages are missing, which."""
    if row["missing"]:
        return [row["what"], f"not measured: without {', '.join(row['missing'])}", *[""] * 5]
    planned, found = row["planned"], row["measured"]
    cells = [row["what"], f"{planned:.2f}", f"{found:.2f}", f"{found / planned:.2f}"]
    return [*cells, *(f"{seconds:.1f}" for seconds in row["seconds"])]


def of_run(run: Path) -> list[str]:
    """The highest peak of a run that is there, beside the plan for its settings."""
    config = parse_config([f"--config={run / 'config.yaml'}"])[0]
    # The plan for a GPU's run needs no GPU.
    device = available("auto") if config.device == "auto" else config.device
    sizes = sizes_of(AutoConfig.from_pretrained(resolve_path(config.model)))
    planned = planned_peak(sizes, config, device)
    found = max(row["perf/peak_memory_gb"] for row in read_jsonl(run / "metrics.jsonl"))
    words = f"{planned:.2f}", f"{found:.2f}", f"{found / planned:.2f}"
    return table(["run", "plan, GB", "measured, GB", "measured ÷ plan"], [[run.name, *words]])


@command
def main(argv: list[str]) -> None:
    """Write the table into docs/memory.md, or print the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", metavar="FOLDER", help="a model to measure beside the plan")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the check")
    parser.add_argument("--out", type=Path, help="a .jsonl of the check's rows, which is added to")
    parser.add_argument("--run", type=Path, help="the folder of a run to see beside the plan")
    parser.add_argument("flags", nargs="*", help="further flags for train.py, after --")
    args = parser.parse_args(argv)
    if args.check or args.run:
        run = args.run
        found = of_run(run) if run else check(args.check, args.device, args.flags, args.out)
        print("\n".join(found))
        if args.out:
            write_lines(args.out.with_suffix(".md"), found)
        return
    put_between(ROOT / "docs" / "memory.md", "plan", tables())


if __name__ == "__main__":
    main()
