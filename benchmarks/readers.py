"""Who reads an answer as a person does? Our reader beside those of lm-eval, verl and math-verify.

    python benchmarks/readers.py                        the table of answers, judged by hand
    python benchmarks/readers.py --gsm8k FOLDER         and 300 real sentences: GSM8K's test.jsonl
    python benchmarks/readers.py --completions FILE     and completions of a model (jsonl)

Each reader gets the same texts and references. The table is that of tests/answers_table.py, where a
person has said of each pair whether it is right, so each disagreement is judged. The sentences are
the last lines of GSM8K's own solutions, which are right. A line of FILE holds `completion`,
`reference` and, once a person has judged it, `right`.

Ours twice: strict, the text inside an answer tag; and flexible, the bare text. The others get the
bare text: lm-eval's flexible-extract and its exact match, verl's GSM8K reward (flexible), and
math-verify's parse and verify. Needs their packages: pip install lm-eval verl math-verify.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, command_line, machine, positive, table, versions, write_lines

from support.answers import is_correct, is_correct_flexible
from support.command_line import Parser
from support.errors import UserError, command

Reader = Callable[[str, str], bool]
Case = tuple[str, str, bool]  # text, reference, whether a person calls it right
LONGEST = 150  # characters of a text in the report
ANNOTATION = re.compile(r"<<[^<>]*>>")


def lm_eval_reader() -> Reader:
    """Its GSM8K task: the last number, then exact match without `,`, `$` and a full stop."""
    import lm_eval.tasks
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    task = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    settings = yaml.safe_load(task.read_text(encoding="utf-8"))
    flexible = next(f for f in settings["filter_list"] if f["name"] == "flexible-extract")
    regex = {k: v for k, v in flexible["filter"][0].items() if k != "function"}
    metric = settings["metric_list"][0]
    match = {k: metric[k] for k in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}

    def read(text: str, reference: str) -> bool:
        found = RegexFilter(**regex).apply([[text]], [{}])
        (answer,) = next(iter(found))
        result = exact_match_hf_evaluate(predictions=[answer], references=[reference], **match)
        return bool(result["exact_match"])

    return read


def verl_reader() -> Reader:
    """Its reward for GSM8K, in its flexible form."""
    from verl.utils.reward_score.gsm8k import compute_score

    return lambda text, reference: bool(compute_score(text, reference, method="flexible"))


def math_verify_reader() -> Reader:
    """Its parser on both sides."""
    from math_verify import parse, verify

    return lambda text, reference: bool(verify(parse(reference), parse(text)))


def readers() -> dict[str, Reader]:
    """All of them by name; UserError for a package that is not there."""
    found: dict[str, Reader] = {
        "ours, in the tag": lambda t, r: is_correct(f"<answer>{t}</answer>", r),
        "ours, flexible": is_correct_flexible,
    }
    others = {"lm-eval": lm_eval_reader, "verl": verl_reader, "math-verify": math_verify_reader}
    for name, make in others.items():
        try:
            found[name] = make()
        except ImportError as error:
            raise UserError(f"{error}; run pip install lm-eval verl math-verify first.") from error
    return found


def table_cases() -> list[Case]:
    """The pairs of the tests, the ones that we are known to miss among them."""
    namespace: dict[str, Any] = {}
    source = ROOT / "tests" / "answers_table.py"
    exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), namespace)  # noqa: S102
    # Texts with tags of their own are about the tags.
    right = namespace["RIGHT"] + namespace["RIGHT_CHINESE"] + namespace["MISSED"]
    wrong = namespace["WRONG"] + namespace["WRONG_CHINESE"]
    cases = [(*pair, True) for pair in right] + [(*pair, False) for pair in wrong]
    return [case for case in cases if "answer>" not in case[0]]


def sentence_cases(folder: Path, count: int, seed: int) -> list[Case]:
    """The last lines of GSM8K's solutions, without the calculator's annotations."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").open(encoding="utf-8")]
    random.Random(seed).shuffle(rows)
    cases = []
    for row in rows[:count]:
        solution, _, reference = row["answer"].rpartition("####")
        cases.append(
            (ANNOTATION.sub("", solution.strip().splitlines()[-1]), reference.strip(), True)
        )
    return cases


def completion_cases(file: Path) -> list[Case]:
    """Completions of a model that a person has judged."""
    rows = [json.loads(line) for line in file.open(encoding="utf-8")]
    unjudged = sum("right" not in row for row in rows)
    if unjudged:
        raise UserError(f"{unjudged} lines of {file} have no `right`: judge them first.")
    return [(row["completion"], row["reference"], bool(row["right"])) for row in rows]


def safe(reader: Reader, text: str, reference: str) -> bool:
    """A reader that raises has not read it."""
    try:
        return reader(text, reference)
    except Exception:
        return False


def compare(title: str, cases: list[Case], every: dict[str, Reader], listed: bool) -> list[str]:
    """Markdown: how many each reader reads, and credits wrongly; and which."""
    right = [case for case in cases if case[2]]
    wrong = [case for case in cases if not case[2]]
    rows, lists = [], []
    for name, reader in every.items():
        missed = [(t, r) for t, r, _ in right if not safe(reader, t, r)]
        paid = [(t, r) for t, r, _ in wrong if safe(reader, t, r)]
        rows.append([name, len(right) - len(missed), f"**{len(paid)}**"])
        lists += ["", f"*{name}*, credited although wrong: {shown(paid)}"] if wrong else []
        lists += ["", f"*{name}*, not read although right: {shown(missed)}"]
        print(title, *rows[-1], flush=True)
    head = ["reader", f"read, of {len(right)} right", f"credited, of {len(wrong)} wrong"]
    return ["", f"## {title}", "", *table(head, rows), *(lists if listed else [])]


def shown(pairs: list[tuple[str, str]]) -> str:
    """Pairs of text and reference, as short as they can be said."""
    ends = ((text if len(text) <= LONGEST else "…" + text[-LONGEST:], r) for text, r in pairs)
    words = (f"`{text}` ({reference})".replace("|", "\\|") for text, reference in ends)
    return "; ".join(" ".join(each.split()) for each in words) or "none"


@command
def main(argv: list[str]) -> None:
    """Compare on each set of texts, and write results/readers.md."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="a folder with GSM8K's test.jsonl")
    parser.add_argument("--sentences", type=positive, default=300)
    parser.add_argument("--completions", type=Path, help="judged completions of a model, jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    every = readers()
    lines = [f"`{command_line(argv)}` on {machine()}; {versions()}."]
    if args.gsm8k:
        cases = sentence_cases(args.gsm8k, args.sentences, args.seed)
        lines += compare("Last sentences of GSM8K's own solutions", cases, every, listed=False)
    if args.completions:
        bare = {name: reader for name, reader in every.items() if "tag" not in name}
        lines += compare("Completions", completion_cases(args.completions), bare, listed=True)
    lines += compare("The table of answers, judged by hand", table_cases(), every, listed=True)
    write_lines(args.out / "readers.md", lines)


if __name__ == "__main__":
    main()
