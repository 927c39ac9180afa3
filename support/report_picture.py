"""The curves of a report as a picture, for a paper or a README."""

import io
from typing import Any

from support.errors import UserError


def draw(data: dict[str, Any]) -> bytes:
    """A PNG with a chart of each metric of `data`, as report.py has put it together.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--png needs matplotlib: pip install matplotlib.") from error
    runs = data["runs"]
    charts = [c for c in data["charts"] if any(c["name"] in m for r in runs for m in r["metrics"])]
    height = (len(charts) + 2) // 3
    figure = Figure(figsize=(10, 2.2 * height + 0.3), layout="constrained")
    for axes, chart in zip(figure.subplots(height, 3, squeeze=False).flat, charts, strict=False):
        for run in runs:
            rows = [row for row in run["metrics"] if row.get(chart["name"]) is not None]
            steps = [row["step"] for row in rows]
            axes.plot(steps, [row[chart["name"]] for row in rows], label=run["name"])
            if chart["low"]:
                ends = ([row[chart[end]] for row in rows] for end in ("low", "high"))
                axes.fill_between(steps, *ends, alpha=0.2)
            alarms = {f"alarm/{name}" for name in chart["alarms"]}
            on = [row["step"] for row in run["metrics"] if alarms & row.keys()]
            top = axes.get_xaxis_transform()  # steps, and a height of 1 for the frame
            axes.plot(on, [0.96] * len(on), "rv", transform=top, markersize=4)
        if chart["band"]:
            limits = axes.get_ylim()
            axes.axhspan(*chart["band"], alpha=0.1, color="green")
            axes.set_ylim(limits)
        axes.set_title(chart["name"], fontsize=9)
        axes.tick_params(labelsize=7)
    for axes in figure.axes[len(charts) :]:
        axes.remove()
    if len(runs) > 1:
        figure.axes[0].legend(fontsize=7)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
