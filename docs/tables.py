"""Write the tables of the README and of the pages beside this file again, from the code that they describe.

    python docs/tables.py

Between `<!-- name -->` and `<!-- /name -->` stands what this file makes; tests/test_house.py fails when it is stale.
"""

import ast
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alarms import ALARMS  # noqa: E402
from config import PRESETS, SYSTEM_PROMPT, Config  # noqa: E402
from loss import OBJECTIVES, Objective  # noqa: E402

FILES = [
    "train", "rollout", "reward", "loss", "answers", "replay_buffer", "log_probs", "model", "config", "data",
    "evaluate", "monitor", "alarms", "preflight", "checkpoint", "run", "sft", "errors",
]  # fmt: skip

PAGES = ("README.md", "docs/knobs.md", "docs/objectives.md", "docs/reliability.md")


def shown(value: Any) -> str:
    """A value in a cell."""
    if value is None:
        return "–"
    if value == SYSTEM_PROMPT:
        return "a prompt for the two tags"
    return (
        "empty"
        if value == ""
        else " ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )


def files() -> str:
    """Each file with the first line of its docstring."""
    lines = ["| file | what lives there |", "|---|---|"]
    for name in FILES:
        text = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
        lines.append(f"| `{name}.py` | {text.splitlines()[0]} |")
    return "\n".join(lines)


FIRST = (
    "preset", "steps", "model", "dataset", "rollouts_per_step", "group_size", "max_new_tokens", "reward", "objective",
    "kl_weight", "train_batch_size", "lr",
)  # fmt: skip


def knobs(chosen: tuple[str, ...] = ()) -> str:
    """Each knob (of the chosen) with its meaning, its default and, where it differs, its value in the preset tiny."""
    lines = [
        "| knob | meaning (source) | default, preset `gsm8k` | preset `tiny` |",
        "|---|---|---|---|",
    ]
    defaults, tiny = Config(), PRESETS["tiny"]
    for field in fields(Config):
        if chosen and field.name not in chosen:
            continue
        other = shown(tiny[field.name]) if field.name in tiny else ""
        default = (
            "auto" if field.name == "micro_batch_size" else shown(getattr(defaults, field.name))
        )
        lines.append(f"| `--{field.name}` | {field.metadata['help']} | {default} | {other} |")
    return "\n".join(lines)


PAPERS = {
    "grpo": ("Group Relative Policy Optimization", "2402.03300"),
    "bnpo": ("TRL's name for GRPO's terms under a token mean", ""),
    "dr_grpo": ("GRPO done right", "2503.20783"), "dapo": ("Decoupled clip and dynamic sampling", "2503.14476"),
    "lite_ppo": ("Lite PPO", "2508.08221"), "gspo": ("Group Sequence Policy Optimization", "2507.18071"),
    "gspo_token": ("the same, with a gradient of each token", "2507.18071"),
    "luspo": ("Length-unbiased sequence policy optimization", "2602.05261"),
    "gmpo": ("Geometric-mean policy optimization", "2507.20673"),
    "cispo": ("Clipped IS-weight policy optimization", "2506.13585"),
    "sapo": ("Soft adaptive policy optimization", "2511.20347"), "dppo": ("Divergence PPO", "2602.04879"),
    "rloo": ("REINFORCE leave-one-out", "2402.14740"), "reinforce": ("Williams, 1992", ""),
    "reinforce_plus_plus_baseline": ("REINFORCE++ with the group's mean as baseline", "2501.03262"),
    "gdpo": ("Group reward-decoupled normalization", "2601.05242"), "pass_at_k": ("pass@k training", "2503.19595"),
}  # fmt: skip


def methods() -> str:
    """Each row of OBJECTIVES: what it is, its paper, and where it differs from grpo."""
    lines = ["| `--objective` | what it is | differs from `grpo` by |", "|---|---|---|"]
    for name, row in OBJECTIVES.items():
        words, number = PAPERS.get(name, ("", ""))
        paper = f" ([{number}](https://arxiv.org/abs/{number}))" if number else ""
        differences = ", ".join(f"`{part}`" for part in row.summary.split(", ") if part)
        lines.append(f"| **{name}** | {words}{paper} | {differences or '(the row itself)'} |")
    base = ", ".join(f"`{f.name} {f.default}`" for f in fields(Objective) if f.default is not None)
    return "\n".join([*lines, "", f"The row `grpo`: {base}."])


def alarms() -> str:
    """Each alarm with its metric, its condition and its sentence."""
    lines = ["| alarm | looks at | sounds when | says |", "|---|---|---|---|"]
    return "\n".join(
        [
            *lines,
            *(f"| {name} | `{a.metric}` | {a.when} | {a.advice} |" for name, a in ALARMS.items()),
        ]
    )


def measured(family: str) -> str:
    """The table of one family of benchmarks/ablation.py's runs."""
    sections = (ROOT / "results" / "ablation.md").read_text(encoding="utf-8").split("## ")
    (section,) = [s for s in sections if s.startswith(family)]
    return section.split("\n", 1)[1].strip()


def filled(text: str) -> str:
    """`text` with every table that this file makes put in its place."""
    tables = {
        "files": files, "knobs": knobs, "first knobs": lambda: knobs(FIRST), "methods": methods, "alarms": alarms,
        "recipes": lambda: measured("Recipes"), "ablations": lambda: measured("Ablations"),
    }  # fmt: skip
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        text = pattern.sub(lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text)
    return text


def main() -> None:
    """Fill the pages."""
    for page in (ROOT / name for name in PAGES):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
