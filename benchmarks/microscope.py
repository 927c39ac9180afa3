"""Does the microscope's page work in a real browser, and what does its recording cost?

    python benchmarks/microscope.py cost                       the demo's steps, with and without it
    python benchmarks/microscope.py browser RUN [RUN2]         needs Chromium on the path

`browser` opens the page of RUN, and that of a copy whose texts are hostile, and does what a person
does: slides, points, uses the keys, searches, changes language and colours, and reads numbers that
must be those of completions.jsonl. Nothing may be requested, logged as an error, or run that came
from a text. Pictures: desktop, dark, phone, Chinese. It speaks to the browser through a pipe, so no
package is needed for it.
"""

import argparse
import base64
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import interval, machine, table, versions

import report
import train
from objectives.report import steps
from objectives.table import OBJECTIVES
from support.command_line import parse_config
from support.errors import UserError, command
from support.model import set_learning_rate
from support.recording import Recording
from support.recording_file import FILE, read_rows
from support.schedule import log, seed_step

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<!--<script>",
    "\u2028\u2029window.hacked=1//",
    "{{data}} {{script}} \\u003cscript>",
    "\u202etxet desrever\u202c \u0000\u0007\u200b",
    "javascript:window.hacked=1",
    "Z\u0351\u036b\u0343\u036a" * 20,
    "\ud800 half",
]


class Browser:
    """A headless Chromium with one page, spoken to through its debugging pipe."""

    def __init__(self, program: str, folder: str) -> None:
        read, self.out = os.pipe()
        self.into, write = os.pipe()

        def as_three_and_four() -> None:
            a, b = os.dup(read), os.dup(write)
            os.dup2(a, 3)
            os.dup2(b, 4)

        options = "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars"
        self.process = subprocess.Popen(
            [program, *options.split(), "--remote-debugging-pipe", f"--user-data-dir={folder}"],
            preexec_fn=as_three_and_four,
            pass_fds=(3, 4),
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self.rest, self.number, self.session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        self.allowed = ("file:", "data:")  # what the page may request
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self) -> dict[str, Any]:
        """The next message; they end with a byte of 0."""
        while b"\0" not in self.rest:
            piece = os.read(self.into, 2**20)
            if not piece:
                raise UserError("Chromium has ended.")
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser, and wait for its answer; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def open(self, place: Path | str) -> None:
        """Load a file, or what is at an address, to its end."""
        self.events.clear()
        url = place.resolve().as_uri() if isinstance(place, Path) else place
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.read())

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """The window, and the colours that the person prefers."""
        mobile = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def choose(self, name: str, value: str, event: str) -> None:
        """Give a field a value, as a person does."""
        field = f"document.getElementById('{name}')"
        self.js(f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('{event}'))")

    def point(self, selector: str) -> None:
        """Move the mouse onto an element."""
        place = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const r = e.getClientRects()[0]; "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])

    def key(self, name: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            code = {"ArrowRight": 39, "Enter": 13, "Escape": 27}[name]
            own = {"key": name, "code": name, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **own)

    def picture(self, path: Path) -> None:
        """What is in the window, as PNG."""
        found = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """Errors of the console, exceptions, dialogs, and requests that are not allowed."""
        said = []
        for event in self.events:
            method, found = event.get("method", ""), event.get("params", {})
            wrong = method in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening")
            wrong |= method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning")
            wrong |= method == "Log.entryAdded" and found["entry"]["level"] == "error"
            if method == "Network.requestWillBeSent":
                wrong = not found["request"]["url"].startswith(self.allowed)
            said += [json.dumps(event)[:400]] if wrong else []
        return said


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser, ended afterwards; UserError if there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if program is None:
        raise UserError("There is no Chromium on the path; install it, as in apt install chromium.")
    with tempfile.TemporaryDirectory() as folder:
        found = Browser(program, folder)
        try:
            yield found
        finally:
            found.process.kill()
            found.process.wait()


def make_page(runs: list[Path], path: Path, *flags: str) -> Path:
    """The page of runs."""
    with redirect_stdout(sys.stderr):
        report.main([*map(str, runs), "--output", str(path), *flags])
    return path


def hostile_copy(run: Path, folder: Path) -> Path:
    """A copy of a run whose every text is hostile."""
    copy = folder / "hostile"
    copy.mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        shutil.copy(run / name, copy / name)
    rows = read_rows(run / FILE)[0]
    for row in rows:
        for each in row.get("answers", []) + row.get("groups", []):
            each |= {"question": "".join(HOSTILE), "reference": HOSTILE[0]}
        for each in row.get("answers", []):
            each["text"] = "".join(HOSTILE)
        for each in row.get("completions", []):
            each["tokens"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(each["tokens"]))]
            each["opened"] = HOSTILE[1]
    (copy / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return copy


def check(name: str, good: bool, done: list[str]) -> None:
    """Note a check, or end with its name."""
    if not good:
        raise UserError(f"The page fails: {name}.")
    done.append(name)


def read_numbers(page: Browser, run: Path, done: list[str]) -> int:
    """Every token of every step: the numbers that the page shows are those of the file."""
    steps = [row for row in read_rows(run / FILE)[0] if "groups" in row]
    count = 0
    for s, row in enumerate(steps):
        page.choose("slider", str(s), "input")
        for k, completion in enumerate(row["completions"]):
            for i in range(0, len(completion["tokens"]) if completion.get("updates") else 0, 5):
                page.js(f'document.querySelector(\'.tok[data-k="{k}"][data-i="{i}"]\').click()')
                text = page.js("document.getElementById('detail').textContent").replace("−", "-")
                u = completion["updates"][0]
                shown = {float(each) for each in re.findall(r"\d+\.?\d*(?:e[-+]?\d+)?", text)}
                for value in (u["log_probs"][i], u["policy_gradient"][i], u["gradient"][i]):
                    near = min(abs(each - abs(value)) for each in shown)
                    if near > 6e-3 * abs(value) + 1e-9:
                        raise UserError(f"Step {row['step']}, token {i}: {value} is not in {text}")
                count += 1
    check("numbers of the page are those of the file", count > 0, done)
    return count


def look(runs: list[Path], out: Path) -> None:
    """All that is done in the browser."""
    done: list[str] = []
    with tempfile.TemporaryDirectory() as name, browser() as page:
        folder = Path(name)
        path = make_page(runs, folder / "page.html")
        page.size(1280, 900)
        start = time.perf_counter()
        page.open(path)
        seconds = time.perf_counter() - start
        charts = page.js("document.querySelectorAll('figure').length")
        check("it opens, with charts", charts > 5, done)
        first = page.js("document.getElementById('step-name').textContent")
        page.js("document.getElementById('slider').focus()")
        page.key("ArrowRight")
        now = page.js("document.getElementById('step-name').textContent")
        check("the slider moves by key", now != first, done)
        page.point(".tok")
        detail = page.js("document.getElementById('detail').textContent")
        check("pointing at a token shows it", "π" in detail, done)
        page.picture(out / "report-desktop.png")
        page.js("document.querySelector('.tok').click()")
        pinned = page.js("document.getElementById('detail').textContent")
        page.point(".completion:last-of-type .tok:last-child")
        same = page.js("document.getElementById('detail').textContent") == pinned
        check("a token that was clicked stays", same, done)
        page.js("document.getElementById('close').click()")
        page.js("document.querySelector('.tok[tabindex=\"0\"]').focus()")
        page.key("ArrowRight")
        reached = page.js("document.activeElement.dataset.i")
        check("keys go on to the next token", reached == "1", done)
        page.key("Enter")
        there = page.js("document.activeElement.id")
        page.key("Escape")
        back = page.js("document.activeElement.dataset.i")
        check("Enter goes to its numbers, Escape back", there == "token" and back == "1", done)
        page.choose("search", "answer", "input")
        hits = page.js("document.querySelectorAll('#hits button').length")
        check("search finds", hits > 0, done)
        page.js("document.querySelector('#hits button').click()")
        for tint in ("logit", "log", "ratio", "kl", "entropy", "push"):
            page.choose("tint", tint, "change")
        tokens = read_numbers(page, runs[0], done)
        pictures(page, out, done)
        check("no error and no request", not page.complaints(), done)
        page.size(1280, 900)
        page.open(make_page([hostile_copy(runs[0], folder)], folder / "hostile.html"))
        page.point(".tok")
        harmless = "window.hacked === undefined && !document.querySelector('img, main script')"
        check("hostile texts are text", page.js(harmless), done)
        shown = page.js("document.querySelector('.group').textContent")
        check("hostile texts are shown", "window.hacked" in shown, done)
        check("no error with hostile texts", not page.complaints(), done)
        page.picture(out / "report-hostile.png")
        objectives(page, make_page([], folder / "all.html", "--objectives"), out, done)
        sentences(page, folder, done)
        size = path.stat().st_size / 1e6
        print(f"page {size:.2f} MB, open after {seconds:.1f} s, {tokens} tokens compared")
    print("\n".join(f"ok: {each}" for each in done))


def objectives(page: Browser, path: Path, out: Path, done: list[str]) -> None:
    """The page of all objectives: its map, its slider, its KL curves."""
    page.size(1280, 860)
    page.open(path)
    page.picture(out / "objectives.png")
    rows = page.js("document.querySelectorAll('#map .name').length")
    check("the map has a row for each objective", rows == len(OBJECTIVES), done)
    for number, name in enumerate(OBJECTIVES):
        page.choose("slider", str(number), "input")
        shown = page.js("document.getElementById('step-name').textContent")
        check(f"the slider shows {name}", shown.startswith(f"{name} ("), done)
    page.js("document.querySelector('#map .up').dispatchEvent(new MouseEvent('click'))")
    detail = page.js("document.getElementById('detail').textContent")
    check("a bar of the map shows its token", "log π" in detail, done)
    page.js("document.getElementById('kl-part').scrollIntoView()")
    page.picture(out / "objectives-kl.png")
    page.size(390, 844, dark=True)
    wide = page.js("document.documentElement.scrollWidth")
    check(f"the same on a phone ({wide} of 390)", wide <= 390, done)
    page.js("document.getElementById('language').click()")
    page.js("scrollTo(0, 0)")
    page.picture(out / "objectives-phone-zh.png")
    check("no error on the page of objectives", not page.complaints(), done)


def sentences(page: Browser, folder: Path, done: list[str]) -> None:
    """What the page says of a group and of a clipped token is so, under every objective.

    With one more, that has a dual clip.
    """
    OBJECTIVES["dual clip"] = replace(OBJECTIVES["grpo"], clip_ratio_c=1.3)
    try:
        page.open(make_page([], folder / "dual.html", "--objectives"))
        rows = steps()
    finally:
        del OBJECTIVES["dual clip"]
    said: set[str] = set()
    for number, row in enumerate(rows):
        page.choose("slider", str(number), "input")
        text = page.js("document.getElementById('groups').textContent")
        idle = [g["returns"] for g in row["groups"] if not any(g["advantages"])]
        equal = sum(len({*returns}) == 1 for returns in idle)
        found = [text.count(words) for words in ("All rewards are equal", "under this objective")]
        good = found == [equal, len(idle) - equal]
        check(f"{row['name']}: what is said of groups without advantages", good, done)
        if row["objective"]["surrogate"] == "clip" and row["objective"]["ratio_level"] == "token":
            said |= clip_reasons(page, row)
    check("all reasons of a clip are seen, and are so", len(said) == 3, done)


def clip_reasons(page: Browser, row: dict[str, Any]) -> set[str]:
    """Why tokens are clipped, as the page says it; UserError where it is not so."""
    o, said = row["objective"], set()
    high, low = 1 + (o["clip_eps_high"] or o["clip_eps"]), 1 - o["clip_eps"]
    for k, completion in enumerate(row["completions"]):
        for u in completion.get("updates", []):
            good = row["groups"][completion["group"]]["advantages"][completion["index"]] > 0
            for i in u["clipped"]:
                page.js(f'document.querySelector(\'.tok[data-k="{k}"][data-i="{i}"]\').click()')
                text = page.js("document.getElementById('detail').textContent")
                ratio = math.exp(u["log_probs"][i] - u["old"][i])
                reasons = {
                    "A is positive": good and ratio > high,
                    "less likely than": not good and ratio < low,
                    "the dual clip": not good and ratio > (o["clip_ratio_c"] or math.inf),
                }
                if [words in text for words in reasons] != [*reasons.values()]:
                    raise UserError(f"{row['name']}, r = {ratio:.3g}: the page says {text}")
                said |= {words for words, so in reasons.items() if so}
    return said


def pictures(page: Browser, out: Path, done: list[str]) -> None:
    """Dark, phone and Chinese; a phone's page must not be wider than the phone."""
    themes = []
    for _ in range(2):
        page.js("document.getElementById('theme').click()")
        themes.append(page.js("getComputedStyle(document.body).backgroundColor"))
    check("the button turns dark and light", len({*themes}) == 2, done)
    page.js("document.querySelector('.tok').click()")
    page.js("document.getElementById('glance-head').scrollIntoView()")
    page.picture(out / "report-glance.png")
    page.size(1280, 900, dark=True)
    page.js("delete document.documentElement.dataset.theme")
    page.js("document.getElementById('step-part').scrollIntoView()")
    page.picture(out / "report-dark.png")
    page.size(390, 844)
    page.js("document.getElementById('step-part').scrollIntoView()")
    page.picture(out / "report-phone.png")
    wide = page.js("document.documentElement.scrollWidth")
    check(f"a phone's page is no wider than the phone ({wide} of 390)", wide <= 390, done)
    page.js("document.getElementById('language').click()")
    page.js("document.querySelector('.tok').click()")
    page.js("document.getElementById('step-part').scrollIntoView()")
    page.picture(out / "report-phone-zh.png")
    page.size(1280, 900)
    page.js("scrollTo(0, 0)")
    page.picture(out / "report-zh.png")
    page.js("document.getElementById('answers-head').scrollIntoView()")
    page.picture(out / "report-answers.png")
    check("Chinese", page.js("document.documentElement.lang") == "zh-CN", done)
    page.js("document.getElementById('language').click()")


class Timed(Recording):
    """A recording that adds up what it takes, but for what autograd hands over."""

    seconds = 0.0


def timed(name: str) -> Callable[..., Any]:
    """A method of Recording, with a clock of the process's own time."""

    def method(self: Timed, *arguments: Any) -> Any:
        start = time.process_time()
        try:
            return getattr(Recording, name)(self, *arguments)
        finally:
            self.seconds += time.process_time() - start

    return method


for _name in ("choose", "find", "note", "write"):
    setattr(Timed, _name, timed(_name))


def cost(flags: list[str], steps: int) -> None:
    """Steps of two equal runs in turn, one with the recording; seconds are the process's own."""
    with tempfile.TemporaryDirectory() as name:
        trainers = {}
        for kind in ("with", "without"):
            own = ["--preset", "tiny", "--device", "cpu", "--eval_interval", "0", *flags]
            config, _ = parse_config([*own, "--run_dir", f"{name}/{kind}"])
            trainers[kind] = trainer = train.build(config, None)
            Path(name, kind).mkdir()
            trainer.monitor.open(Path(name, kind))
        recording = trainers["with"].monitor.recording = Timed(trainers["with"])
        recording.open(Path(name, "with"), 0)
        took: dict[str, list[float]] = {"with": [], "without": [], "recording": []}
        for step in range(1, steps + 1):
            for kind in ("with", "without") if step % 2 else ("without", "with"):
                trainer, start, recording.seconds = trainers[kind], time.process_time(), 0.0
                seed = seed_step(trainer.config.seed, step)
                set_learning_rate(trainer.optimizer, trainer.config, step)
                train.train(trainer, iter([(step, seed)]))
                log(trainer, step)
                took[kind].append(time.process_time() - start)
                took["recording"] += [recording.seconds] if kind == "with" else []
        size = Path(name, "with", FILE).stat().st_size
    rows = [[kind, *(f"{1000 * x:.1f}" for x in interval(some[1:]))] for kind, some in took.items()]
    print(*table(["a step", "ms of CPU, mean", "± (95 %)"], rows), sep="\n")
    pairs = [a - b for a, b in zip(took["with"][1:], took["without"][1:], strict=True)]
    whole = statistics.mean(took["without"][1:])
    mean, half = interval(pairs)
    print(f"with less without: {mean / whole:+.2%} ± {half / whole:.2%} of a step")
    print(f"the recording's own: {statistics.mean(took['recording'][1:]) / whole:.2%} of a step")
    print(f"{size / steps / 1000:.1f} kB a step; {machine()}, {versions()}")


@command
def main(argv: list[str]) -> None:
    """The two parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["cost", "browser"])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--flags", default="", help="more flags of train.py, for `cost`")
    given = parser.parse_args(argv)
    if given.part == "cost":
        cost(given.flags.split(), given.steps)
    else:
        look(given.runs, given.out)


if __name__ == "__main__":
    main()
