"""The microscope: a run as one page, from its curves down to what an update did to each token.

    python report.py                      the newest run in runs/, as its report.html
    python report.py runs/NAME
    python report.py runs/A runs/B        two runs beside each other
    python report.py runs/NAME --png curves.png
    python report.py --objectives         one rollout under every objective, as objectives.html

The page is one file that works without a network. Its numbers are those that train.py has kept in
completions.jsonl and metrics.jsonl; nothing is computed again, and no model is loaded.
"""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from objectives.table import Objective
from support.config_file import read_config_file
from support.errors import UserError, as_sentence, command, quoted
from support.files import write_whole
from support.report_data import (
    CHARTS,
    PLACES,
    SURROGATES,
    alarm_words,
    find_place,
    first_line,
    read_run,
)
from support.report_page import page

LANGUAGES = ("en", "zh")


class Arguments(argparse.ArgumentParser):
    """argparse, with its errors as one sentence. That of train.py would load transformers first."""

    def error(self, message: str) -> NoReturn:
        raise UserError(as_sentence(message))


def newest_run() -> Path:
    """The run in runs/ that has logged last; UserError if there is none."""
    logs = list(Path("runs").glob("*/metrics.jsonl"))
    if not logs:
        raise UserError(
            "There is no run in runs/; give the folder of one, or train one first (python train.py "
            "--preset tiny)."
        )
    found = max(logs, key=lambda file: file.stat().st_mtime).parent
    print(f"{found}, the newest run")
    return found


def settings_of(folder: Path) -> dict[str, Any]:
    """The options of a run; {} where it has no config.yaml."""
    file = folder / "config.yaml"
    settings = read_config_file(file) if file.is_file() else {}
    return {name: value for name, value in settings.items() if name != "run_dir"}


def is_paper(columns: dict[str, Any]) -> bool:
    """Whether loss.py alone has computed a step, or equations.py a part of it."""
    try:
        return Objective(**columns).is_paper
    except TypeError:  # recorded by another version
        return False


def page_data(runs: list[dict[str, Any]], language: str) -> dict[str, Any]:
    """All that the page knows."""
    for row in (row for run in runs for row in run["steps"]):
        row["paper"] = is_paper(row["objective"])
    return {
        "lang": language,
        "runs": runs,
        "charts": CHARTS,
        **alarm_words(),
        "places": {name: find_place(*where) for name, where in PLACES.items()},
        "surrogates": {n: first_line("objectives/equations.py", n) for n in SURROGATES},
    }


def objectives_data(given: argparse.Namespace) -> dict[str, Any]:
    """The same page, with objectives in the place of steps."""
    if given.runs or given.png:
        raise UserError("--objectives shows a rollout of its own; leave out RUN and --png.")
    from objectives.report import kl_curves, steps

    run = {"name": "", "metrics": [], "answers": [], "settings": {}}
    return page_data([run | {"steps": steps(), "note": ""}], given.lang) | {"kl": kl_curves()}


def write(path: Path, content: bytes) -> None:
    """A file that is there as a whole or not at all; UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}; choose another file.") from error


@command
def main(argv: list[str]) -> None:
    """Make the page of a run, or of two."""
    parser = Arguments(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="a run folder; two to compare")
    parser.add_argument("--output", metavar="FILE", help="the page; RUN/report.html if not given")
    parser.add_argument("--objectives", action="store_true", help="one rollout under all of them")
    parser.add_argument("--png", metavar="FILE", help="the curves as a picture, too (matplotlib)")
    parser.add_argument("--lang", default="en", choices=LANGUAGES, help="language at the beginning")
    given = parser.parse_args(argv)
    if len(given.runs) > 2:
        raise UserError(f"{len(given.runs)} runs are given; the page compares two at the most.")
    output = Path(given.output).expanduser() if given.output else None
    if given.objectives:
        data, output = objectives_data(given), output or Path("objectives.html")
    else:
        folders = [Path(name).expanduser() for name in given.runs] or [newest_run()]
        runs = [read_run(folder) | {"settings": settings_of(folder)} for folder in folders]
        data, output = page_data(runs, given.lang), output or folders[0] / "report.html"
    pictures = []
    if given.png is not None:
        from support.report_picture import draw

        pictures = [(Path(given.png).expanduser(), draw(data))]
    html = page(data).encode()
    for path, content in [(output, html), *pictures]:
        write(path, content)
        print(f"written: {quoted(path)}, {len(content) / 1e6:.1f} MB")
    for run in data["runs"]:
        what = "objectives" if given.objectives else "steps with tokens"
        said = [f"{len(run['steps'])} {what}", *filter(None, [run["note"]])]
        print(": ".join(filter(None, [run["name"], "; ".join(said)])))


if __name__ == "__main__":
    main()
