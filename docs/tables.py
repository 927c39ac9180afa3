"""Write the tables of the README and of docs/objectives.md again, from the code that they describe.

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

from config import PRESETS, SYSTEM_PROMPT, Config  # noqa: E402
from loss import OBJECTIVES, Objective  # noqa: E402

FILES = [
    "train", "rollout", "reward", "loss", "replay_buffer", "model", "config", "data", "evaluate", "monitor",
    "checkpoint", "run", "sft", "errors",
]  # fmt: skip


def shown(value: Any) -> str:
    """A value in a cell."""
    if value is None:
        return "–"
    if value == SYSTEM_PROMPT:
        return "a prompt for the two tags"
    return "empty" if value == "" else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def files() -> str:
    """Each file with the first line of its docstring."""
    lines = ["| file | what lives there |", "|---|---|"]
    for name in FILES:
        text = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
        lines.append(f"| `{name}.py` | {text.splitlines()[0]} |")
    return "\n".join(lines)


def knobs() -> str:
    """Each knob with its meaning, its default and, where it differs, its value in the preset tiny."""
    lines = ["| knob | meaning (source) | default, preset `gsm8k` | preset `tiny` |", "|---|---|---|---|"]
    defaults, tiny = Config(), PRESETS["tiny"]
    for field in fields(Config):
        other = shown(tiny[field.name]) if field.name in tiny else ""
        default = shown(getattr(defaults, field.name))
        lines.append(f"| `--{field.name}` | {field.metadata['help']} | {default} | {other} |")
    return "\n".join(lines)


def methods() -> str:
    """Each row of OBJECTIVES: the columns in which any two of them differ."""
    columns = [f.name for f in fields(Objective) if len({getattr(o, f.name) for o in OBJECTIVES.values()}) > 1]
    lines = [f"| `--objective` | {' | '.join(f'`{c}`' for c in columns)} |", "|" + "---|" * (len(columns) + 1)]
    for name, row in OBJECTIVES.items():
        cells = [shown(v) if (v := getattr(row, c)) != getattr(Objective, c) else "·" for c in columns]
        lines.append(f"| **{name}** | {' | '.join(cells)} |")
    defaults = [shown(getattr(Objective, c)) for c in columns]
    lines.insert(2, f"| *(a dot is)* | {' | '.join(f'*{d}*' for d in defaults)} |")
    return "\n".join(lines)


def measured(family: str) -> str:
    """The table of one family of benchmarks/ablation.py's runs."""
    sections = (ROOT / "results" / "ablation.md").read_text(encoding="utf-8").split("## ")
    (section,) = [s for s in sections if s.startswith(family)]
    return section.split("\n", 1)[1].strip()


def filled(text: str) -> str:
    """`text` with every table that this file makes put in its place."""
    tables = {
        "files": files, "knobs": knobs, "methods": methods, "recipes": lambda: measured("Recipes"),
        "ablations": lambda: measured("Ablations"),
    }  # fmt: skip
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        text = pattern.sub(lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text)
    return text


def main() -> None:
    """Fill both pages."""
    for page in (ROOT / "README.md", ROOT / "docs" / "objectives.md"):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
