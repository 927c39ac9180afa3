"""Does the page of serve.py work in a real browser? And can a completion run a script in it?

    python benchmarks/service_page.py --model runs/NAME --out FOLDER     needs Chromium on the path

Asks as a person does: an example, with Ctrl+Enter; both models, while they write; several samples
with their advantages; a question that is too long; a key to stop; the other language, dark, a
phone. Then the same page before a model whose every text is hostile. Nothing but this server may
be requested, and no script may run that came from a text. Pictures go to --out.
"""

import argparse
import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from microscope import HOSTILE, Browser, browser, check

import serve
from objectives.table import NAMES
from support.command_line import Parser, parse_run_config
from support.data import Question
from support.errors import UserError, command
from support.serving_options import Options, bind

TEXT = "".join(HOSTILE[:-1])  # without half a character, which no tokenizer writes
HOSTILE_ANSWER = f"<think>{TEXT}</think><answer>{TEXT}</answer>{TEXT}"


@contextmanager
def running(service: Any) -> Iterator[str]:
    """The service on a free port; its address."""
    with bind("127.0.0.1", 0) as place:
        place.listen()
        work = serve.serve_http(service, place)
        threading.Thread(target=asyncio.run, args=[work], daemon=True).start()
        yield f"http://127.0.0.1:{place.getsockname()[1]}/"


def write_hostile(model: Any, tokenizer: Any, prompts: list, sampling: Any) -> list[Any]:
    """In the place of rollout.complete."""
    for _ in range(4):
        time.sleep(0.1)
        sampling.watch(list(range(len(prompts))), [5] * len(prompts))
    return [SimpleNamespace(ids=[5] * 9, text=HOSTILE_ANSWER, truncated=False) for _ in prompts]


def status(page: Browser) -> str:
    """What the page says that it is doing."""
    return page.js("document.getElementById('status').textContent")


def wait(page: Browser, word: str, seconds: float = 120) -> list[str]:
    """Until the status has this word; all that it was before."""
    seen, end = [], time.monotonic() + seconds
    while word not in status(page):
        seen.append(status(page))
        if time.monotonic() > end:
            raise UserError(f"The page never said {word!r}, but {seen[-1]!r}.")
        time.sleep(0.02)
    return seen


def enter(page: Browser, name: str = "Enter", code: int = 13, modifiers: int = 2) -> None:
    """Ctrl+Enter in the question, or another key."""
    page.js("document.getElementById('question').focus()")
    for kind in ("keyDown", "keyUp"):
        own = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        page.call("Input.dispatchKeyEvent", type=kind, **own)


def count(page: Browser, selector: str) -> int:
    """How many such elements there are."""
    return page.js(f"document.querySelectorAll({selector!r}).length")


def ask(page: Browser, out: Path, done: list[str]) -> None:
    """What a person does at a desk."""
    page.choose("example", "0", "change")
    enter(page)
    before = wait(page, "Answered")
    writing = any("writing" in each for each in before)
    check("an example is asked with Ctrl+Enter, and read while it is written", writing, done)
    marked = count(page, ".column") == 2 and count(page, ".card.right, .card.wrong") == 2
    check("both models are beside each other, each answer marked", marked, done)
    check("the reasoning is folded", count(page, "details[open]") == 0, done)
    page.picture(out / "service-greedy.png")
    page.choose("samples", page.js("document.getElementById('samples').lastChild.value"), "change")
    enter(page)
    wait(page, "Answered")
    words = page.js("document.getElementById('columns').textContent")
    check("samples have their advantages", "advantage" in words and "Seed" in status(page), done)
    page.picture(out / "service.png")
    enter(page)
    wait(page, "writing")
    enter(page, "Escape", 27, 0)
    wait(page, "Stopped")
    check("Escape stops", True, done)
    check("no error, and nothing else was requested", not page.complaints(), done)
    page.choose("question", "apples " * 900, "input")
    enter(page)
    end = time.monotonic() + 20
    while page.js("document.getElementById('error').hidden") and time.monotonic() < end:
        time.sleep(0.05)
    said = page.js("document.getElementById('error').textContent")
    check(f"a question that is too long is a sentence ({said})", said.endswith("."), done)
    page.picture(out / "service-error.png")


def phone(page: Browser, url: str, out: Path, done: list[str]) -> None:
    """A phone, dark and in Chinese."""
    page.size(390, 844, dark=True)
    page.open(url)
    page.js("document.getElementById('language').click()")
    check("Chinese", page.js("document.documentElement.lang") == "zh-CN", done)
    page.choose("example", "1", "change")
    page.choose("samples", page.js("document.getElementById('samples').lastChild.value"), "change")
    page.js("document.getElementById('ask').click()")
    wait(page, "用时")
    wide = page.js("document.documentElement.scrollWidth")
    check(f"a phone's page is no wider than the phone ({wide} of 390)", wide <= 390, done)
    page.js("document.getElementById('answers-head').scrollIntoView()")
    page.picture(out / "service-phone.png")


def attack(page: Browser, service: Any, out: Path, done: list[str]) -> None:
    """Every text hostile: the name, the examples, what the models write."""
    service.answerer.complete = write_hostile
    examples = [Question(TEXT, HOSTILE[0], "")]
    with running(replace(service, name=TEXT, examples=examples)) as url:
        page.allowed = (url,)
        page.size(1280, 900)
        page.open(url)
        page.choose("example", "0", "change")
        page.choose("question", "How many apples?", "input")
        page.choose("reference", HOSTILE[1], "input")
        enter(page)
        wait(page, "Answered")
        page.js("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        made = count(page, "#columns script, #columns img, h1 script, select script")
        shown = page.js("document.getElementById('columns').textContent")
        check("hostile texts are text", made == 0 and HOSTILE[0] in shown, done)
        check("no script of a text has run", page.js("window.hacked === undefined"), done)
        check("no error with hostile texts", not page.complaints(), done)
        page.picture(out / "service-hostile.png")


@command
def main(argv: list[str]) -> None:
    """All of it."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()), help="pictures")
    given = parser.parse_args(argv)
    done: list[str] = []
    with redirect_stdout(sys.stderr):
        config, others = parse_run_config(["--model", given.model], None, NAMES, **Options.HELP)
        service = serve.build_service(config, others["base"], Options())
        given.out.mkdir(parents=True, exist_ok=True)
        with running(service) as url, browser() as page:
            page.allowed = (url,)
            page.size(1280, 900)
            page.open(url)
            ask(page, given.out, done)
            phone(page, url, given.out, done)
            attack(page, service, given.out, done)
    print("\n".join(f"ok: {each}" for each in done))


if __name__ == "__main__":
    main()
