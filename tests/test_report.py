"""report.py and what a run keeps for it: the numbers of the update, in a bounded file, on a page in which no completion can run."""

import pytest
import steps
import torch

from support import recording_file
from support.recording import Recording
from support.recording_file import FILE, RecordingFile, read_rows, token_texts

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
        whole = each["weight"] * (policy + 0.3 * (1 - (ref - now).exp()))
        assert torch.allclose(whole, torch.tensor(each["gradient"]), atol=1e-7)
        assert torch.allclose(
            torch.tensor(each["kl"]), (ref - now).exp() - (ref - now) - 1, atol=1e-6
        )


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
        file.append("groups", step, {"groups": ["x" * 50]})
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
