"""Write the tables of the README and of the pages beside this file again, from the code.

    python docs/tables.py

Between `<!-- name -->` and `<!-- /name -->` stands what this file makes; tests/test_house.py fails
when it is stale.
"""

import ast
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from objectives.table import NAMES, OBJECTIVES, Objective  # noqa: E402
from support.alarms import ALARMS  # noqa: E402
from support.config import (  # noqa: E402
    PRESETS,
    SYSTEM_PROMPT,
    SYSTEM_PROMPT_ZH,
    TUTORIAL_PROMPT,
    Config,
)
from support.foreign_options import OWNERS  # noqa: E402

PAGES = (
    "README.md",
    *(f"docs/{page}.md" for page in ("names", "objectives", "options", "reliability")),
    *(f"docs/{page}.md" for page in ("break_it.en", "break_it.zh")),
    *(f"docs/ladder/{page}.md" for page in ("README", "README.zh")),
)
ALGORITHM = ("train", "rollout", "reward", "loss", "replay_buffer")
COMMANDS = ("run", "evaluate", "sft", "merge", "check_data", "to_verl", "report", "serve")
PROMPTS = {
    SYSTEM_PROMPT: "the two tags, and a worked example",
    SYSTEM_PROMPT_ZH: "the same in Chinese",
    TUTORIAL_PROMPT: "the tutorial's",
}
PAPERS = {
    "grpo": ("Group Relative Policy Optimization", "2402.03300"),
    "bnpo": ("TRL's name for GRPO's terms under a token mean", ""),
    "dr_grpo": ("GRPO done right", "2503.20783"),
    "dapo": ("Decoupled clip and dynamic sampling", "2503.14476"),
    "lite_ppo": ("Lite PPO", "2508.08221"),
    "gspo": ("Group Sequence Policy Optimization", "2507.18071"),
    "gspo_token": ("the same, with a gradient of each token", "2507.18071"),
    "luspo": ("Length-unbiased sequence policy optimization", "2602.05261"),
    "gmpo": ("Geometric-mean policy optimization", "2507.20673"),
    "cispo": ("Clipped IS-weight policy optimization", "2506.13585"),
    "sapo": ("Soft adaptive policy optimization", "2511.20347"),
    "dppo": ("Divergence PPO", "2602.04879"),
    "rloo": ("REINFORCE leave-one-out", "2402.14740"),
    "reinforce": ("Williams, 1992", ""),
    "reinforce_plus_plus_baseline": (
        "REINFORCE++ with the group's mean as baseline",
        "2501.03262",
    ),
    "gdpo": ("Group reward-decoupled normalization", "2601.05242"),
    "pass_at_k": ("pass@k training", "2503.19595"),
}


def table(head: str, rows: Iterable[str]) -> str:
    """A Markdown table with its head, `a | b`, and its rows."""
    return "\n".join([f"| {head} |", "|---" * (head.count(" | ") + 1) + "|", *rows])


def shown(value: Any) -> str:
    """A value in a cell."""
    if value is None:
        return "–"
    if isinstance(value, str) and value in PROMPTS:
        return PROMPTS[value]
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "empty" if value == "" else str(value)


def files(paths: Iterable[Path]) -> str:
    """Each file with the first line of its docstring."""
    rows = []
    for path in paths:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        rows.append(f"| `{path.relative_to(ROOT)}` | {docstring.splitlines()[0]} |")
    return table("file | what is in it", rows)


def folder(name: str) -> str:
    """The files of a folder."""
    return files(p for p in sorted(ROOT.glob(f"{name}/*.py")) if p.name != "__init__.py")


def meaning(name: str, text: str) -> str:
    """The meaning of an option, with the names that it takes."""
    return f"{text}: {', '.join(NAMES[name])}" if name in NAMES else text


def options() -> str:
    """Each option: its meaning, its default, its value in the preset tiny."""
    rows, tiny = [], PRESETS["tiny"]
    for field in fields(Config):
        name = field.name
        other = shown(tiny[name]) if name in tiny else ""
        # Not that of a Config, which has decided what depends on the day and on the machine.
        default = shown(field.default_factory() if field.default is MISSING else field.default)
        text = meaning(name, field.metadata["help"])
        rows.append(f"| `--{name}` | {text} | {default} | {other} |")
    return table("option | meaning (source) | default, preset `gsm8k` | preset `tiny`", rows)


def presets() -> str:
    """What each preset sets; where a cell is empty, the default is used."""
    names = [name for name in PRESETS if PRESETS[name]]
    rows = []
    for field in fields(Config):
        cells = [shown(PRESETS[n][field.name]) if field.name in PRESETS[n] else "" for n in names]
        if any(cells):
            rows.append(f"| `--{field.name}` | " + " | ".join(cells) + " |")
    return table(" | ".join(["option", *(f"`{name}`" for name in names)]), rows)


def methods() -> str:
    """Each row of OBJECTIVES: what it is, its paper, and where it differs from grpo."""
    rows = []
    for name, row in OBJECTIVES.items():
        words, number = PAPERS.get(name, ("", ""))
        paper = f" ([{number}](https://arxiv.org/abs/{number}))" if number else ""
        differences = ", ".join(f"`{part}`" for part in row.summary.split(", ") if part)
        rows.append(f"| **{name}** | {words}{paper} | {differences or '(the row itself)'} |")
    base = ", ".join(f"`{f.name} {f.default}`" for f in fields(Objective) if f.default is not None)
    rows += ["", f"The row `grpo`: {base}."]
    return table("`--objective` | what it is | differs from `grpo` by", rows)


def alarms() -> str:
    """Each alarm with its metric, its condition and its sentence."""
    rows = [f"| {name} | `{a.metric}` | {a.when} | {a.advice} |" for name, a in ALARMS.items()]
    return table("alarm | looks at | sounds when | says", rows)


def foreign_options(owner: str) -> str:
    """The options of another trainer beside ours."""
    rows = [f"| `{name}` | `{ours}` | {note} |" for name, (ours, note) in OWNERS[owner].items()]
    return table(f"{owner} | here | what differs", rows)


def measured(family: str) -> str:
    """The table of one family of benchmarks/ablation.py's runs."""
    sections = (ROOT / "results" / "ablation.md").read_text(encoding="utf-8").split("## ")
    (section,) = [s for s in sections if s.startswith(family)]
    return section.split("\n", 1)[1].strip()


def result(page: str, head: str = "") -> str:
    """The table of a page in results/, as it is or under another head."""
    lines = (ROOT / "results" / page).read_text(encoding="utf-8").splitlines()
    first, _, *rows = [line for line in lines if line.startswith("|")]
    return table(head or first.strip("| "), rows)


TABLES = {
    "algorithm": lambda: files(ROOT / f"{name}.py" for name in ALGORITHM),
    "commands": lambda: files(ROOT / f"{name}.py" for name in COMMANDS),
    "objectives": lambda: folder("objectives"),
    "support": lambda: folder("support"),
    "options": options,
    "presets": presets,
    "methods": methods,
    "alarms": alarms,
    "options of the tutorial": lambda: foreign_options("the tutorial"),
    "options of TRL": lambda: foreign_options("TRL"),
    "options of verl": lambda: foreign_options("verl"),
    "recipes": lambda: measured("Recipes"),
    "ablations": lambda: measured("Ablations"),
    "sabotages": lambda: result("break_it.md"),
    "sabotages zh": lambda: result(
        "break_it.md",
        "名称 | 哪里不同 | 步数 | 贪心：始，最好，末 | 采样：首，末 | 奖励 | 词元 | 警报（首响）",
    ),
    "rungs": lambda: result("ladder.md"),
    "rungs zh": lambda: result(
        "ladder.md",
        "级 | 种子 | 采样对 0.8，步 | 贪心，步 5 | 贪心，末 | 采样，末尾 | KL，末 | 每步秒数",
    ),
}


def filled(text: str) -> str:
    """`text` with every table that this file makes put in its place."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if pattern.search(text):
            made = make()
            text = pattern.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def main() -> None:
    """Fill the pages."""
    for page in (ROOT / name for name in PAGES):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
