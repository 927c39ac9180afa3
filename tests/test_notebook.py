"""docs/pocket_grpo.ipynb, without Jupyter: its cells fit the code, and step by step they give what they say.

`python benchmarks/notebook.py` runs it as a whole.
"""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from loss import group_advantages
from tests.test_house import links_of

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "pocket_grpo.ipynb"
TEXT = FILE.read_text(encoding="utf-8")
CELLS = json.loads(TEXT)["cells"]
SOURCES = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
BY_HAND = [
    "".join(cell["source"]) for cell in CELLS if "by-hand" in cell["metadata"].get("tags", [])
]
PLACES = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|content|Users|mnt|opt)/|[A-Z]:\\\\|file://")


def ours(module):
    """Whether a module is one of this project."""
    first = module.split(".")[0]
    return first in ("objectives", "support") or (ROOT / f"{first}.py").exists()


def test_it_is_a_notebook_and_small():
    assert json.loads(TEXT)["nbformat"] == 4
    assert FILE.stat().st_size < 200_000


def test_its_code_uses_what_there_is():
    """Plain Python (no magic commands), whose imports from this project exist."""
    names = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {(alias.name, None) for alias in node.names if ours(alias.name)}
            elif isinstance(node, ast.ImportFrom) and ours(node.module):
                names |= {(node.module, alias.name) for alias in node.names}
    modules = {module for module, _ in names}
    assert {"train", "rollout", "reward", "loss", "replay_buffer"} <= modules
    for module, name in names:
        found = importlib.import_module(module)
        assert name is None or hasattr(found, name), f"{module}.{name}"


def test_its_links_lead_somewhere():
    for cell in CELLS:
        if cell["cell_type"] == "markdown":
            for target in links_of("".join(cell["source"])):
                assert (FILE.parent / target).exists(), target


def test_its_outputs_are_clean():
    """What is kept tells nothing of a machine, complains of nothing, and has no page in it."""
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    assert outputs, "python benchmarks/notebook.py --write"
    for output in outputs:
        assert output["output_type"] != "error" and output.get("name") != "stderr"
        data = {k: v for k, v in output.get("data", {}).items() if k != "image/png"}
        said = json.dumps([output.get("text"), data])
        assert not PLACES.search(said) and "srcdoc" not in said, said[:300]
    numbers = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert numbers == list(range(1, len(numbers) + 1)), "run from the first cell to the last"


@pytest.fixture(scope="module")
def step():
    """The variables after the cells of the step that is done by hand, and what was there before its repetition."""
    names, before = {}, {}
    for source in BY_HAND:
        before = dict(names)
        exec(source, names)
    return names, before


def test_the_step_by_hand_does_what_the_text_says(step):
    """Better answers become likelier, worse ones less likely; then ratios leave 1, and tokens are clipped."""
    after, once = step
    advantages = once["advantages"]
    assert torch.equal(advantages, group_advantages(once["returns"]))
    assert 0 < (advantages != 0).sum() < advantages.numel(), "a group without a spread, too"
    assert abs(float(once["loss"].detach())) < 1e-6 < float(once["log_probs"].grad.abs().max())
    assert once["better"].mean() > 0 > once["worse"].mean()
    assert after["clipped"] > 0
