"""How much stands between the command line and the gradient? Files, lines, functions, frames.

    python benchmarks/house.py                        of this checkout
    python benchmarks/house.py --root ../before       of another one; --core: its files

Counted are the files of the algorithm (`--core`) and, beside them, all Python files of the project
but tests, benchmarks and docs. "Until the first gradient": one plain GRPO step on the bundled task,
traced up to its first call of `backward`. Functions without a name (lambdas, comprehensions) are
not counted.
"""

import argparse
import ast
import io
import json
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
CORE = ["train", "rollout", "reward", "loss", "replay_buffer"]
APART = ("tests", "benchmarks", "docs", "tiny", ".venv", "results")
FLAGS = (
    "--preset=tiny --device=cpu --objective=grpo --steps=1 --rollouts_per_step=2 --group_size=4 "
    "--train_batch_size=8 --max_new_tokens=16 --eval_interval=0 --checkpoint_interval=0"
)
# Run in the checkout: notes functions and lines of its files until backward is called.
TRACER = """
import json, sys
import torch
torch.set_num_threads(1)
root, flags = sys.argv[1], sys.argv[2:]
functions, lines, frames = set(), set(), []
class Done(BaseException):
    pass
def trace(frame, event, argument):
    code = frame.f_code
    if not code.co_filename.startswith(root) or '/.venv/' in code.co_filename:
        return None
    if event == 'call' and not code.co_name.startswith('<'):
        functions.add((code.co_filename, code.co_qualname))
    lines.add((code.co_filename, frame.f_lineno))
    return trace
def backward(*arguments, **others):
    frame = sys._getframe(1)
    while frame:
        if frame.f_code.co_filename.startswith(root) and frame.f_code.co_name != '<module>':
            frames.append(frame.f_code.co_qualname)
        frame = frame.f_back
    raise Done
torch.Tensor.backward = backward
sys.path.insert(0, root)
import train
sys.settrace(trace)
try:
    train.main(flags)
except Done:
    pass
sys.settrace(None)
print('TRACED' + json.dumps([sorted(functions), sorted(lines), frames]))
"""


def code_lines(source: str) -> int:
    """Lines with code: no blank lines, comments or docstrings."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*skipped, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def longest_function(source: str) -> int:
    """Lines of the longest function."""
    nodes = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef))
    return max((node.end_lineno - node.lineno + 1 for node in nodes), default=0)


def static_rows(files: list[Path]) -> dict[str, int]:
    """What can be counted in the text of some files."""
    sources = [file.read_text(encoding="utf-8") for file in files]
    return {
        "files": len(files),
        "lines": sum(source.count("\n") for source in sources),
        "lines of code": sum(map(code_lines, sources)),
        "longest function, lines": max(map(longest_function, sources)),
        "lines over 100 columns": sum(len(x) > 100 for s in sources for x in s.splitlines()),
    }


def trace_first_step(root: Path) -> tuple[list, list, list]:
    """Functions and lines until the first gradient, and the frames at `backward`."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*FLAGS.split(), f"--run_dir={folder}/run"]
        command = [sys.executable, "-c", TRACER, str(root), *flags]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    functions, lines, frames = json.loads(done.stdout.split("TRACED")[1])
    return functions, lines, frames


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=HERE, help="the checkout")
    parser.add_argument("--core", nargs="+", default=CORE, help="the files of the algorithm")
    given = parser.parse_args()
    root = given.root.resolve()
    core = [root / f"{name}.py" for name in given.core]
    everything = [
        file for file in sorted(root.rglob("*.py")) if file.relative_to(root).parts[0] not in APART
    ]
    functions, lines, frames = trace_first_step(root)
    columns = []
    for files in (core, everything):
        names = set(map(str, files))
        columns.append(
            static_rows(files)
            | {
                "named functions until the first gradient": sum(f in names for f, _ in functions),
                "lines executed until the first gradient": sum(f in names for f, _ in lines),
            }
        )
    print("| | algorithm | whole project |\n|---|---|---|")
    for name in columns[0]:
        print(f"| {name} | {columns[0][name]} | {columns[1][name]} |")
    print(f"\nframes at backward: {len(frames)} ({' → '.join(reversed(frames))})")


if __name__ == "__main__":
    main()
