"""Which prompt, which reward, which learning rate: what a pretrained model does with each.

    python benchmarks/defaults.py prompts --model FOLDER               each prompt, before training
    python benchmarks/defaults.py prompts --model FOLDER --dataset GSM8K --max_new_tokens 256
    python benchmarks/defaults.py runs --model FOLDER --only old new   short runs, one after another
    python benchmarks/defaults.py report                               the tables and the picture

`prompts` asks the first held-out questions of a dataset, greedily. `runs` makes the runs of RUNS,
each one `python train.py --preset laptop` with the flags that are given there; it can be called
again and again, and what is done is not done twice. Both add to results/defaults.jsonl; `report`
writes results/defaults.md's tables and results/defaults.png from it. A step of 6 × 8 completions
takes one to two minutes on two cores.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    machine,
    positive,
    pyplot,
    read_jsonl,
    table,
    versions,
    write_jsonl,
    write_lines,
)

from reward import well_formed
from rollout import rollout
from support.answers import is_correct, is_correct_flexible
from support.config import SYSTEM_PROMPT, TUTORIAL_PROMPT, Config, resolve_path
from support.data import Question, load_questions
from support.errors import UserError, command
from support.evaluation import wilson_interval
from support.generation import Sampling
from support.metrics import alarms_of, copies_of_examples
from support.model import load_model, load_tokenizer

FILE = RESULTS / "defaults.jsonl"
MARK = "<!-- made by benchmarks/defaults.py report -->"
Messages = list[dict[str, str]]

# ------------------------------------------------------------------------------------- prompts

TAGS = (
    "Reason step by step inside <think> and </think>, then write the final number alone inside "
    "<answer> and </answer>."
)
ANSWER = (
    "Solve the math problem step by step, then write the final number alone inside <answer> and "
    "</answer>."
)
ROLE = "You solve math problems. "
PENS = "Sam has 3 boxes of 12 pens and gives 20 pens away. How many pens does he have left?"
SENTENCES = (
    "3 boxes of 12 pens are 3 * 12 = 36 pens. After giving 20 away, 36 - 20 = 16 pens are left."
)
TICKETS = (
    "A ticket costs $8. Lea buys 5 tickets and pays with a $50 bill. How many dollars does she get "
    "back?"
)
TICKETS_SOLVED = "5 tickets cost 5 * 8 = 40 dollars. She gets 50 - 40 = 10 dollars back."


def tagged(solution: str, answer: int) -> str:
    """A worked solution in both tags."""
    return f"<think>\n{solution}\n</think>\n<answer>{answer}</answer>"


def with_example(*examples: tuple[str, str], words: str = ROLE + TAGS) -> str:
    """An instruction with worked examples behind it."""
    parts = [f"Example question: {asked}\nExample answer:\n{told}" for asked, told in examples]
    return "\n\n".join([words, *parts])


def system(text: str) -> Callable[[str], Messages]:
    """The instruction as the system message."""
    return lambda question: [
        {"role": "system", "content": text},
        {"role": "user", "content": question},
    ]


def user(text: str) -> Callable[[str], Messages]:
    """The instruction behind the question, in the user's turn, without a system message."""
    return lambda question: [{"role": "user", "content": f"{question}\n\n{text}"}]


def shot(text: str, asked: str, told: str) -> Callable[[str], Messages]:
    """The instruction as the system message, and an example as a turn of the chat."""
    before, turn = system(text)(asked), {"role": "assistant", "content": told}
    return lambda question: [*before, turn, {"role": "user", "content": question}]


PROMPTS: dict[str, Callable[[str], Messages]] = {
    "the default: a worked example": system(SYSTEM_PROMPT),
    "the tutorial's: `<think> reasoning </think>` to copy": system(TUTORIAL_PROMPT),
    "the two tags, no example": system(ROLE + TAGS),
    "the answer tag, no example": system(ANSWER),
    "the two tags, in the user's turn": user(TAGS),
    "the answer tag, in the user's turn": user(ANSWER),
    "the worked example as a turn of the chat": shot(ROLE + TAGS, PENS, tagged(SENTENCES, 16)),
    "the answer tag, a worked example": system(
        with_example((PENS, f"{SENTENCES}\n<answer>16</answer>"), words=ANSWER)
    ),
    "a worked example in short sentences": system(
        with_example((PENS, tagged("3 * 12 = 36 pens in all. 36 - 20 = 16 pens are left.", 16)))
    ),
    "a worked example in equations": system(
        with_example((PENS, tagged("3 * 12 = 36\n36 - 20 = 16", 16)))
    ),
    "two worked examples": system(
        with_example((PENS, tagged(SENTENCES, 16)), (TICKETS, tagged(TICKETS_SOLVED, 10)))
    ),
    "step by step, no tag": user("Solve it step by step."),
}


def asked_with(
    messages: Callable[[str], Messages], tokenizer: Any, questions: list[Question]
) -> list[Question]:
    """The questions with a prompt of PROMPTS, as text and as tokens."""
    chat = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    texts = [chat(messages(question.question)) for question in questions]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [
        replace(question, prompt=text, prompt_ids=tokens)
        for question, text, tokens in zip(questions, texts, ids, strict=True)
    ]


def ask(args: argparse.Namespace) -> None:
    """Each prompt: greedy answers to the first held-out questions."""
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, "bf16-pure")
    questions = load_questions(resolve_path(args.dataset), "test", Config())[: args.questions]
    greedy = Sampling(args.max_new_tokens, temperature=0.0, batch_size=64)
    rows = read_jsonl(FILE)
    for name, messages in chosen(PROMPTS, args.only).items():
        start = time.perf_counter()
        asked = asked_with(messages, tokenizer, questions)
        groups = rollout(model.eval(), tokenizer, asked, 1, greedy)
        row = {
            "kind": "prompt",
            "model": Path(args.model).name,
            "dataset": Path(args.dataset).name,
            "max_new_tokens": args.max_new_tokens,
            "prompt": name,
            **figures(groups),
            "seconds": time.perf_counter() - start,
        }
        rows.append(row)
        write_jsonl(FILE, rows)
        print({k: v for k, v in row.items() if k != "first"}, row["first"], sep="\n", flush=True)


def figures(groups: list[Any]) -> dict[str, Any]:
    """What greedy completions are like."""
    said = [(group.completions[0], group.question) for group in groups]
    judged = [(c.text, q.reference, c.truncated) for c, q in said]
    count = len(said)
    return {
        "questions": count,
        "strict": sum(is_correct(*one) for one in judged),
        "flexible": sum(is_correct_flexible(*one) for one in judged),
        "tokens": sum(len(c.ids) for c, _ in said) / count,
        "cut_off": sum(c.truncated for c, _ in said) / count,
        "format": sum(well_formed([], [c.text for c, _ in said])) / count,
        "copied": sum(any(copies_of_examples(group)) for group in groups) / count,
        "first": said[0][0].text,
    }


# ---------------------------------------------------------------------------------------- runs

ASKED = ["--system_prompt", TUTORIAL_PROMPT]
BOTH = ["--reward", "accuracy", "format", "--reward_weights", "1", "0.2"]
OLD = [*ASKED, *BOTH]
GATE = ["--reward", "accuracy", "examples/rewards.py:format_if_right"]
GATE += ["--reward_weights", "1", "0.2"]
GDPO = ["--objective", "gdpo", "--kl_weight", "0"]  # without a KL, as the others
TIERS = ["--reward", "tutorial", "--reward_weights", "1"]
HOT = ["--lr", "1e-5", "--max_new_tokens", "96"]
MANY = ["--train_batch_size", "4", "--micro_batch_size", "4"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "new": ("the preset", []),
    "old": ("prompt and reward as they were, lr 1e-5, 96 tokens", [*OLD, *HOT]),
    "old-same-lr": ("prompt and reward as they were, all else as in the preset", OLD),
    "new-format": ("format is rewarded too, by 0.2", BOTH),
    "new-gdpo": ("the same, each reward compared for itself", [*BOTH, *GDPO]),
    "new-tutorial": ("the tutorial's reward", TIERS),
    "tutorial": ("the tutorial's prompt and reward", [*ASKED, *TIERS]),
    "old-prompt": ("the tutorial's prompt, accuracy alone", ASKED),
    "lora": ("LoRA of rank 16 at lr 2e-5", ["--adapter_rank", "16"]),
    "no-std": ("no division by the group's std", ["--objective", "dr_grpo"]),
    "many-steps": ("12 optimizer steps a rollout at lr 5e-6", [*MANY, "--lr", "5e-6"]),
    "lr-high": ("lr 1e-5", ["--lr", "1e-5"]),
    "kl": ("with a KL of weight 0.01", ["--kl_weight", "0.01"]),
    "old-gate": (
        "the old prompt; format is rewarded by 0.2, and only with a right answer",
        [*ASKED, *GATE],
    ),
    "old-gdpo": (
        "prompt and reward as they were, each reward compared for itself",
        [*OLD, *GDPO],
    ),
}


def train(args: argparse.Namespace) -> None:
    """The chosen runs; a row of results for every step."""
    for name, (_, flags) in chosen(RUNS, args.only).items():
        for seed in args.seeds:
            rows = read_jsonl(FILE)
            if any(r["kind"] == "step" and (r["run"], r["seed"]) == (name, seed) for r in rows):
                continue
            with tempfile.TemporaryDirectory() as work:
                folder = Path(work, "run")
                own = ["--preset=laptop", f"--model={args.model}", f"--seed={seed}"]
                own += [f"--steps={args.steps}", f"--run_dir={folder}", "--checkpoint_interval=0"]
                line = [sys.executable, "train.py", *own, *flags, *args.flags]
                subprocess.run(line, cwd=ROOT, check=True)
                done = read_jsonl(folder / "metrics.jsonl")
            known = {"kind": "step", "run": name, "model": Path(args.model).name, "seed": seed}
            write_jsonl(FILE, [*read_jsonl(FILE), *(known | row for row in done)])


def chosen(all_of_them: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Those that were asked for; all, if none was."""
    unknown = [name for name in names if name not in all_of_them]
    if unknown:
        raise UserError(f"There is no {unknown[0]!r}; choose among {', '.join(all_of_them)}.")
    return {name: each for name, each in all_of_them.items() if not names or name in names}


# -------------------------------------------------------------------------------------- report


def prompt_tables(rows: list[dict[str, Any]]) -> list[str]:
    """A table of prompts for each model, dataset and budget."""
    keys = ("model", "dataset", "max_new_tokens", "questions")
    lines = []
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        model, dataset, budget, count = key
        lines += [f"### {model}, {dataset}, {count} questions, {budget} tokens", ""]
        same = [row for row in rows if tuple(row[k] for k in keys) == key]
        cells = []
        for row in sorted(same, key=lambda row: -row["strict"]):
            low, high = wilson_interval(row["strict"], count)
            cells.append(
                [row["prompt"], f"{row['strict'] / count:.3f} ({low:.2f}–{high:.2f})"]
                + [f"{row['flexible'] / count:.3f}", f"{row['tokens']:.0f}"]
                + [f"{row[name]:.2f}" for name in ("cut_off", "format", "copied")]
            )
        head = ["prompt", "strict (95 %)", "flexible", "tokens", "cut off", "format", "copied"]
        lines += [*table(head, cells), ""]
    return lines


def run_table(rows: list[dict[str, Any]], name: str, seed: int) -> list[str]:
    """Every step of one run that says something, with its alarms."""
    cells = []
    for row in rows:
        names = ("rollout/success_rate", "reward/format_mean", "rollout/completion_tokens")
        names += ("rollout/truncated_share", "rollout/entropy", "rollout/no_spread_share")
        shown = [f"{row[n]:.2f}" if n in row else "" for n in names]
        held = [row.get("eval/accuracy"), row.get("eval/accuracy_flexible")]
        known = "" if held[0] is None else f"{held[0]:.3f} / {held[1]:.3f}"
        cells.append([row["step"], *shown, known, ", ".join(alarms_of(row))])
    words, flags = RUNS[name]
    head = ["step", "success", "format", "tokens", "cut off", "entropy", "no spread"]
    head += ["held out, strict / flexible", "alarms"]
    shown_flags = " ".join("…" if "\n" in flag or len(flag) > 60 else flag for flag in flags)
    title = f"### `{name}`, seed {seed}: {words}" + (f" (`{shown_flags}`)" if flags else "")
    return [title, "", *table(head, cells), ""]


def summary(runs: dict[tuple[str, str, int], list[dict[str, Any]]]) -> list[str]:
    """One row for each run: before, after, and what happened on the way."""
    cells = []
    for (name, model, seed), rows in runs.items():
        steps = [row for row in rows if "time/step" in row]
        held = [row for row in rows if "eval/accuracy" in row]
        first, last = held[0], held[-1]
        low, high = (last[f"eval/accuracy_{end}"] for end in ("low", "high"))
        alarms: dict[str, int] = {}
        for row in rows:
            for alarm in alarms_of(row):
                alarms.setdefault(alarm, row["step"])
        cells.append(
            [f"`{name}`", model, seed, len(steps)]
            + [f"{first['eval/accuracy']:.3f} / {first['eval/accuracy_flexible']:.3f}"]
            + [f"{last['eval/accuracy']:.3f} ({low:.3f}–{high:.3f})"]
            + [f"{last['eval/accuracy_flexible']:.3f}"]
            + [" → ".join(f"{row['eval/completion_tokens']:.0f}" for row in (first, last))]
            + [f"{sum(row['time/step'] for row in steps) / 60:.0f}"]
            + [", ".join(f"{alarm} ({step})" for alarm, step in alarms.items()) or "none"]
        )
    head = ["run", "model", "seed", "steps", "strict / flexible, before", "strict, after (95 %)"]
    head += ["flexible, after", "tokens", "minutes", "alarms (first step)"]
    return [*table(head, cells), ""]


def picture(runs: dict[tuple[str, str, int], list[dict[str, Any]]], path: Path) -> None:
    """The default run and the old one: held-out accuracy and length over the minutes."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    styles = {
        ("new", 42): ("C0", "now, seed 42"),
        ("new", 1): ("C9", "now, seed 1"),
        ("old-same-lr", 42): ("C3", "the old prompt and reward, same lr"),
        ("old", 42): ("C1", "the old prompt and reward, lr 1e-5"),
    }
    for (name, _, seed), rows in runs.items():
        if (name, seed) not in styles:
            continue
        color, label = styles[name, seed]
        minutes, at = 0.0, []
        for row in rows:
            minutes += row.get("time/step", 0.0) / 60
            at.append(minutes)
        held = [(t, row) for t, row in zip(at, rows, strict=True) if "eval/accuracy" in row]
        times, values = [t for t, _ in held], [row["eval/accuracy"] for _, row in held]
        low, high = ([row[f"eval/accuracy_{end}"] for _, row in held] for end in ("low", "high"))
        left.fill_between(times, low, high, color=color, alpha=0.15, lw=0)
        left.plot(times, values, "o-", color=color, ms=4, label=label)
        steps = [(t, row) for t, row in zip(at, rows, strict=True) if "time/step" in row]
        right.plot(
            [t for t, _ in steps], [r["rollout/completion_tokens"] for _, r in steps], color=color
        )
    left.set_title("Held-out questions answered right, greedy (95 % interval)", fontsize=10)
    left.set(xlabel="minutes of training", ylabel="accuracy", ylim=(0, 1.02))
    left.legend(frameon=False, fontsize=8, loc="center right")
    right.set_title("Length of the sampled completions", fontsize=10)
    right.set(xlabel="minutes of training", ylabel="tokens", ylim=(0, None))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(args: argparse.Namespace) -> None:
    """The tables of everything in results/defaults.jsonl, and the picture."""
    rows = read_jsonl(FILE)
    runs: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "step":
            runs.setdefault((row["run"], row["model"], row["seed"]), []).append(row)
    text = (RESULTS / "defaults.md").read_text(encoding="utf-8")
    before = text.split(MARK)[0]
    lines = [f"{before}{MARK}", "", f"{machine()}; {versions()}", "", "## Prompts", ""]
    lines += prompt_tables([row for row in rows if row["kind"] == "prompt"])
    lines += ["## Runs", "", *summary(runs)]
    for (name, _, seed), steps in runs.items():
        lines += run_table(steps, name, seed)
    write_lines(RESULTS / "defaults.md", lines[:-1])
    picture(runs, RESULTS / "defaults.png")


@command
def main(argv: list[str]) -> None:
    """Ask, train or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("prompts", "runs", "report"))
    parser.add_argument("--model", help="a folder or a hub name")
    parser.add_argument("--only", nargs="*", default=[], help="names; none: all")
    parser.add_argument("--dataset", default="tiny/task", help="of the prompts")
    parser.add_argument("--questions", type=positive, default=64)
    parser.add_argument("--max_new_tokens", type=positive, default=160, help="of the prompts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--steps", type=positive, default=10)
    parser.epilog = "What stands behind a -- are further flags for train.py."
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end], argparse.Namespace(flags=argv[end + 1 :]))
    if args.what != "report" and not args.model:
        raise UserError("--model is missing; give it the folder of a pretrained model.")
    {"prompts": ask, "runs": train, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
