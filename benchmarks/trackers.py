"""Do W&B, Trackio and MLflow get every point of a run? Runs what docs/trackers.md says, and looks.

    pip install wandb "trackio[tensorboard]" mlflow      in an environment that has requirements.txt
    python benchmarks/trackers.py                        the demo; then results/trackers.md
    python benchmarks/trackers.py --out /tmp/trackers -- --steps 5      further options of train.py

Everything happens in a folder that is removed; W&B is offline, and nothing is sent anywhere. The
points are read back from what each tracker has written: W&B's log through `wandb leet inspect`,
Trackio's and MLflow's through their own readers.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from common import (
    RESULTS,
    ROOT,
    command_line,
    machine,
    read_jsonl,
    table,
    versions,
    write_lines,
)

from support.errors import UserError, command

Points = dict[tuple[str, int], float]  # (metric, step): value
HEAD = ["how", "metrics", "points", "equal in all digits", "equal as float32"]


def blocks(kind: str) -> list[str]:
    """The code blocks of docs/trackers.md, in order."""
    page = (ROOT / "docs" / "trackers.md").read_text(encoding="utf-8")
    return re.findall(rf"```{kind}\n(.*?)```", page, re.S)


def shell(command: str, work: Path) -> None:
    """A line of the page in `work`, with this Python."""
    folder = Path(sys.executable).parent
    paths = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    own = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(work / "trackio")}
    subprocess.run(command, shell=True, cwd=work, env=os.environ | paths | own, check=True)


def script(code: str, work: Path) -> None:
    """A Python block of the page in `work`."""
    path = work / "block.py"
    path.write_text(code, encoding="utf-8")
    shell(f"python {path.name}", work)


def logged(run: Path) -> Points:
    """What the run itself has written."""
    rows = read_jsonl(run / "metrics.jsonl")
    return {(k, row["step"]): v for row in rows for k, v in row.items() if k != "step"}


def in_wandb(work: Path) -> Points:
    """What stands in the log of the newest W&B run."""
    (log,) = (work / "wandb" / "latest-run").resolve().glob("run-*.wandb")
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", log]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for record in map(json.loads, said.splitlines()):
        if record["type"] == "history":
            row = record["history"]["item"]
            step = int(row.pop("global_step", row["_step"]))
            found |= {(name, step): v for name, v in row.items() if not name.startswith("_")}
    return found


def in_trackio(project: str) -> Points:
    """What stands in a Trackio project of one run."""
    import trackio

    (run,) = trackio.Api().runs(project)
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs(project, run.name, run_id=run.id)
    hidden = ("step", "timestamp")
    return {(k, row["step"]): v for row in rows for k, v in row.items() if k not in hidden}


def in_mlflow(work: Path) -> Points:
    """What stands in the only run of MLflow's experiment."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{work / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("pocket-grpo")
    (run,) = client.search_runs([experiment.experiment_id])
    names = run.data.metrics
    points = [(n, m) for n in names for m in client.get_metric_history(run.info.run_id, n)]
    return {(name, point.step): point.value for name, point in points}


def row_of(how: str, found: Points, wanted: Points) -> list[str]:
    """How many of the points have arrived, and as what; `of` how many of the run."""
    metrics = len({name for name, _ in found}), len({name for name, _ in wanted})
    both = [(found[place], value) for place, value in wanted.items() if place in found]
    exact = sum(a == b for a, b in both)
    rounded = sum(np.float32(a) == np.float32(b) for a, b in both)
    return [
        how,
        f"{metrics[0]} of {metrics[1]}",
        f"{len(found)} of {len(wanted)}",
        str(exact),
        str(rounded),
    ]


def packages() -> str:
    """The trackers with their versions; UserError if one is missing."""
    try:
        return ", ".join(f"{name} {version(name)}" for name in ("wandb", "trackio", "mlflow"))
    except PackageNotFoundError as error:
        raise UserError(
            f'{error.name} is not installed; pip install wandb "trackio[tensorboard]" mlflow.'
        ) from error


@command
def main(argv: list[str]) -> None:
    """A run under W&B, and resumed under it; then the run into each tracker."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("flags", nargs="*", help="further flags for train.py, after --")
    args, trackers = parser.parse_args(argv), packages()
    (follow, import_events), (each_line, with_mlflow) = blocks("bash"), blocks("python")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        os.environ["TRACKIO_DIR"] = str(work / "trackio")  # for in_trackio
        shell(" ".join([follow.strip(), *args.flags]), work)
        (run,) = (work / "runs").iterdir()
        rows = [row_of("W&B, `sync_tensorboard=True`", in_wandb(work), logged(run))]
        last = max(step for _, step in logged(run))
        resume = f" --resume runs/{run.name} --steps {last + 2}"
        shell(follow.split(" --preset")[0] + resume, work)
        wanted = logged(run)
        new = {place: value for place, value in wanted.items() if place[1] > last}
        rows.append(row_of("W&B, the same, two steps more with `--resume`", in_wandb(work), new))
        code = each_line.replace("NAME", run.name)
        script(code, work)
        rows.append(row_of("W&B, `wandb.log` of each line", in_wandb(work), wanted))
        script(code.replace("import wandb", "import trackio as wandb"), work)
        each = in_trackio("pocket-grpo-all-digits")
        shell(import_events, work)
        imported = in_trackio("pocket-grpo")
        rows.append(row_of("Trackio, `trackio.import_tf_events`", imported, wanted))
        rows.append(row_of("Trackio, `trackio.log` of each line", each, wanted))
        script(with_mlflow.replace("NAME", run.name), work)
        rows.append(row_of("MLflow, `mlflow.log_metrics` of each line", in_mlflow(work), wanted))
    words = f"`{command_line(argv)}` on {machine()}; {versions()}; {trackers}"
    lines = [words, "", *table(HEAD, rows)]
    print("\n".join(lines))
    write_lines(args.out / "trackers.md", lines)


if __name__ == "__main__":
    main()
