"""docs/tutorial.*.md: every number of a worked example is the code's, both languages say the same.

How a page is written:

- `<a id="compare"></a>` stands before each heading; headings and their anchors are the same in all
  languages, in the same order, and so are each chapter's links and its places in the code.
- A paragraph of Chinese is one line: a line break in it would be shown as a space.
- `+1.620<!--=compare.right-->`: a number with the name that it has in tests/tutorial_numbers.py.
  Between `<!-- worked -->` and `<!-- /worked -->` every number outside of code has one. Minus is −.
- Blocks ```python are run one after the other in one session; what they print is the block ```text
  behind them. The same code stands in all languages. What a command printed is ```text too.
- A block ```bash is a command that the command line knows.
- Each chapter ends with "predict, then run" and its answer in <details>.
"""

import ast
import contextlib
import io
import re
import shlex
from code import InteractiveConsole
from pathlib import Path

import pytest
from tutorial_numbers import numbers

from docs import figures
from objectives.table import NAMES
from support.command_line import parse_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(ROOT.glob("docs/tutorial.*.md"))
LESSONS = [
    "minute", "models", "sample", "score", "compare", "buffer", "ratio", "kl", "means", "update", "well", "std", "data", "scale",
]  # fmt: skip
APPENDICES = ["symptoms", "wrong"]

HEADING = re.compile(r'<a id="([\w-]+)"></a>\n(#+) .+')
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
MARK = re.compile(r"([+−-]?\d[\d.]*)<!--=([\w.]+)-->")
ANY_MARK = re.compile(r"<!--=([\w.]+)-->")
WORKED = re.compile(r"<!-- worked -->(.*?)<!-- /worked -->", re.S)
# Of ASCII: a Chinese character is a letter to Python, and a number may stand beside it.
NUMBER = re.compile(r"(?<![\w.−-])[+−-]?\d[\d.]*(?!\w)", re.A)
CODE_SPAN = re.compile(r"`[^`\n]+`")
IMAGE = re.compile(r"!\[\]\(figures/([\w-]+\.svg)\)")
LINK = re.compile(r"\]\(([^)]+)\)")
PLACE = re.compile(r"`([\w/]+\.py:[\w.]+)`")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def read(page):
    return page.read_text(encoding="utf-8")


def prose(text):
    """Without blocks of code, spans of code and links' targets."""
    return re.sub(r"\]\([^)]*\)", "]", CODE_SPAN.sub("", BLOCK.sub("", text)))


def chapters(page):
    """The text of each chapter, by its anchor."""
    text, found = read(page), {}
    places = [m for m in HEADING.finditer(text) if m[2] == "##"]
    ends = [m.start() for m in places[1:]] + [len(text)]
    for place, end in zip(places, ends, strict=True):
        found[place[1]] = text[place.start() : end]
    return found


@pages
def test_the_chapters_are_all_there_in_order(page):
    assert [*chapters(page)] == ["from", *LESSONS, *APPENDICES]
    text = BLOCK.sub("", read(page))
    assert len(HEADING.findall(text)) == len(re.findall(r"^#+ ", text, re.M)), "without an anchor"


@pages
def test_links_lead_to_headings(page):
    """Those inside the page; and those into others, whose headings have the names of GitHub."""
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", read(page)):
        text = read(page.parent / file) if file else read(page)
        titles = re.findall(r"^#+ (.+)", text, re.M)
        names = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in names | set(re.findall(r'<a id="([\w-]+)">', text)), f"{file}#{anchor}"


@pages
def test_every_number_is_what_the_code_computes(page):
    known, text = numbers(), read(page)
    assert len(MARK.findall(text)) == len(ANY_MARK.findall(text)), "a mark without a number"
    for shown, name in MARK.findall(text):
        plain = shown.replace("−", "-").lstrip("+")
        digits = len(plain.partition(".")[2])
        computed = f"{known[name]:.{digits}f}"
        assert plain == computed, f"{name} is {known[name]}"
        assert shown[0] != "+" or known[name] > 0


@pages
def test_no_number_of_a_worked_example_is_without_its_name(page):
    for example in WORKED.findall(read(page)):
        bare = NUMBER.findall(prose(MARK.sub("", example)))
        assert not bare, f"{bare} in {example[:200]}"


@pages
def test_every_computed_number_is_used(page):
    assert set(ANY_MARK.findall(read(page))) == set(numbers())


@pages
@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_ends_with_a_prediction_and_its_answer(page, lesson):
    text = chapters(page)[lesson].rstrip()
    assert text.count("<details>") == text.count("</details>") == 1
    assert text.endswith("</details>") or text.endswith("</details>\n\n---")
    assert re.search(r"^```(bash|python)$", text, re.M), "something to run"


def test_what_is_printed_is_printed(monkeypatch):
    """In one session of Python, line by line, as a reader pastes it.

    Other languages have the same code (below).
    """
    monkeypatch.chdir(ROOT)
    session, printed = InteractiveConsole(), ""
    for kind, block in BLOCK.findall(read(PAGES[0])):
        if kind == "python":
            assert not printed, f"printed, and not shown: {printed}"
            output = io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                for line in [*block.splitlines(), ""]:
                    waits = session.push(line)
            assert not waits, f"not a whole statement: {block}"
            printed = output.getvalue()
        elif kind == "text" and printed:
            assert printed.rstrip() == block.rstrip()
            printed = ""


@pages
def test_commands_are_known(page):
    """The flags of train.py are parsed; of the others the file must be there."""
    for kind, block in BLOCK.findall(read(page)):
        for line in block.replace("\\\n", "").splitlines() if kind == "bash" else ():
            words = shlex.split(line, comments=True)
            if "train.py" in words:
                parse_config(words[words.index("train.py") + 1 :], "", NAMES)
            elif words and words[0] == "python":
                assert (ROOT / words[1]).is_file(), line


@pages
def test_pictures_have_no_words(page):
    """So that all languages share them; names of the code are no words."""
    for name in IMAGE.findall(read(page)):
        for kind, words in re.findall(
            r'<text.*class="(.*)">(.*)</text>', read(ROOT / "docs/figures" / name)
        ):
            assert "code" in kind.split() or not re.search(r"[A-Za-z]{4,}", words), words


@pytest.mark.skipif(len(PAGES) < 2, reason="one language only")
def test_the_languages_have_the_same_parts():
    def parts(page):
        found = {}
        for anchor, text in chapters(page).items():
            blocks = [
                ast.dump(ast.parse(block)) if kind == "python" else block.strip()
                for kind, block in BLOCK.findall(text)
            ]
            marks = sorted((name, shown) for shown, name in MARK.findall(text))
            headings = [(m[1], m[2]) for m in HEADING.finditer(text)]
            links = {re.sub(r"(\.en|\.zh)?\.md", "", link) for link in LINK.findall(text)}
            places = set(PLACE.findall(text))
            found[anchor] = headings, marks, blocks, links, places
        return found

    first, *others = map(parts, PAGES)
    for other in others:
        for anchor, part in first.items():
            assert other[anchor] == part, anchor


@pytest.mark.parametrize("name", figures.FIGURES)
def test_the_figures_are_fresh(name):
    assert figures.FIGURES[name]() == read(ROOT / "docs/figures" / f"{name}.svg"), (
        "run docs/figures.py"
    )
