"""How many tokens a second does a rollout make, by engine and by the sequences of a batch?

    python benchmarks/rollout_speed.py --model FOLDER --dataset FOLDER --batches 16 64 256
    python benchmarks/rollout_speed.py … --url http://localhost:8000    and a vLLM server's

Three engines sample the same questions, completions as long as they become: `ours` is rollout.py;
`transformers` is generate as it comes, one padded batch, as TRL calls it; `served` is vLLM, with an
adapter (docs/served.md has the command). The floor is that of benchmarks/roofline.py for reading
the prompts and decoding, from the lengths of the very completions: no program on this machine does
that work in less. A row is added to rollout_speed.jsonl as it is measured, and not measured again.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    available,
    command_line,
    machine,
    positive,
    read_jsonl,
    table,
    versions,
    write_jsonl,
    write_lines,
)
from memory import highest, reset
from roofline import (
    DTYPES,
    Rates,
    Size,
    Work,
    build_trainer,
    decode_floor,
    make_config,
    measure_ceilings,
    model_shapes,
    prefill_floor,
)
from step import now

from rollout import Group, trim_at_eos
from support import generation
from support.command_line import Parser
from support.config import Config
from support.data import Question
from support.errors import UserError, command
from support.generation import Sampling
from train import Trainer

Engine = Callable[[list[Question], int, Sampling], list[Group]]


@torch.no_grad()
def transformers_generate(
    trainer: Trainer, questions: list[Question], group_size: int, sampling: Sampling
) -> list[Group]:
    """What generate does with a padded batch, with its own draw."""
    model, tokenizer = trainer.policy.sampler(), trainer.tokenizer
    ends = generation.end_tokens(model, tokenizer)
    settings = generation.generation_config(sampling, ends, tokenizer)
    settings.update(do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0)
    prompts = [q.prompt_ids for q in questions for _ in range(group_size)]
    ids, mask = generation.pad_left(prompts, settings.pad_token_id, model.device)
    with generation.replaced_generation_config(model, settings):
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    rows = output.sequences[:, ids.shape[1] :].tolist()
    completions = iter([trim_at_eos(row, [], ends, tokenizer) for row in rows])
    return [Group(q, [next(completions) for _ in range(group_size)]) for q in questions]


def engines(args: argparse.Namespace) -> tuple[Trainer, dict[str, Engine]]:
    """The trainer whose model samples, and the engines by name."""
    sizes = args.group_size, args.group_size, 1, args.max_new_tokens
    flags = [f"--device={args.device}", f"--dataset={args.dataset}", *args.flags]
    trainer = build_trainer(make_config(args.model, *sizes, *flags))
    found: dict[str, Engine] = {"ours": trainer.sample}
    found["transformers"] = lambda *how: transformers_generate(trainer, *how)
    if args.url:
        served = [*flags, "--adapter_rank=16", f"--rollout_url={args.url}"]
        found["served"] = build_trainer(make_config(args.model, *sizes, *served)).sample
    return trainer, found


def rates_of(trainer: Trainer) -> Rates:
    """The limits of this machine, at the shapes of a rollout of full length."""
    size, config, device = Size.of(trainer.policy.model), trainer.config, trainer.policy.device
    name = "fp32" if config.precision == "fp32" else "bf16"
    prompt = len(trainer.questions.questions[0].prompt_ids)
    work = Work([prompt], [[config.max_new_tokens] * config.group_size])
    number = DTYPES[name].itemsize
    shapes = model_shapes(size, work, config, device)
    limits = measure_ceilings(shapes, size.body * number, device)
    matmul = max(limits.matmul[name].values())
    return Rates(matmul, matmul, max(limits.memory.values()), number)


def floor_of(size: Size, groups: list[Group], config: Config, rates: Rates) -> float:
    """Seconds that reading the prompts and decoding take at these limits."""
    lengths = [[len(c.ids) for c in group.completions] for group in groups]
    work = Work([len(group.question.prompt_ids) for group in groups], lengths)
    return sum(floor(size, work, config, rates) for floor in (prefill_floor, decode_floor))


def measure(
    trainer: Trainer, engine: Engine, batch: int, args: argparse.Namespace, rates: Rates
) -> dict[str, Any]:
    """One engine at one batch: medians of some rollouts, after a short one."""
    questions = trainer.questions.questions[: batch // args.group_size]
    config = replace(trainer.config, rollout_batch_size=batch)
    sampling, place = Sampling.of(config), trainer.policy.device
    size, rows = Size.of(trainer.policy.model), []
    torch.manual_seed(0)
    try:
        engine(questions, args.group_size, replace(sampling, max_new_tokens=4))
        reset(place)
        for _ in range(args.repeats):
            start = now()
            groups = engine(questions, args.group_size, sampling)
            taken = now() - start
            tokens = sum(len(c.ids) for group in groups for c in group.completions)
            row = {"tokens": tokens, "seconds": taken, "rate": tokens / taken}
            rows.append(row | {"share": floor_of(size, groups, config, rates) / taken})
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"failed": "out of memory"}
    except UserError as error:  # a server that does not answer
        return {"failed": str(error)}
    found = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return found | {"peak_gb": highest(place) / 1e9}


def cells_of(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    if "failed" in row:
        return [row["engine"], row["batch"], row["failed"], *[""] * 4]
    numbers = f"{row['seconds']:.2f}", f"{row['tokens']:.0f}", f"{row['share']:.1%}"
    return [row["engine"], row["batch"], f"{row['rate']:.0f}", *numbers, f"{row['peak_gb']:.2f}"]


def report(rows: list[dict[str, Any]], config: Config, argv: list[str]) -> list[str]:
    """The table of what is measured so far."""
    head = ["engine", "sequences in a batch", "tokens/s", "seconds", "tokens"]
    return [
        f"`{command_line(argv)}` on {machine(available(config.device))}; {versions()}.",
        "",
        f"{Path(config.model).name}, {config.precision}, completions of up to "
        f"{config.max_new_tokens} tokens, groups of {config.group_size}.",
        "",
        *table([*head, "floor ÷ seconds", "peak memory, GB"], map(cells_of, rows)),
    ]


@command
def main(argv: list[str]) -> None:
    """Measure what is not measured yet, and write the table after each row."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--model", default="tiny/model", help="a Hugging Face folder, or a hub name")
    flag("--dataset", default="tiny/task", help="as train.py's")
    flag("--device", default="auto", help="cuda, cpu or auto")
    flag("--batches", type=positive, nargs="+", default=[16, 32, 64, 128, 256])
    flag("--group_size", type=positive, default=8)
    flag("--max_new_tokens", type=positive, default=256)
    flag("--repeats", type=positive, default=2)
    flag("--url", help="of a vLLM server; without it that engine takes no part")
    flag("--out", type=Path, default=RESULTS)
    flag("flags", nargs="*", help="further flags of train.py, after --")
    args = parser.parse_args(argv)
    args.device = available(args.device)
    odd = [batch for batch in args.batches if batch % args.group_size]
    if odd:
        raise UserError(f"--batches {odd[0]} is no multiple of --group_size {args.group_size}.")
    file, (trainer, found) = args.out / "rollout_speed.jsonl", engines(args)
    rows = read_jsonl(file)
    done = {(row["engine"], row["batch"]) for row in rows}
    wanted = [(name, batch) for batch in args.batches for name in found]
    rates = rates_of(trainer)
    for name, batch in wanted:
        if (name, batch) not in done:
            row = {"engine": name, "batch": batch}
            rows.append(row | measure(trainer, found[name], batch, args, rates))
            print(" | ".join(map(str, cells_of(rows[-1]))), flush=True)
            write_jsonl(file, rows)
            write_lines(args.out / "rollout_speed.md", report(rows, trainer.config, argv))


if __name__ == "__main__":
    main()
