"""Does docs/pocket_grpo.ipynb run from its first cell to its last, and does its model learn?

    pip install -r requirements.txt matplotlib nbclient nbconvert ipykernel     not into .venv
    python benchmarks/notebook.py                  run from a copy of this checkout
    python benchmarks/notebook.py --clone          begun in an empty folder: it clones and installs
    python benchmarks/notebook.py --html FOLDER    the page too, as nbconvert makes it
    python benchmarks/notebook.py --write          the notebook in docs/ with its new outputs

Fails on an error in any cell, on anything that a cell writes to stderr, and on a held-out accuracy
below 0.9. --clone clones what is committed here. Everything happens in a folder that is removed.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import ROOT, machine, read_jsonl, versions

from support.errors import UserError, command

try:
    import nbformat
    from nbclient import NotebookClient
except ImportError as error:
    sys.exit(f"{error}; pip install matplotlib nbclient nbconvert ipykernel.")

NOTEBOOK = Path("docs/pocket_grpo.ipynb")
TARGET = 0.90
ADDRESS = 'REPOSITORY = ""'  # in its first cell


def copy_checkout(folder: Path) -> None:
    """The files that git knows, or would add, as they are now."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # not one that was removed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells in `folder`, with this Python; the outputs are in the notebook then."""
    client = NotebookClient(notebook, timeout=1800, record_timing=False)
    client.execute(cwd=str(folder))
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise UserError(f"Cell {number} writes to stderr: {output.text[:500]}")


def accuracy_of(folder: Path) -> float:
    """The last held-out accuracy of the only run below `folder`."""
    (log,) = folder.glob("**/runs/*/metrics.jsonl")
    return [row["eval/accuracy"] for row in read_jsonl(log) if "eval/accuracy" in row][-1]


def without_pages(notebook: Any, metadata: dict[str, Any]) -> Any:
    """What is kept in git: all outputs but the page of report.py, which has a megabyte."""
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if "srcdoc" not in str(o.get("data"))]
    notebook.metadata = metadata
    return notebook


def write_page(notebook: Any, folder: Path) -> None:
    """Write notebook.html, as nbconvert makes it.

    In a process of its own: nbconvert asks for a package with the name of this file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / "notebook.ipynb")
    convert = [sys.executable, "-m", "nbconvert", "--to", "html", "notebook.ipynb"]
    subprocess.run(convert, cwd=folder, check=True)


@command
def main(argv: list[str]) -> None:
    """Run the notebook; say how long it took, and how good its model is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clone", action="store_true", help="begin in an empty folder")
    parser.add_argument("--html", type=Path, metavar="FOLDER", help="where to put notebook.html")
    parser.add_argument("--write", action="store_true", help="keep the outputs in docs/")
    args = parser.parse_args(argv)
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    metadata = dict(notebook.metadata)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        if args.clone:
            source = notebook.cells[1].source
            notebook.cells[1].source = source.replace(ADDRESS, f"{ADDRESS[:-2]}{ROOT.as_uri()!r}")
        else:
            copy_checkout(folder)
        start = time.perf_counter()
        execute(notebook, folder if args.clone else folder / NOTEBOOK.parent)
        seconds, accuracy = time.perf_counter() - start, accuracy_of(folder)
    if args.html:
        write_page(notebook, args.html)
    if accuracy < TARGET:
        raise UserError(f"The held-out accuracy is {accuracy:.3f} at the end, below {TARGET}.")
    if args.write:
        nbformat.write(without_pages(notebook, metadata), ROOT / NOTEBOOK)
    print(f"{seconds:.0f} s, held-out accuracy {accuracy:.3f}; {machine()}; {versions()}")


if __name__ == "__main__":
    main()
