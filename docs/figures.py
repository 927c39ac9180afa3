"""Draw the pictures of the tutorial: symbols, numbers and names of the code, so no language.

    python docs/figures.py                            draw them again
    python docs/figures.py --runs runs/well runs/ill  with two other runs in runs.svg

What is drawn is computed by the project's own functions; the two runs are kept in
results/tutorial_runs.jsonl (the tutorial, chapter 10, has their commands). Each picture has its own
background, light or dark as the reader's system is. tests/test_tutorial_pages.py fails when a
picture is stale.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loss import GRPOLoss, group_advantages  # noqa: E402
from objectives.equations import objective_advantages, token_weights  # noqa: E402
from objectives.table import find_objective  # noqa: E402
from replay_buffer import Experience, pad_batch  # noqa: E402

WIDTH = 760
STYLE = """
text{font:14px system-ui,sans-serif;fill:#1f2328}.small{font-size:12px}.soft{fill:#59636e}
.code{font-family:ui-monospace,Menlo,monospace;font-size:12px}
.middle{text-anchor:middle}.end{text-anchor:end}.bold{font-weight:600}
.back{fill:#fff}.line{stroke:#59636e;fill:none}.faint{stroke:#d1d9e0;fill:none}
.empty{fill:#f6f8fa;stroke:#b7c0c9;stroke-dasharray:3 2}.prompt{fill:#d5dbe1;stroke:#8c959f}
.up{fill:#2f6fde}.down{fill:#d9730d}.upline{stroke:#2f6fde;fill:none;stroke-width:2.5}
.downline{stroke:#d9730d;fill:none;stroke-width:2.5}.shade{fill:#59636e;opacity:.13}
text.up,text.down{font-weight:600}.cell{stroke:#fff}.white{fill:#fff}.mask{fill:#1a7f37}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.soft{fill:#9198a1}.back{fill:#0d1117}
.line{stroke:#9198a1}.faint{stroke:#3d444d}.empty{fill:#151b23;stroke:#59636e}
.prompt{fill:#3d444d;stroke:#6e7681}.up{fill:#589bff}.down{fill:#f0913a}.upline{stroke:#589bff}
.downline{stroke:#f0913a}.shade{fill:#9198a1;opacity:.18}.cell{stroke:#0d1117}.white{fill:#0d1117}
.mask{fill:#3fb950}}
"""


class Drawing:
    """An SVG picture of WIDTH × height pixels, piece by piece."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.parts: list[str] = []

    def add(self, tag: str, content: str = "", **attributes: Any) -> None:
        """One element; `kind` is its class."""
        attributes["class"] = attributes.pop("kind", None)
        given = {
            name.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else value
            for name, value in attributes.items()
            if value is not None
        }
        words = "".join(f' {name}="{value}"' for name, value in given.items())
        self.parts.append(f"<{tag}{words}>{escape(content)}</{tag}>")

    def text(self, x: float, y: float, content: str, kind: str = "middle") -> None:
        """Words, or rather symbols."""
        self.add("text", content, x=x, y=y, kind=kind)

    def rect(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A box with slightly round corners."""
        self.add("rect", x=x, y=y, width=width, height=height, rx=2, kind=kind)

    def path(self, points: Iterable[tuple[float, float]], kind: str = "line") -> None:
        """A line through points."""
        words = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add("polyline", points=words, kind=kind)

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """A line that ends in a head; it points down, mostly."""
        (x, y), (a, b) = start, end
        self.path([(x, y), (a, b)])
        self.path([(a - 4, b - 6), (a, b), (a + 1, b - 7)])

    def svg(self) -> str:
        """The file."""
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
        size = f'width="{WIDTH}" height="{self.height}">'
        back = f'<rect class="back" width="{WIDTH}" height="{self.height}" rx="8"/>'
        return "\n".join([head + size, f"<style>{STYLE}</style>", back, *self.parts, "</svg>", ""])


def signed(number: float, digits: int = 3) -> str:
    """A number with its sign, minus as −."""
    return f"{number:+.{digits}f}".replace("-", "−")


# ------------------------------------------------------------------------------- the token grid


def grid() -> str:
    """Two completions in a batch, their masks, and the causal shift."""
    drawing, prompts, lengths = Drawing(478), (3, 5), (4, 2)
    rows = zip(prompts, lengths, strict=True)
    batch = pad_batch([Experience.of([1] * p, [2] * c) for p, c in rows])
    width, count = batch.sequences.shape[1], batch.num_actions
    start = width - count
    bracket(drawing, 0, start, 34, "P")
    bracket(drawing, start, width, 34, "C")
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        tokens = [f"x{SUBSCRIPTS[t + 1]}" for t in range(prompt)]
        tokens += [f"y{SUBSCRIPTS[t + 1]}" for t in range(length - 1)] + ["■"]
        padding = start - prompt
        row = ["·"] * padding + tokens + ["·"] * (width - padding - len(tokens))
        y = 48 + i * 112
        cells(drawing, y, row, f"sequences[{i}]")
        cells(
            drawing, y + 34, [str(int(v)) for v in batch.attention_mask[i]], f"attention_mask[{i}]"
        )
        cells(
            drawing, y + 68, [str(int(v)) for v in batch.action_mask[i]], f"action_mask[{i}]", start
        )
    y, first = 290, [f"y{SUBSCRIPTS[t + 1]}" for t in range(count - 1)] + ["■"]
    cells(drawing, y, ["ℓ"] * count, "logits[0, t]", start - 1)
    cells(drawing, y + 62, first, "sequences[0, t + 1]", start)
    for i in range(start, width):
        drawing.arrow((LEFT + (i - 0.5) * CELL, y + 30), (LEFT + (i + 0.5) * CELL, y + 58))
    theirs = ["0"] * (start - 1) + ["1"] * count
    cells(drawing, y + 108, theirs, "tiny-grpo: L − 1", 1)
    cells(drawing, y + 142, ["1"] * count, "C", start)
    return drawing.svg()


CELL, LEFT, SUBSCRIPTS = 52, 190, "₀₁₂₃₄₅₆₇₈₉"


def cells(drawing: Drawing, y: int, values: list[str], name: str, first: int = 0) -> None:
    """A row of tokens or of bits, with its name; `first` is its first column."""
    drawing.text(LEFT - 12, y + 19, name, "code end")
    for i, value in enumerate(values, first):
        kinds = {"·": "empty", "0": "empty", "1": "mask", "ℓ": "line", "x": "prompt"}
        kind = kinds.get(value[0], "up")
        drawing.rect(LEFT + i * CELL + 2, y, CELL - 4, 28, kind)
        color = "middle white" if kind in ("up", "mask") else "middle"
        drawing.text(LEFT + (i + 0.5) * CELL, y + 19, value, color)


def bracket(drawing: Drawing, first: int, last: int, y: float, name: str) -> None:
    """A brace over some columns, with its name."""
    a, b = LEFT + first * CELL + 3, LEFT + last * CELL - 3
    drawing.path([(a, y + 6), (a, y), (b, y), (b, y + 6)])
    drawing.text((a + b) / 2, y - 7, name, "middle bold")


# ----------------------------------------------------------------------------------- advantages


def advantages() -> str:
    """Two of eight are right: rewards, and advantages in balance on a number line."""
    drawing, returns = Drawing(350), torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0])
    ours = group_advantages(returns)
    same = group_advantages(torch.full((12,), 0.01))
    scale = number_line(drawing, 74, "R", 0.0, 1.0, [0, 0.25, 1])
    dots(drawing, scale, 74, returns.tolist())
    mark(drawing, scale(float(returns.mean())), 74, "R̄")
    scale = number_line(drawing, 192, "A", -1.0, 2.0, [ours[-1].item(), 0, ours[0].item()])
    dots(drawing, scale, 192, ours.tolist())
    mark(drawing, scale(0.0), 192, "ΣA = 0")
    scale = number_line(drawing, 316, "12 × 0.01", -1.0, 2.0, [0])
    dots(drawing, scale, 316, same.tolist())
    return drawing.svg()


def number_line(
    drawing: Drawing, y: int, name: str, low: float, high: float, ticks: list[float]
) -> Any:
    """An axis with its name and some numbers; returns the place of a number on it."""
    left, right = 130, WIDTH - 60
    drawing.path([(left - 20, y), (right + 20, y)])
    drawing.text(left - 36, y + 5, name, "end bold")

    def place(number: float) -> float:
        return left + (number - low) / (high - low) * (right - left)

    for tick in ticks:
        drawing.path([(place(tick), y - 4), (place(tick), y + 4)])
        shown = f"{tick:g}" if tick in (0, 1, 0.25) else signed(tick)
        drawing.text(place(tick), y + 20, shown, "middle small")
    return place


def dots(drawing: Drawing, place: Any, y: int, values: list[float]) -> None:
    """A dot for each value, piled up; above 0 in one colour, below in the other."""
    seen: dict[float, int] = {}
    for value in values:
        level = seen[value] = seen.get(value, -1) + 1
        x = place(value) + (level // 6) * 14
        kind = "up" if value > 0 else "down" if value < 0 else "line"
        drawing.add("circle", cx=x, cy=float(y - 9 - level % 6 * 11), r=4.5, kind=kind)


def mark(drawing: Drawing, x: float, y: int, name: str) -> None:
    """A triangle under the axis: the point of balance."""
    points = f"{x - 7:.1f},{y + 38} {x + 7:.1f},{y + 38} {x:.1f},{y + 25}"
    drawing.add("polygon", points=points, kind="soft")
    drawing.text(x + 14, y + 38, name, "small")


# ----------------------------------------------------------------------------------------- clip


def clip() -> str:
    """The policy term and its gradient over the ratio, for a good and for a bad completion."""
    drawing = Drawing(420)
    ratios = torch.linspace(0.5, 1.6, 221)
    for column, advantage in enumerate((1.62, -0.54)):
        log_probs = ratios.log().unsqueeze(0).requires_grad_()
        tokens = torch.zeros(1, len(ratios), dtype=torch.long)
        there = tokens.bool()
        batch = Experience(tokens, there, there, advantages=torch.tensor([advantage]))
        loss = GRPOLoss().policy_term(log_probs, torch.zeros_like(log_probs), batch)
        (slope,) = torch.autograd.grad(loss.sum(), log_probs)
        x = 84 + column * 368
        kind = "up" if advantage > 0 else "down"
        drawing.text(x + 138, 30, f"A = {signed(advantage, 2)}", f"middle {kind}")
        curves = ((50, "L", loss.detach()[0]), (240, "∂L / ∂ log π", slope[0]))
        for y, name, values in curves:
            panel(drawing, x, y, name, ratios, values, kind)
    return drawing.svg()


def panel(drawing: Drawing, x: int, y: int, name: str, ratios: Any, values: Any, kind: str) -> None:
    """One curve over the ratio, shaded where the clip leaves no gradient, with a dot at 1.4."""
    width, height, (low, high) = 276, 130, (-2.4, 1.3)

    def across(ratio: float) -> float:
        return x + (ratio - 0.5) / 1.1 * width

    def down(value: float) -> float:
        return y + height - (value - low) / (high - low) * height

    a, b = (across(1.2), x + width) if kind == "up" else (x, across(0.8))
    drawing.rect(a, y, b - a, height, "shade")
    drawing.path([(x, down(0)), (x + width, down(0))], "faint")
    drawing.path([(x, y), (x, y + height), (x + width, y + height)])
    drawing.text(x - 8, down(0) + 5, "0", "end small")
    drawing.text(x + 6, y + 12, name, "small soft")
    for tick in (0.8, 1.0, 1.2, 1.4):
        drawing.path([(across(tick), y + height), (across(tick), y + height + 4)])
        drawing.text(across(tick), y + height + 18, f"{tick:g}", "middle small")
    drawing.text(x + width, y + height + 18, "r", "middle bold")
    points = zip(map(across, ratios.tolist()), map(down, values.tolist()), strict=True)
    drawing.path(points, f"{kind}line")
    value = values[(ratios - 1.4).abs().argmin()].item()
    drawing.add("circle", cx=across(1.4), cy=down(value), r=5, kind=kind)
    shown = signed(value) if value else "0"
    drawing.text(across(1.4), down(value) - 10, shown, f"middle {kind}")


# -------------------------------------------------------------------------------- token weights


def weights() -> str:
    """The weight of each token under three means: a token is a box, its area is its weight."""
    drawing = Drawing(450)
    modes = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm")
    for row, mode in enumerate(modes):
        top = 34 + row * 138
        drawing.text(24, top, mode, "code bold")
        for x, lengths, unit, scale in ((24, (3, 5), 30, 250), (340, (10, 100), 2.4, 800)):
            norm = lengths[1]  # as max_new_tokens: the longest answer that is possible
            found = token_weights(list(lengths), mode, norm).tolist()
            for line, (length, weight) in enumerate(zip(lengths, found, strict=True)):
                bar(drawing, x, top + 62 + line * 42, length, weight, unit, scale)
    return drawing.svg()


def bar(
    drawing: Drawing, x: int, bottom: int, length: int, weight: float, unit: float, scale: float
) -> None:
    """A completion: as many boxes as tokens, as high as a token's weight; and its share."""
    height = weight * scale
    drawing.rect(x, bottom - height, length * unit, height, "up")
    if unit > 9:  # else they are too many to be told apart
        for i in range(1, length):
            drawing.path([(x + i * unit, bottom - height), (x + i * unit, bottom)], "cell")
    end = x + length * unit + 8
    drawing.text(end, bottom, f"{length} × {weight:.4f} = {length * weight:.3f}", "small")


# ------------------------------------------------------------------------- the std of a group


def std() -> str:
    """What a group weighs beside the one with 4 of 8 right: with the std and without."""
    drawing, group, counts = Drawing(300), 8, range(0, 9)
    plain = find_objective("grpo", advantage_std="none")
    found: dict[str, list[float]] = {"A = R − R̄": [], "A = (R − R̄) / σ": []}
    for count in counts:
        returns = torch.tensor([1.0] * count + [0.0] * (group - count))
        alone = objective_advantages(returns, returns[None], [1.0], plain)
        for curve, values in zip(found.values(), (alone, group_advantages(returns)), strict=True):
            curve.append(values.abs().sum().item())
    left, bottom, step, height = 90, 246, 66, 170
    drawing.path([(left, 40), (left, bottom), (left + 8 * step + 20, bottom)])
    drawing.text(left - 12, 36, "Σ|A|  ÷  Σ|A|₄", "middle bold")
    drawing.text(left + 8 * step + 50, bottom + 5, "k/8", "middle bold")
    for count in counts:
        drawing.text(left + count * step, bottom + 22, f"{count}/8", "middle small")
    for (name, values), kind in zip(found.items(), ("down", "up"), strict=True):
        shares = [value / values[4] for value in values]
        points = [(left + i * step, bottom - v * height) for i, v in enumerate(shares)]
        drawing.path(points, f"{kind}line")
        side, below = (1, 20) if kind == "down" else (-1, -9)
        for i, ((x, y), share) in enumerate(zip(points, shares, strict=True)):
            drawing.add("circle", cx=float(x), cy=y, r=4.5, kind=kind)
            if share:
                shown = f"{100 * share:.0f} %"
                drawing.text(x + side * (4 - i) * 6, y + below, shown, f"middle small {kind}")
        drawing.text(left + 8 * step - 20, points[7][1] - 22, name, f"small {kind}")
    return drawing.svg()


# ------------------------------------------------------------------------------- the two runs


CURVES = (
    "eval/accuracy", "rollout/returns", "rollout/completion_tokens", "train/loss",
    "train/kl_divergence", "train/grad_norm", "train/clipped_share", "train/entropy",
    "rollout/no_spread_share",
)  # fmt: skip


RUNS = ROOT / "results" / "tutorial_runs.jsonl"


def keep_runs(healthy: str, sick: str) -> None:
    """Write what runs.svg shows of two run folders."""
    rows = []
    for name, folder in (("healthy", healthy), ("sick", sick)):
        text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
        for row in map(json.loads, text.splitlines()):
            shown = {key: round(row[key], 5) for key in CURVES if key in row}
            rows.append({"run": name, "step": row["step"], **shown})
    RUNS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def runs() -> str:
    """A healthy run and a sick one, metric by metric."""
    rows = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()]
    drawing, last = Drawing(520), max(row["step"] for row in rows)
    for i, name in enumerate(CURVES):
        found = {
            kind: [
                (row["step"] / last, row[name]) for row in rows if row["run"] == run and name in row
            ]
            for kind, run in (("up", "healthy"), ("down", "sick"))
        }
        place = 64 + i % 3 * 242, 40 + i // 3 * 164
        curves(drawing, place, name, found)
        drawing.text(place[0] + 186, place[1] + 116, str(last), "middle small soft")
    drawing.text(236, 58, "✓", "up")
    drawing.text(236, 126, "✗", "down")
    return drawing.svg()


def curves(
    drawing: Drawing, place: tuple[int, int], name: str, found: dict[str, list[tuple[float, float]]]
) -> None:
    """One metric of both runs: points (share of the steps, value), by colour."""
    (x, y), wide, high = place, 186, 100
    values = [value for points in found.values() for _, value in points]
    low, top = min(0.0, *values), max(values)

    def down(value: float) -> float:
        return y + high - (value - low) / (top - low) * high

    drawing.text(x - 6, y - 12, name, "code bold")
    drawing.path([(x, y), (x, y + high), (x + wide, y + high)])
    drawing.path([(x, down(0)), (x + wide, down(0))], "faint")
    drawing.text(x, y + high + 16, "0", "middle small soft")
    for number in {low, 0.0, top}:
        shown = f"{number:.2g}" if abs(number) < 10 else f"{number:.0f}"
        drawing.text(x - 5, down(number) + 4, shown.replace("-", "−"), "end small soft")
    for kind, points in found.items():
        drawing.path(((x + share * wide, down(v)) for share, v in points), f"{kind}line")


FIGURES = {
    "grid": grid,
    "advantages": advantages,
    "clip": clip,
    "weights": weights,
    "std": std,
    "runs": runs,
}


def main() -> None:
    """Write every picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs=2, metavar="FOLDER", help="a healthy run and a sick one")
    if given := parser.parse_args().runs:
        for run in given:
            if not (Path(run) / "metrics.jsonl").is_file():
                parser.error(f"{run} is no run: it has no metrics.jsonl; give folders as runs/NAME")
        keep_runs(*given)
    folder = ROOT / "docs" / "figures"
    folder.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
