"""The house: a small core, support that never looks up, short functions, no dead options, a README that tells the truth."""

import ast
import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.house import code_lines
from docs import tables
from docs.tables import filled
from objectives.table import Objective
from support.config import OBJECTIVE_COLUMNS, Config

ROOT = Path(__file__).resolve().parent.parent
ALGORITHM = ["train", "rollout", "reward", "loss", "replay_buffer"]
COMMANDS = ["run", "evaluate", "sft", "merge", "check_data", "to_verl", "report", "serve"]
TOP = {
    *(f"{name}.py" for name in (*ALGORITHM, *COMMANDS)), "objectives", "support", "tests", "docs", "tiny", "benchmarks",
    "examples", "results", "README.md", "LICENSE", "Makefile", "requirements.txt", "requirements-dev.txt", "requirements-serve.txt", "app",
    "pyproject.toml", "setup.py",
    ".gitignore", ".ci",
}  # fmt: skip
CORE = [ROOT / f"{name}.py" for name in ALGORITHM]
SUPPORT, OBJECTIVES = sorted(ROOT.glob("support/*.py")), sorted(ROOT.glob("objectives/*.py"))
CODE = [*CORE, *(ROOT / f"{name}.py" for name in COMMANDS), *SUPPORT, *OBJECTIVES]
OTHERS = [
    p
    for folder in ("benchmarks", "docs", "docs/ladder", "examples", "tiny")
    for p in ROOT.glob(f"{folder}/*.py")
]


def name(file):
    return str(file.relative_to(ROOT))


def tracked():
    """The names at the top that git knows, or would add."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        pytest.skip("not a git checkout")
    return {line.split("/")[0] for line in found.stdout.splitlines() if (ROOT / line).exists()}


def imported(file):
    """The modules that a file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(file)}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_algorithm_is_read_in_one_sitting():
    """Five files, at most 800 lines, of which at most 560 are code."""
    sources = [file.read_text(encoding="utf-8") for file in CORE]
    assert sum(len(source.splitlines()) for source in sources) <= 800
    assert sum(map(code_lines, sources)) <= 560


def test_nothing_else_stands_at_the_top():
    assert tracked() == TOP


@pytest.mark.parametrize("file", SUPPORT, ids=name)
def test_support_never_imports_the_algorithm(file):
    """What it needs of it is handed in."""
    above = {*ALGORITHM, *COMMANDS, "objectives"}
    assert not [module for module in imported(file) if module.split(".")[0] in above]


@pytest.mark.parametrize("file", CORE, ids=name)
def test_the_algorithm_looks_one_way(file):
    """replay_buffer, then loss and rollout, then reward, then train; and no command."""
    below = {"replay_buffer": 0, "loss": 1, "rollout": 1, "reward": 2, "train": 3}
    for module in imported(file):
        first = module.split(".")[0]
        assert first not in COMMANDS and below.get(first, -1) < below[file.stem], module
        assert first != "objectives" or file.stem == "train", "loss.py is the paper's method alone"


def test_the_table_of_methods_needs_no_torch():
    assert not [
        m for m in imported(ROOT / "objectives/table.py") if m.split(".")[0] in {"torch", "loss"}
    ]


@pytest.mark.parametrize("file", CODE, ids=name)
def test_functions_are_short_and_explained(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    first = (ast.get_docstring(tree) or "").splitlines()[0]
    assert first.endswith("."), "the first line of a file is what the README says of it"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{name(file)}: {node.name}"
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and node in tree.body:
            assert ast.get_docstring(node), f"{name(file)}: {node.name} has no docstring"


@pytest.mark.parametrize("file", [*CODE, *OTHERS], ids=name)
def test_lines_have_at_most_100_columns(file):
    long = [
        i
        for i, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert not long, f"{name(file)}: {long}"


@pytest.mark.parametrize("file", CODE, ids=name)
def test_nothing_happens_at_import(file):
    """Modules define things: no call stands at the top level, but for constants and `if __name__`."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)), node.lineno


ALIASES = {"clip_eps_high": "eps_high"}  # a column that is read through a property


def test_every_option_is_read():
    source = "\n".join(file.read_text(encoding="utf-8") for file in CODE)
    for field in dataclasses.fields(Config):
        if field.name in OBJECTIVE_COLUMNS:
            read = rf"\b(o|objective|self)\.({field.name}|{ALIASES.get(field.name)})\b"
            assert re.search(read, source), f"no equation reads --{field.name}"
        else:
            assert re.search(rf"(config|self)\.{field.name}\b", source), (
                f"nothing reads --{field.name}"
            )
    assert {field.name for field in dataclasses.fields(Objective)} == OBJECTIVE_COLUMNS


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_tables_are_fresh(page):
    """Files, options and methods as the code has them; `python docs/tables.py` writes them again."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == filled(text), "stale: run python docs/tables.py"


def test_every_file_is_in_the_readme():
    """Each file of the algorithm, of objectives/ and of support/, and each command, once, with its own first line."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for file in CODE:
        if file.name != "__init__.py":
            assert text.count(f"| `{name(file)}` |") == 1, name(file)


LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
FENCED = re.compile(r"^[ \t]*(```+|~~~+).*?^[ \t]*\1", re.M | re.S)
SPAN = re.compile(r"(?<!`)(`+)(?!`)((?!\n\s*\n).)+?(?<!`)\1(?!`)", re.S)  # ends with its paragraph


def links_of(text):
    """The files that a page links to. `table[name](now, reference)` in code is no link."""
    return LINK.findall(SPAN.sub("", FENCED.sub("", text)))


def test_links_are_told_from_code():
    assert links_of("[a](a.md)\n```python\nf[x](y, `z)\n```\n[b](b c.md#d)") == ["a.md", "b c.md"]
    assert links_of("odd ` tick\n\n[`f[x](y)`](a.md), ``t[`](z)``, `u`[b](b.md)") == [
        "a.md",
        "b.md",
    ]


@pytest.mark.parametrize(
    "page",
    sorted(p for f in (".", "docs", "docs/ladder", "results") for p in ROOT.glob(f"{f}/*.md")),
    ids=name,
)
def test_links_lead_somewhere(page):
    for target in links_of(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


ANCHOR = re.compile(r"`((?:[\w/]+/)?\w+\.py):(\w+(?:\.\w+)?)`")


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=name)
def test_anchors_name_something(page):
    """`train.py:update` in a page is a function, class, method or constant of that file."""
    for file, anchor in ANCHOR.findall(page.read_text(encoding="utf-8")):
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for part in anchor.split("."):
            found = [n for n in body if getattr(n, "name", None) == part or part in assigned(n)]
            assert found, f"{file}:{anchor}"
            body = getattr(found[0], "body", [])


def assigned(node):
    """The names that a statement gives a value."""
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return {target.id for target in targets if isinstance(target, ast.Name)}
