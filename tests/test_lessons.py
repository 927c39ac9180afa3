"""The lessons of docs/: the ladder climbs, the sabotages break what they say, both languages say the same."""

import contextlib
import dataclasses
import functools
import io
import re
import sys
from collections import Counter
from unittest import mock

import pytest
import torch
from conftest import ROOT
from steps import build, one_step

sys.path.insert(0, str(ROOT / "benchmarks"))  # where `from common import …` finds its file

import break_it
import ladder
import task
from common import read_jsonl

import train
from loss import GRPOLoss, approx_kl_divergence, group_advantages
from replay_buffer import pad_batch
from support.command_line import parse_config
from support.config import PRESETS, Config
from support.data import QuestionStream
from support.errors import UserError
from support.model import load_tokenizer
from support.prompts import training_questions

SCRIPTS = sorted(p.stem for p in (ROOT / "docs" / "ladder").glob("[0-9]*.py"))


# -------------------------------------------------------------------------------------- the ladder


class Few:
    """A stream of questions that gives an eighth of what is asked for, so that a step is short."""

    def __init__(self, questions):
        self.questions = questions

    def take(self, count):
        return self.questions.take(count // 8)


@functools.cache
def questions():
    """The training questions with their prompts, which take half a second."""
    return training_questions(
        Config(preset="tiny", **PRESETS["tiny"]), load_tokenizer("tiny/model")
    )


def make(steps=2, **settings):
    with mock.patch.object(task, "training_questions", lambda *arguments: questions()):
        made = task.Task(steps, held_out=4, **settings)
    made.questions = Few(made.questions)
    return made


def climb(script, made=None):
    """A rung, a few steps up; returns its task."""
    made = made or make()
    with contextlib.redirect_stdout(io.StringIO()):
        ladder.load(script).train(made)
    return made


def weights(made):
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_rung_climbs(script):
    made = climb(script)
    assert [row["step"] for row in made.rows] == [0, 1, 2]
    assert {"accuracy", "kl", "right", "seconds", "tokens"} <= made.rows[-1].keys()
    start = torch.cat([p.flatten() for p in made.start.parameters()])
    moved = (weights(made) - start).abs()
    assert 1e-5 < moved.max() < 1e-2, "trained, and by steps of about the learning rate"
    assert len((ladder.LADDER / f"{script}.py").read_text().splitlines()) < 60


def test_there_are_five_rungs_and_each_is_measured():
    assert len(SCRIPTS) == 5 and {rung.script for rung in ladder.RUNGS.values()} == set(SCRIPTS)
    assert all(
        hasattr(ladder.load(r.script), name) for r in ladder.RUNGS.values() for name, _ in r.parts
    )
    assert {name for names in ladder.PANELS.values() for name in names} == set(ladder.RUNGS)


@pytest.mark.parametrize(
    ("script", "same"), [("1_reinforce", False), ("2_baseline", True), ("3_group", True)]
)
def test_what_a_constant_added_to_every_reward_does(script, same):
    """Without a baseline it is another update; with one it is the same."""
    before, after = (weights(climb(script, make(1, reward_offset=x))) for x in (0.0, 1.0))
    assert torch.allclose(before, after, atol=2e-5) == same


def loss_by_hand(script, model, groups):
    """The loss of rung 1 to 4 over all completions of a step, one completion after the other."""
    terms, every = [], torch.cat([group.returns for group in groups])
    for group in groups:
        spread = group.returns.std() if len(group.returns) > 1 else 0.0
        compared = (group.returns - group.returns.mean()) / (spread + 1e-4)
        for e, reward, advantage in zip(group.experiences, group.returns, compared, strict=True):
            batch = pad_batch([e])
            sequence = batch.sequences, batch.attention_mask, batch.num_actions
            with torch.no_grad():
                log_probs = task.sequences_log_probs(model, *sequence)[0][0][: e.num_actions]
            ratio = (log_probs - e.sampler_log_probs).exp()
            smaller = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            terms.append(
                {
                    "1_reinforce": reward * log_probs.sum(),
                    "2_baseline": (reward - every.mean()) * log_probs.sum(),
                    "3_group": advantage * log_probs.mean(),
                    "4_clip": smaller.mean(),
                }[script]
            )
    return -torch.stack(terms).mean().item()


@pytest.mark.parametrize("script", SCRIPTS[:4])
def test_the_loss_of_a_rung_is_what_it_says(script):
    """Sign, mask, division and baseline; on rung 4 also in its second update, where no ratio is 1."""
    made, rung, seen, losses = make(1), ladder.load(script), [], []

    def score(*arguments):
        seen.append(train.score(*arguments))
        return seen[-1]

    def update(loss):
        losses.append((loss.item(), loss_by_hand(script, made.model, seen[-1])))
        task.Task.update(made, loss)

    made.update = update
    with (
        mock.patch.object(rung, "score", score),
        mock.patch.object(rung, "PASSES", 2, create=True),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        rung.train(made)
    assert len(losses) == (2 if script == "4_clip" else 1)
    for loss, expected in losses:
        assert loss == pytest.approx(expected, abs=1e-5)
    assert abs(losses[-1][1]) > 1e-4


def test_what_a_rung_writes_out_is_what_the_five_files_compute():
    torch.manual_seed(0)
    returns = torch.rand(3, 8).round()
    mean, std = returns.mean(dim=1, keepdim=True), returns.std(dim=1, keepdim=True)
    assert torch.allclose((returns - mean) / (std + 1e-4), group_advantages(returns), atol=1e-6)

    old, now = -2 * torch.rand(8, 5), -2 * torch.rand(8, 5)
    made = make(1)
    groups = train.rollout(made.model, made.tokenizer, made.questions.take(8), 8, made.sampling)
    batch = pad_batch([e for group in groups for e in group.experiences])
    batch = dataclasses.replace(batch, advantages=torch.randn(8))
    clip, kl = ladder.load("4_clip"), ladder.load("5_kl")
    ours = GRPOLoss(clip_eps=0.2).policy_term(now, old, batch)
    assert torch.allclose(clip.policy_term(now, old, batch.advantages[:, None]), ours)
    assert torch.allclose(kl.kl(now, old), approx_kl_divergence(now, old), atol=1e-6)


def test_the_highest_rung_is_the_trainer(tmp_path, few_questions):
    """The same questions, samples and mini-batches: the losses of a step and the weights after it are train.py's."""
    flags = [
        "--kl_weight=0.01",
        "--rollouts_per_step=2",
        "--train_batch_size=16",
        "--epochs_per_step=4",
    ]
    trainer = build(
        tmp_path, few_questions, *flags, "--micro_batch_size=16", "--lr=1e-4", "--seed=1"
    )
    made, losses = make(1), []
    made.questions = Few(QuestionStream(trainer.questions.questions, 1))
    made.update = lambda loss: (losses.append(loss.item()), task.Task.update(made, loss))
    start = weights(made)
    one_step(trainer)
    rung = ladder.load("5_kl")
    with mock.patch.object(rung, "PASSES", 4), contextlib.redirect_stdout(io.StringIO()):
        rung.train(made)
    total, count = trainer.monitor.sums["train/loss"]
    assert len(losses) == 4 and max(map(abs, losses)) > 1e-3
    assert sum(losses) / 4 == pytest.approx(float(total) / count, abs=1e-5)
    theirs = torch.cat([p.detach().flatten() for p in trainer.policy.model.parameters()])
    assert (theirs - weights(made)).norm() < 0.02 * (theirs - start).norm()


# ----------------------------------------------------------------------------------- the sabotages

PATCHES = {name: run.patches for name, run in break_it.RUNS.items() if run.patches}


def test_there_are_ten_sabotages_and_their_flags_are_real():
    assert len(break_it.SABOTAGES) == 10
    for run in break_it.RUNS.values():
        parse_config(f"{break_it.COMMON} {break_it.QUIET} {run.flags}".split())
        assert run.beside in break_it.RUNS


@pytest.mark.parametrize("name", PATCHES)
def test_a_fault_in_the_code_does_something(name, tmp_path, few_questions):
    """A step with it is another one, and without it afterwards the same as before."""

    def step():
        trainer = build(tmp_path, few_questions, *break_it.RUNS[name].flags.split())
        one_step(trainer)
        total, count = trainer.monitor.sums["train/grad_norm"]
        gap, tokens = trainer.monitor.sums["train/sampler_gap"]
        return round(float(total) / count, 5), float(gap) / float(tokens)

    right = step()
    with contextlib.ExitStack() as faults:
        for patch in PATCHES[name]:
            faults.enter_context(patch.applied())
        faulty = step()
    assert abs(faulty[0] - right[0]) > 1e-3 and step() == right
    assert (faulty[1] > 0.01) == (name == "temperature") and right[1] < 1e-5


def test_the_check_before_a_run_finds_the_temperature(tmp_path, few_questions):
    with pytest.raises(SystemExit) as ended:
        break_it.run(
            "temperature", [f"--dataset={few_questions}", f"--run_dir={tmp_path}/run"], checked=True
        )
    assert ended.value.code == 2 and not (tmp_path / "run").exists()


def test_a_patch_whose_target_is_gone_fails():
    for target in ("loss.py:GRPOLoss.gone", "loss.py:Gone.forward", "gone.py:forward"):
        with (
            pytest.raises((AttributeError, ModuleNotFoundError)),
            break_it.Patch(target, lambda right: right).applied(),
        ):
            pass


@pytest.mark.parametrize("module", [break_it, ladder])
def test_a_wrong_name_is_one_sentence(module, capsys, tmp_path):
    for argv in (["--only", "nothing"], ["--report", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit) as ended:
            module.main(argv)
        assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_run_that_ends_with_an_error_says_so():
    with pytest.raises(UserError, match="^lr: --seed is -1"):
        break_it.curve_of(("lr", -1))


@pytest.mark.parametrize(("module", "run"), [(break_it, "lr"), (ladder, "3 group")])
def test_a_folder_that_cannot_be_is_one_sentence(module, run, capsys, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        module.main(["--only", run, "--out", str(tmp_path / "file")])
    assert ended.value.code == 2 and "cannot be a folder" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- the pages

PAIRS = [
    (ROOT / "docs" / "break_it.en.md", ROOT / "docs" / "break_it.zh.md"),
    (ROOT / "docs" / "is_this_normal.en.md", ROOT / "docs" / "is_this_normal.zh.md"),
    (ROOT / "docs" / "ladder" / "README.md", ROOT / "docs" / "ladder" / "README.zh.md"),
]
PAGES = [page for pair in PAIRS for page in pair]
# Decimals, and whole numbers of two digits or more; 80 万 is 800,000.
NUMBER = re.compile(r"(?<![\w.,])(?:\d+\.\d+|\d\d+)(?!\w|[.,]\d| 万)", re.A)
HEADING = re.compile(r"(?:<a id=\"([\w-]+)\"></a>\n)?^(#+) ", re.M)


def name(page):
    return page.name


def sections(page):
    """Of each section: anchor, level, numbers; and the code of the page."""
    text = page.read_text(encoding="utf-8")
    code = re.sub(r"#.*", "", "".join(re.findall(r"^```\w+\n(.*?)^```", text, re.M | re.S)))
    places = [*HEADING.finditer(text)]
    parts = [
        text[a.start() : b]
        for a, b in zip(places, [*(p.start() for p in places[1:]), len(text)], strict=True)
    ]
    return [
        (p[1], p[2], Counter(NUMBER.findall(part))) for p, part in zip(places, parts, strict=True)
    ], code


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].name)
def test_both_languages_have_the_same_headings_anchors_numbers_and_code(pair):
    (english, code), (chinese, code_zh) = map(sections, pair)
    assert [s[:2] for s in english] == [s[:2] for s in chinese] and code == code_zh
    for ours, theirs in zip(english, chinese, strict=True):
        assert ours == theirs, (
            f"other numbers under {ours[0]}: {(ours[2] - theirs[2]) + (theirs[2] - ours[2])}"
        )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_an_anchor_in_it(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        place = (page.parent / file) if file else page
        assert place.exists(), target
        assert not anchor or f'<a id="{anchor}"></a>' in place.read_text(encoding="utf-8"), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_in_a_page_prints_what_stands_beside_it(page):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        if "print(" in code:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(code, {})
            assert said.getvalue().splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, re.M)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_a_page_are_real(page):
    """Files that are there, options of Config, sabotages that have that name."""
    text = page.read_text(encoding="utf-8")
    options = {field.name for field in dataclasses.fields(Config)} | {"resume"}
    for file, words in re.findall(r"python ([\w/]+\.py)([^`#\n]*)", text):
        assert (ROOT / file).exists(), file
        if file == "train.py":
            assert set(re.findall(r"--(\w+)", words)) <= options, words
        if file == "benchmarks/break_it.py" and words.split():
            assert words.split()[0] in {*break_it.RUNS, "--report", "--out"}, words


@pytest.mark.parametrize("page", PAGES[4:], ids=name)
def test_what_a_page_shows_of_a_rung_stands_there(page):
    """Each line of a code block is a line of some script of the ladder."""
    lines = {
        line.strip()
        for script in SCRIPTS
        for line in (ladder.LADDER / f"{script}.py").read_text().splitlines()
    }
    shown = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(shown) == 5
    for line in "".join(shown).splitlines():
        assert line.strip() in lines, line


# Figures of is_this_normal that stand in no page that their section links to: 1e-8 in another writing, an example.
UNLINKED = {
    "loss-zero": {"0.00000003"},
    "sampler-gap": {"0.0000001", "0.00000025"},
    "own-reward": {"0.5"},
}


def test_each_figure_stands_in_a_page_that_its_section_links_to():
    page = PAGES[2]
    parts = re.split(r'<a id="([\w-]+)"></a>\n', page.read_text(encoding="utf-8"))
    for anchor, section in zip(parts[1::2], parts[2::2], strict=True):
        code = "".join(re.findall(r"^```.*?^```", section, re.M | re.S))
        places = re.findall(r"\]\((?!https?:|#)([^)#]+)", section)
        known = code + "".join(
            (page.parent / place).read_text(encoding="utf-8") for place in places
        )
        prose = re.sub(r"^(```.*?^```|\| 0\..*?$)", "", section, flags=re.M | re.S)
        for figure in set(re.findall(r"(?<![\w.-])\d+\.\d+(?!\w)", prose, re.A)):
            assert figure in known or figure in UNLINKED.get(anchor, ()), (anchor, figure)


def test_the_table_of_group_sizes_is_its_formula():
    rows = re.findall(r"^\| (0\.\d+) \|(.*)\|$", PAGES[2].read_text(encoding="utf-8"), re.M)
    assert len(rows) == 3
    for p, cells in rows:
        for size, cell in zip((2, 4, 8, 16), cells.split("|"), strict=True):
            assert float(cell) == pytest.approx(float(p) ** size + (1 - float(p)) ** size, abs=5e-4)


# What a lesson says that is not in its curves: limits of alarms and checks, runs with more steps, arithmetic.
ELSEWHERE = {
    "mask": {"0.98"}, "short": {"0.9", "0.10"}, "bf16": {"0.008"}, "group-size": {"0.71", "0.02"}, "no-clip": {"0.47", "0.04"},
    "temperature": {"0.95", "0.085", "0.001", "0.002", "0.01", "0.02", "0.3", "0.5", "0.0000001"},
}  # fmt: skip


def figures_of(curve):
    """What a lesson may quote of a run: each evaluation; and of other metrics a few places.

    Those are steps 1 and 2, the last step, the mean of the last four, the lowest and the highest.
    """
    found = [row["eval/accuracy"] for row in curve if "eval/accuracy" in row]
    steps = [row for row in curve if row["step"]]
    for metric in steps[0].keys() - {"step", "alarms", "time/step"}:
        values = [row[metric] for row in steps if metric in row]
        found += [*values[:2], values[-1], min(values), max(values), sum(values[-4:]) / 4]
    return {f"{abs(v):.{digits}f}" for v in found for digits in (1, 2, 3, 4)}


@pytest.mark.parametrize("page", PAGES[:2], ids=name)
def test_what_a_lesson_says_is_in_the_curves(page):
    """Each decimal number of a lesson is a value of its run or of the one beside it; each alarm's first step is told."""
    curves = {run["name"]: run["curve"] for run in read_jsonl(ROOT / "results" / "break_it.jsonl")}
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    lessons = re.split(r'<a id="([\w-]+)"></a>\n', text)
    lessons = dict(zip(lessons[1::2], lessons[2::2], strict=True))
    for sabotage in break_it.SABOTAGES:
        anchor = sabotage.replace("_", "-")
        lesson, runs = lessons[anchor], {sabotage, break_it.RUNS[sabotage].beside, "healthy"}
        known = set().union(*(figures_of(curves[run]) for run in runs))
        said = set(re.findall(r"(?<![\w-])\d+\.\d+(?!\w)", lesson, re.A))
        assert said <= known | ELSEWHERE.get(anchor, set()), (anchor, said - known)
        for alarm, step in break_it.first_alarms(curves[sabotage]).items():
            assert f"`{alarm}`" in lesson and re.search(rf"(?<!\d){step}(?!\d)", lesson), (
                anchor,
                alarm,
            )
