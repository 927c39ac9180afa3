"""A rollout from a vLLM server beside our own: tokens a second, the gap, the cost of a hand-over.

    python benchmarks/served.py --model FOLDER --url http://localhost:8000

Starts no server: docs/served.md has the command, with --max-lora-rank 16. The two engines sample
the same questions in turn, 8 completions each, with adapters that are drawn at random before each
turn. The gap is the distance between the server's log-probability of a token and the policy's. The
surprise is the mean of (-log-probability - entropy) over the tokens, 0 for a sampler that draws
from the distribution that it states, whatever the weights: a gap cannot see that. On a machine with
other work the wall clock says little: --pid, of the server, adds tokens per second of processor
time, of the server's processes and this one together.
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from common import RESULTS, command_line, machine, positive, seconds, table, versions, write_lines

from loss import sequences_log_probs
from objectives.equations import token_log_probs
from replay_buffer import pad_batch
from rollout import Group, rollout
from support.command_line import Parser, parse_config
from support.config import Config
from support.data import Question
from support.errors import command
from support.generation import Sampling
from support.model import load_to_train, load_tokenizer
from support.policy import Policy
from support.prompts import training_questions
from support.served_rollout import ServedModel
from support.shared_prompts import share_prompts, shared_log_probs

LONG = ("gaps", "surprises")  # a number for each token


def redraw(policy: Policy, seed: int) -> None:
    """Other adapters: A as LoRA begins, B random, so that they change what the model says."""
    torch.manual_seed(seed)
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            fan_in = parameter.shape[-1]
            std = fan_in**-0.5 if "lora_A" in name else 0.002
            parameter.data.normal_(std=std)


@torch.no_grad()
def compare(policy: Policy, groups: list[Group]) -> dict[str, Any]:
    """The gaps and the surprises of the tokens of some groups."""
    gaps, surprises = [], []
    for group in groups:  # one at a time, for the memory
        batch = pad_batch(group.experiences)
        log_probs, entropies = (each.float().cpu() for each in policy(batch)[:2])
        gaps.append((log_probs - batch.sampler_log_probs)[batch.action_mask].abs())
        surprises.append((-log_probs - entropies)[batch.action_mask])
    return {"gaps": torch.cat(gaps), "surprises": torch.cat(surprises)}


def processor_seconds(pid: int | None) -> float:
    """Of this process, and of the one `pid` and those that it has started."""
    found = [psutil.Process()]
    if pid:
        server = psutil.Process(pid)
        found += [server, *server.children(recursive=True)]
    times = [process.cpu_times() for process in found]
    return sum(each.user + each.system for each in times)


def turn(
    policy: Policy,
    served: ServedModel | None,
    tokenizer: Any,
    questions: list[Question],
    how: tuple[int, Sampling],
    pid: int | None,
) -> dict[str, Any]:
    """One rollout by one engine."""
    policy.served, group_size, sampling = served, *how
    hand_over = seconds(policy.sampler)
    groups: list[Group] = []
    before = processor_seconds(pid)
    took = seconds(
        lambda: groups.extend(rollout(policy.sampler(), tokenizer, questions, group_size, sampling))
    )
    tokens = sum(len(c.ids) for group in groups for c in group.completions)
    busy = processor_seconds(pid) - before
    policy.served = None
    found = {"tokens": tokens, "seconds": took, "busy": busy, "hand-over": hand_over}
    return {**found, **compare(policy, groups)}


def cost_of_a_hand_over(policy: Policy, served: ServedModel, sampling: Any) -> list[float]:
    """Seconds of saving, loading and unloading; and, after it, of the check."""
    prompt = list(range(5, 105))
    redraw(policy, 99)
    start = time.perf_counter()
    served.with_present_weights()
    middle = time.perf_counter()
    served.check([prompt] * 4, sampling, [0])
    return [middle - start, time.perf_counter() - middle]


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """A line for each engine."""
    rows = []
    for name, turns in found.items():
        rates = [each["tokens"] / each["seconds"] for each in turns]
        busy = [each["tokens"] / each["busy"] for each in turns]
        gaps = torch.cat([each["gaps"] for each in turns])
        surprises = torch.cat([each["surprises"] for each in turns]).double()
        error = 1.96 * surprises.std().item() / len(surprises) ** 0.5
        rows.append(
            [
                name,
                sum(each["tokens"] for each in turns),
                f"{statistics.median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f})",
                f"{statistics.median(busy):.1f} ({min(busy):.1f}–{max(busy):.1f})",
                f"{gaps.mean():.1e}",
                f"{gaps.max():.1e}",
                f"{surprises.mean():+.4f} ± {error:.4f}",
            ]
        )
    return rows


def measure(args: argparse.Namespace, config: Config) -> list[str]:
    """The lines of the report about one model."""
    tokenizer, model = load_tokenizer(config.model), load_to_train(config)
    log_probs, longest = sequences_log_probs, config.max_prompt_tokens + config.max_new_tokens

    shared = partial(shared_log_probs, token_log_probs=token_log_probs)
    on_host = share_prompts(model, config.model, longest, log_probs, shared)
    policy = Policy(model, shared if on_host else log_probs, config.temperature, on_host).eval()
    served = ServedModel(policy, config)
    questions = training_questions(config, tokenizer)[: args.questions]
    how = args.group_size, Sampling.of(config)
    found: dict[str, list[dict[str, Any]]] = {"`generate`": [], "served": []}
    for number in range(args.turns + 1):
        redraw(policy, number)
        for name, engine in (("served", served), ("`generate`", None)):
            torch.manual_seed(number)
            # A short turn first, to warm both up.
            now = how if number else (how[0], replace(how[1], max_new_tokens=8))
            result = turn(policy, engine, tokenizer, questions, now, args.pid)
            print(number, name, {k: v for k, v in result.items() if k not in LONG}, flush=True)
            print(*rows_of({name: [result]}), flush=True)
            if number:
                found[name].append(result)
    cost = cost_of_a_hand_over(policy, served, how[1])
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pairs = zip(found["served"], found["`generate`"], strict=True)
    ratios = [a["tokens"] / a["busy"] / (b["tokens"] / b["busy"]) for a, b in pairs]
    head = ["engine", "tokens", "tokens a second, median (range)", "of processor time"]
    head += ["gap, mean", "gap, largest"]
    hand_overs = [each["hand-over"] for each in found["served"]]
    return [
        f"{Path(config.model).name}, {config.precision}: {args.questions} questions × "
        f"{args.group_size} completions of up to {config.max_new_tokens} tokens, {args.turns} "
        f"turns each, alternating; {size:,} numbers in the adapters, drawn anew for each turn.",
        "",
        *table([*head, "surprise, nats a token"], rows_of(found)),
        "",
        f"Served ÷ `generate`, by processor time, of the turns in pairs: {min(ratios):.2f} to "
        f"{max(ratios):.2f}, median {statistics.median(ratios):.2f}. A hand-over (save, load, "
        f"unload) took {statistics.median(hand_overs):.2f} s (median), and the check after it "
        f"{cost[1]:.2f} s.",
    ]


@command
def main(argv: list[str]) -> None:
    """Measure, and write results/served-MODEL.md."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder of the server's base model")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--questions", type=positive, default=8)
    parser.add_argument("--group_size", type=positive, default=8)
    parser.add_argument("--max_new_tokens", type=positive, default=128)
    parser.add_argument("--adapter_rank", type=positive, default=16)
    parser.add_argument("--turns", type=positive, default=3)
    parser.add_argument("--pid", type=positive, help="of the server, if it runs on this machine")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    config, _ = parse_config(
        [
            "--preset=laptop",
            f"--model={args.model}",
            f"--rollout_url={args.url}",
            f"--precision={args.precision}",
            f"--max_new_tokens={args.max_new_tokens}",
            f"--adapter_rank={args.adapter_rank}",
            "--device=cpu",
        ]
    )
    about = f"`{command_line(argv)}` on {machine()}; {versions()}."
    name = f"served-{Path(args.model).name}.md"
    write_lines(args.out / name, [about, "", *measure(args, config)])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
