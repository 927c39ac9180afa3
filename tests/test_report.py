"""report.py and what a run keeps for it: the numbers of the update, in a bounded file, on a page in which no completion can run."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import steps
import torch

import report
from loss import KL_LIMIT
from objectives import participation
from objectives import report as report_objectives
from objectives.equations import build_loss
from objectives.table import CHOICES, OBJECTIVES
from replay_buffer import pad_batch
from support import recording_file
from support.alarms import ALARMS
from support.recording import Recording
from support.recording_file import FILE, RecordingFile, read_rows, token_texts
from support.report_data import BANDS, PLACES, SURROGATES, find_place
from support.report_page import PAGE

SMALL = [
    "--rollouts_per_step=4", "--group_size=4", "--train_batch_size=8", "--micro_batch_size=3", "--max_new_tokens=24",
    "--lr=1e-3", "--log_completions=6",
]  # fmt: skip
METHODS = {
    "grpo, two epochs": ["--kl_weight=0.1", "--epochs_per_step=2"],
    "on-policy, no KL": ["--train_batch_size=16", "--kl_weight=0"],
    "dapo": ["--objective=dapo", "--clip_eps=0.001", "--clip_eps_high=0.002", "--mask_truncated=false", "--dynamic_sampling=1"],
    "gspo": ["--objective=gspo", "--epochs_per_step=2"],
    "exact KL, correction": ["--kl_weight=0.1", "--kl_estimator=full", "--sampler_correction=token_truncate"],
    "entropy": ["--top_entropy=0.5", "--entropy_weight=0.1", "--kl_weight=0.1", "--kl_estimator=k2"],
}  # fmt: skip


def rows_of(folder, kind="groups"):
    return [row for row in read_rows(folder / FILE)[0] if kind in row]


def listen(trainer):
    """What the loss is called with, and the gradients that it gives, by a wrapper of its forward."""
    calls, forward = [], trainer.loss.forward

    def wrapper(log_probs, batch, *others):
        log_probs.retain_grad()
        calls.append((log_probs, batch, others))
        return forward(log_probs, batch, *others)

    trainer.loss.forward = wrapper
    return calls


def find(calls, found, tokens):
    """The calls' numbers of a completion: (log π, π_old, gradient, weight) at each of its tokens."""
    for log_probs, batch, (weights, *_) in calls:
        for i, mask in enumerate(batch.action_mask):
            own = batch.sequences[i, -batch.num_actions :][mask].tolist()
            if own == tokens and abs(float(batch.advantages[i]) - found["advantage"]) < 1e-6:
                old = batch.action_log_probs
                old = None if old is None else old[i][mask]
                yield log_probs[i][mask].detach(), old, log_probs.grad[i][mask], float(weights[i])


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_are_those_of_the_update(tmp_path, few_questions, method):
    """Each recorded number beside what the real loss was given, and the gradient that its backward pass gave."""
    trainer = steps.build(tmp_path, few_questions, *SMALL, *METHODS[method])
    calls = listen(trainer)
    groups = steps.sample(trainer)
    for i, group in enumerate(groups):  # some spread in each
        group.returns[:] = torch.tensor([0.0, 1.0, 0.5, float(i)])
    recording = trainer.monitor.recording = Recording(trainer)
    recording.open(tmp_path, 0)
    steps.one_step(trainer, groups)
    recording.write(1)
    (row,) = rows_of(tmp_path)
    assert len(row["groups"]) == row["all"] == 4
    updates = 0
    for found in row["completions"]:
        group, i = row["groups"][found["group"]], found["index"]
        completion = groups[found["group"]].completions[i]
        assert "".join(found["tokens"]) == trainer.tokenizer.decode(completion.ids)
        found["advantage"] = group["advantages"][i]
        real = list(find(calls, found, completion.ids))
        for numbers in found.get("updates", []):
            updates += 1
            (now, old, gradient, weight), *_ = [
                each for each in real if close(each[0], numbers["log_probs"])
                and close(each[2], numbers["gradient"])
            ]  # fmt: skip
            assert numbers["weight"] == pytest.approx(weight, rel=1e-6)
            assert ("old" in numbers) == (old is not None)
            assert old is None or close(old, numbers["old"])
            parts = weight * torch.tensor(numbers["policy_gradient"])
            if not trainer.loss.kl_weight:
                assert torch.allclose(parts, gradient, atol=1e-8), "all of it is the policy term's"
            clipped = [t for t, g in enumerate(numbers["policy_gradient"]) if g == 0]
            if found["advantage"]:
                assert clipped == sorted(numbers["clipped"] + numbers["masked"])
    assert updates >= len(row["completions"])


def close(real, written):
    return len(real) == len(written) and torch.allclose(real, torch.tensor(written), rtol=1e-6)


def test_the_parts_of_the_gradient_add_up(tmp_path, few_questions):
    """w (∂ policy term + β ∂ k3) is what autograd gave, token by token."""
    flags = [*SMALL, "--kl_weight=0.3", "--epochs_per_step=2"]
    trainer = steps.build(tmp_path, few_questions, *flags)
    groups = steps.sample(trainer)
    groups[0].returns[:] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    recording = trainer.monitor.recording = Recording(trainer)
    recording.open(tmp_path, 0)
    steps.one_step(trainer, groups)
    recording.write(1)
    seen = [u for c in rows_of(tmp_path)[0]["completions"] for u in c["updates"]]
    assert {u["update"] for u in seen} >= {1, 2}
    for each in seen:
        now, ref, policy = (
            torch.tensor(each[n]) for n in ("log_probs", "reference", "policy_gradient")
        )
        kl = torch.tensor(each["kl"])
        slope = torch.where(kl < KL_LIMIT, 1 - (ref - now).exp(), 0.0)
        whole = each["weight"] * (policy + 0.3 * slope)
        assert torch.allclose(whole, torch.tensor(each["gradient"]), atol=1e-7)
        k3 = ((ref - now).exp() - (ref - now) - 1).clamp(max=KL_LIMIT)
        assert torch.allclose(kl, k3, atol=1e-6)


def test_a_micro_batch_that_did_not_fit_the_memory(tmp_path, few_questions):
    """It comes again in smaller ones, and is recorded once."""
    found = []
    for fails in (False, True):
        folder = tmp_path / str(fails)
        trainer = steps.build(folder, few_questions, *SMALL, "--kl_weight=0.1")
        recording = trainer.monitor.recording = Recording(trainer)
        recording.open(folder, 0)
        calls, forward = [], trainer.loss.forward

        def wrapper(*arguments, calls=calls, forward=forward, fails=fails):
            calls.append(1)
            if fails and len(calls) == 2:
                raise torch.cuda.OutOfMemoryError
            return forward(*arguments)

        trainer.loss.forward = wrapper
        steps.one_step(trainer)
        recording.write(1)
        found.append(rows_of(folder)[0]["completions"])
        assert trainer.micro_batch.size == (2 if fails else 3)
    for one, other in zip(*found, strict=True):
        assert len(one["updates"]) == len(other["updates"])
        for a, b in zip(one["updates"], other["updates"], strict=True):
            assert a["gradient"] == pytest.approx(b["gradient"], rel=1e-2, abs=1e-5)


def test_a_run_is_recorded_and_resumed(tiny_run):
    """Steps and evaluations; after a resume the same lines, and no doubled ones. Without samples no file."""
    flags = ["--kl_weight=0.01", "--log_completions=2"]
    whole = tiny_run("whole", *flags)
    assert [row["step"] for row in rows_of(whole)] == [1, 2, 3, 4]
    assert [row["step"] for row in rows_of(whole, "answers")] == [0, 2, 4]
    assert all(len(row["answers"]) == 2 for row in rows_of(whole, "answers"))
    begun = tiny_run("begun", *flags, "--steps=2")
    with (begun / FILE).open("a") as file:  # what a killed run had written after its checkpoint
        file.write('{"step":3,"every":1,"groups":[]}\n{"step":4,"ev')
    tiny_run("begun", "--resume", "--steps=4")
    assert (begun / FILE).read_text() == (whole / FILE).read_text()
    assert not (tiny_run("none", "--log_completions=0", "--steps=1") / FILE).exists()


def test_recording_changes_nothing(tiny_run):
    """The same metrics, to the last bit, with and without it."""
    from conftest import metrics

    flags = ["--steps=2", "--eval_interval=0", "--kl_weight=0.01"]
    assert metrics(tiny_run("with", *flags)) == metrics(
        tiny_run("no", *flags, "--log_completions=0")
    )


def test_the_file_stays_small_and_keeps_the_first_step_and_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(recording_file, "LIMIT", 5000)
    file = RecordingFile(tmp_path, steps=1000, eval_interval=10)
    for step in range(1, 1001):
        content = {"groups": ["x" * 50], "all": 1, "completions": [], "objective": {}}
        file.append("groups", step, content)
        if step % 10 == 0:
            file.append("answers", step, {"answers": ["x" * 50]})
    assert file.path.stat().st_size <= 5000
    found = [row["step"] for row in rows_of(tmp_path)]
    assert found[0] == 1 and found[-1] == 1000 and len(found) > 15
    assert {b - a for a, b in zip(found, found[1:-1], strict=False)} == {file.every}
    assert rows_of(tmp_path, "answers")[-1]["step"] == 1000
    again = RecordingFile(tmp_path, start_step=500, steps=1000, eval_interval=10)
    assert again.every == file.every and max(row["step"] for row in rows_of(tmp_path)) <= 500


def test_tokens_are_shown_as_they_join(tokenizer):
    """Also where a character is several tokens, and where a tokenizer drops the space at a beginning."""

    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode(errors="replace").removeprefix(" ")

    text = " é 中 ok 😀"
    found = token_texts(Bytes(), list(text.encode()))
    assert "".join(found) == text.strip() and "中" in found and "😀" in found
    assert token_texts(Bytes(), [0xE4, 0xB8])[-1] == "�", "half a character at the end"
    ids = tokenizer("Tom has 25 apples. <answer>18</answer>")["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


# ------------------------------------------------------------------------------------ the page

HOSTILE = "</script><script>alert(1)</script><!-- {{data}} \u2028 \u202e \x00 <img src=x onerror=alert(1)> \ud800 &lt;"
KEYS = {
    "old": [-1.0],
    "log_probs": [-0.5],
    "entropies": [0.1],
    "policy_gradient": [-1.0],
    "gradient": [-0.5],
    "kl": [0.0],
}


def folder_of(tmp_path, text="a", steps=(1, 2)):
    """A run's folder by hand: two steps of a group of two, one of them with the tokens `text`, and an evaluation."""
    run = tmp_path / "run"
    run.mkdir()
    rows = [
        {
            "step": s,
            "rollout/returns": 0.5,
            "train/kl_divergence": 0.2,
            "alarm/kl": 1.0,
            "other": 1.0,
        }
        for s in steps
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text("preset: tiny\nrun_dir: /somewhere/private\n")
    file = RecordingFile(run)
    update = {"update": 1, "weight": 0.5, "clipped": [], "masked": [], **KEYS}
    group = {
        "group": 0,
        "question": text,
        "reference": text,
        "all": 2,
        "returns": [1.0, None],
        "advantages": [0.7, -0.7],
        "lengths": [1, 1],
    }
    completion = {
        "group": 0,
        "index": 0,
        "opened": "",
        "truncated": False,
        "right": True,
        "copies": 1,
        "tokens": [text],
        "updates": [update],
    }
    for step in steps:
        content = {
            "objective": {"kl_weight": 0.1},
            "groups": [group],
            "all": 1,
            "completions": [completion],
        }
        file.append("groups", step, content)
    answer = {
        "question": text,
        "reference": text,
        "text": text,
        "opened": "",
        "truncated": False,
        "right": False,
        "length": 3,
    }
    file.append("answers", steps[-1], {"answers": [answer]})
    return run


class Elements(HTMLParser):
    """The elements of a page with their attributes, and what stands in its scripts and styles."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self.inside = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.inside += [(tag, "")] if tag in ("script", "style") else []

    def handle_endtag(self, tag):
        self.lasttag = ""

    def handle_data(self, data):
        if self.lasttag in ("script", "style"):
            self.inside[-1] = (self.inside[-1][0], self.inside[-1][1] + data)


def page_of(*arguments):
    report.main([*map(str, arguments)])


def data_of(page):
    (found,) = [
        text for tag, text in Elements(page).inside if tag == "script" and text.startswith("{")
    ]
    return json.loads(found)


def test_hostile_completions_are_text(tmp_path):
    """The page has the elements of its template, no more; its data are what was recorded; its policy allows its own script alone."""
    run = folder_of(tmp_path, HOSTILE)
    page_of(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    plain = Elements((PAGE / "page.html").read_text(encoding="utf-8"))
    elements = Elements(page)
    assert [tag for tag, _ in elements.found] == [tag for tag, _ in plain.found]
    assert not [
        name
        for _, attributes in elements.found
        for name in attributes
        if name.startswith("on") or name in ("src", "style")
    ]
    data = data_of(page)
    shown = HOSTILE.replace("\ud800", "?")
    assert data["runs"][0]["steps"][0]["completions"][0]["tokens"] == [shown]
    assert data["runs"][0]["answers"][0]["answers"][0]["text"] == shown
    policy = next(a["content"] for _, a in elements.found if a.get("http-equiv"))
    assert (
        policy.startswith("default-src 'none'; ")
        and "unsafe" not in policy
        and "http" not in policy
    )
    for tag, text in elements.inside:
        if not text.startswith("{"):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "/somewhere/private" not in page


def test_the_script_cannot_make_elements_of_texts():
    """Nothing in it parses a text as HTML or as code, or loads anything."""
    script = "".join((PAGE / n).read_text(encoding="utf-8") for n in ("words.js", "page.js"))
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
        "fetch(",
        "setTimeout",
        "import(",
        "srcdoc",
        "</",
        "<!--",
        ".src",
        ".href",
    ):
        assert word not in script, word
    assert "http" not in script.replace("http://www.w3.org/2000/svg", "")


def test_both_languages_have_the_same_words():
    """And each word that script and template ask for is there."""
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    all_words = (PAGE / "words.js").read_text(encoding="utf-8")
    template = (PAGE / "page.html").read_text(encoding="utf-8")
    english, chinese = all_words.split("\nen: {")[1].split("\nzh: {")
    word = re.compile(r'[{,]\s*(\w+): (?=["`(\w{\[])')
    words, same = (set(word.findall("{" + part.split("\n},")[0])) for part in (english, chinese))
    assert len(words) > 80 and words == same
    used = set(re.findall(r'\bt\("(\w+)"', script))
    used |= set(re.findall(r'data-(?:word|label)="(\w+)"', template))
    assert used <= words, used - words
    advice, meanings = all_words.split("\nalarms: {")[1].split("\nmeanings: {")
    assert re.findall(r"^  (\w+):", advice, re.M) == list(ALARMS)
    assert re.findall(r'^  "([\w/]+)":', meanings, re.M) == list(BANDS)


def test_a_run_without_a_recording(tmp_path, capsys):
    run = folder_of(tmp_path)
    (run / FILE).unlink()
    page_of(run)
    (found,) = data_of((run / "report.html").read_text(encoding="utf-8"))["runs"]
    assert found["steps"] == found["answers"] == [] and len(found["metrics"]) == 2
    assert "run: 0 steps with tokens" in capsys.readouterr().out


def test_a_damaged_recording(tmp_path, capsys):
    """What can be read is shown, and the rest is counted."""
    run = folder_of(tmp_path)
    with (run / FILE).open("ab") as file:
        file.write(b'{"step":3,"every":1,"groups":[]}\n\xff\xfe\n{"step":4,"ev')
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"step": 3, "rollout/returns": NaN}\n{"step": 4, "roll')
    page_of(run, "--lang", "zh")
    data = data_of((run / "report.html").read_text(encoding="utf-8"))
    assert data["lang"] == "zh" and [row["step"] for row in data["runs"][0]["steps"]] == [1, 2]
    assert data["runs"][0]["metrics"][-1] == {"step": 3, "rollout/returns": None}
    said = f"1 line of metrics.jsonl cannot be read; 3 lines of {FILE} cannot be read"
    assert said in capsys.readouterr().out and data["runs"][0]["note"] == said


def test_two_runs_and_a_picture(tmp_path):
    run = folder_of(tmp_path)
    shutil.copytree(run, tmp_path / "other")
    page_of(
        run,
        tmp_path / "other",
        "--output",
        tmp_path / "new" / "both.html",
        "--png",
        tmp_path / "a.png",
    )
    data = data_of((tmp_path / "new" / "both.html").read_text(encoding="utf-8"))
    assert [each["name"] for each in data["runs"]] == ["run", "other"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.partial"))


def test_the_page_of_a_real_run(tiny_run):
    """All of it, from the run to the page; each row has what the script reads."""
    run = tiny_run("run", "--kl_weight=0.01", "--steps=2")
    page_of(run)
    (found,) = data_of((run / "report.html").read_text(encoding="utf-8"))["runs"]
    assert [row["step"] for row in found["steps"]] == [1, 2] and found["steps"][0]["paper"]
    first = found["steps"][0]
    assert {"group", "question", "reference", "all", "returns", "advantages", "lengths"} <= first[
        "groups"
    ][0].keys()
    updates = [u for c in first["completions"] for u in c["updates"]]
    assert updates and {"weight", "clipped", "masked", *KEYS} <= updates[0].keys()
    assert found["settings"]["group_size"] == 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["{d}/nothing"], "is no folder; give the folder of a run"),
        (["{d}"], "holds no run: it has no metrics.jsonl"),
        (["{d}/run/checkpoint-2"], "its run is"),
        (["{d}/run", "{d}/run", "{d}/run"], "compares two at the most"),
        (["{d}/run", "--lang", "fr"], "invalid choice: 'fr'"),
        (["{d}/run", "--outptu", "x"], "Unrecognized arguments: --outptu x."),
        (["{d}/run", "--output", "{d}/run/metrics.jsonl/x.html"], "Cannot write"),
        (["{d}/run", "--output", "{d}/run"], "Cannot write"),
        (["{d}/run", "--objectives"], "--objectives shows a rollout of its own; leave out RUN"),
        (["--objectives", "--png", "{d}/x.png"], "leave out RUN and --png"),
        ([], "There is no run in runs/"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, monkeypatch, arguments, words):
    run = folder_of(tmp_path)
    (run / "checkpoint-2").mkdir()
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as ended:
        page_of(*(each.format(d=tmp_path) for each in arguments))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert words in error
    assert before.keys() == {*tmp_path.rglob("*")}, "nothing is left behind"


def test_lines_and_bands_are_those_of_the_code():
    """Each place is found; each band's limit is the one of the alarm of that metric."""
    for where in PLACES.values():
        file, number, text = find_place(*where)
        assert text.startswith(where[2]) and number > 1
    assert {*SURROGATES} == {*CHOICES["surrogate"]}
    for name, band in BANDS.items():
        if band:
            when = next(a.when for a in ALARMS.values() if a.metric == name)
            assert all(f"{limit:g}" in when for limit in band if limit)


# ----------------------------------------------------------------- one rollout under all objectives


def whole_batch(objective):
    """The frozen rollout in one micro-batch, as train.py's update makes it: gradients by place."""
    saved, groups, experiences, now = report_objectives.frozen()
    loss = build_loss(objective)
    places = participation.trained_completions(groups, objective.mask_truncated)
    advantages, _ = report_objectives.under(objective)
    items = [replace(experiences[i], advantages=advantages.flatten()[i]) for i in places]
    weights = loss.token_weights([e.num_actions for e in items], saved["max_new_tokens"])
    batch = pad_batch(items)
    log_probs = torch.full(batch.action_mask.shape, -1.0)
    for row, i in enumerate(places):
        log_probs[row, : len(now[i][0])] = now[i][0]
    log_probs.requires_grad_()
    loss(log_probs, batch, weights, batch.entropies)[0].backward()
    return {i: log_probs.grad[row, : len(now[i][0])] for row, i in enumerate(places)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_each_objective_does_is_what_its_loss_does(name):
    """The gradients on the page are those of the whole batch; what is left out has none."""
    objective = OBJECTIVES[name]
    advantages, found = report_objectives.under(objective)
    expected = whole_batch(objective)
    assert found and found.keys() <= expected.keys()
    for i, gradient in expected.items():
        own = found[i]["gradient"] if i in found else [0.0] * len(gradient)
        assert torch.allclose(torch.tensor(own), gradient, atol=1e-7, rtol=1e-4), (name, i)
    assert sum(map(float, [g.abs().sum() for g in expected.values()])) > 1e-3


def test_the_frozen_rollout_tells_objectives_apart():
    """Its ratios are far from 1, some completions were cut off, and one group is all equal."""
    _, groups, experiences, now = report_objectives.frozen()
    ratios = torch.cat(
        [(n - e.action_log_probs).exp() for (n, _), e in zip(now, experiences, strict=True)]
    )
    assert (ratios > 1.28).any() and (ratios < 0.8).any()
    assert any(c.truncated for g in groups for c in g.completions)
    rewards = [tuple(group.rewards[0].tolist()) for group in groups]
    assert any(len(set(row)) == 1 for row in rewards) and any(sum(row) == 1 for row in rewards)
    pushes = {}
    for name, objective in OBJECTIVES.items():
        _, found = report_objectives.under(objective)
        pushes[name] = {
            i: [f"{g:.4g}" for g in numbers["gradient"]] for i, numbers in found.items()
        }
    # The same update while all tokens of a sequence have one advantage, docs/objectives.md.
    assert pushes.pop("gspo") == pushes["gspo_token"]
    different = {json.dumps(rows) for rows in pushes.values()}
    assert len(different) == len(pushes), "no two rows are the same picture"


def test_the_page_of_objectives(tmp_path, capsys):
    page_of("--objectives", "--output", tmp_path / "all.html", "--lang", "zh")
    data = data_of((tmp_path / "all.html").read_text(encoding="utf-8"))
    (found,) = data["runs"]
    assert [row["name"] for row in found["steps"]] == list(OBJECTIVES)
    assert [row["paper"] for row in found["steps"]] == [name == "grpo" for name in OBJECTIVES]
    assert set(data["kl"]["curves"]) == {"k1", "abs", "k2", "k3"} and data["kl"]["tokens"]
    k2 = data["kl"]["curves"]["k2"]
    assert k2["gradient"] == pytest.approx(data["kl"]["d"], abs=1e-3), "the gradient of d²/2 is d"
    assert "17 objectives" in capsys.readouterr().out
