"""train.py end to end: it equals itself, it resumes, it survives bad numbers, it learns."""

import importlib
import signal
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import metrics
from steps import build, copy_of, fill, forked, learn, one_step, sample, shared_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from objectives import equations
from replay_buffer import pad_batch
from support import checkpoint, monitor, schedule
from support.command_line import parse_config
from support.config import Config
from support.errors import UserError
from support.memory import MicroBatch
from support.schedule import open_run, say_goodbye, seed_step
from support.shared_prompts import shared_log_probs


def flat_gradient(trainer):
    """The gradients of all parameters, one after the other."""
    return torch.cat([p.grad.clone().flatten() for p in trainer.policy.parameters()])


def gradient(trainer, groups):
    """The gradient of one update with all completions; nothing moves. Give --max_norm=1e9."""
    buffer, found = fill(trainer, groups), []
    trainer.optimizer.step = lambda: found.append(flat_gradient(trainer))
    train.update(trainer, buffer.items)
    (only,) = found
    return only


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
def test_micro_batches_never_change_the_gradient(tmp_path, few_questions, mode):
    """The most reported fault of the field: to average inside each micro-batch."""
    flags = ("--max_norm=1e9", "--kl_weight=0.05", "--epochs_per_step=2")
    trainer = build(tmp_path, few_questions, f"--loss_agg_mode={mode}", *flags)
    groups = sample(trainer)
    full = gradient(trainer, groups)
    assert trainer.micro_batch.size == 24 and full.norm() > 0
    for size in (1, 2, 4, 5):
        trainer.micro_batch.size = size
        part = gradient(trainer, groups)
        assert (part - full).norm() / full.norm() <= 1e-5, size


def test_gradient_checkpointing_never_changes_the_gradient(tmp_path, few_questions):
    plain = build(tmp_path / "a", few_questions, "--max_norm=1e9")
    flags = ("--max_norm=1e9", "--gradient_checkpointing")
    recomputed = build(tmp_path / "b", few_questions, *flags)
    groups = sample(plain)
    expected = gradient(plain, groups)
    assert (gradient(recomputed, groups) - expected).norm() / expected.norm() <= 1e-5


def test_accelerates_environment_never_changes_the_gradient(tmp_path, few_questions, monkeypatch):
    """`accelerate config` may have set it; Accelerator.backward would divide the loss by it."""
    plain = build(tmp_path / "a", few_questions, "--max_norm=1e9")
    groups = sample(plain)
    expected = gradient(plain, groups)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    AcceleratorState._reset_state(reset_partial_state=True)
    other = build(tmp_path / "b", few_questions, "--max_norm=1e9")
    assert expected.norm() > 0 and torch.equal(gradient(other, groups), expected)


def test_ratio_is_one_before_any_update(tmp_path, few_questions):
    """Old and new log-probabilities through different batches agree to rounding, in fp32."""
    flags = ("--train_batch_size=12", "--micro_batch_size=5", "--kl_weight=0.1")
    trainer = build(tmp_path, few_questions, *flags)
    assert trainer.micro_batch.size == 5
    buffer = fill(trainer)
    for e in buffer.items:
        log_probs = trainer.policy(pad_batch([e]))[0][0]
        torch.testing.assert_close(log_probs, e.action_log_probs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(log_probs, e.log_probs_ref, rtol=1e-4, atol=1e-5)


def test_old_log_probs_only_where_they_are_needed(tmp_path, few_questions):
    once = build(tmp_path / "one", few_questions)
    groups = sample(once)
    for e in fill(once, groups).items:
        assert e.action_log_probs is None and e.log_probs_ref is None
    twice = build(tmp_path / "two", few_questions, "--epochs_per_step=2")
    assert all(e.action_log_probs is not None for e in fill(twice, groups).items)


def test_no_reference_without_kl(tmp_path, few_questions):
    """A second copy of the model that nothing reads would only take memory."""
    assert build(tmp_path / "a", few_questions, "--kl_weight=0").reference is None
    reference = build(tmp_path / "b", few_questions, "--kl_weight=0.1").reference
    assert reference is not None and not any(p.requires_grad for p in reference.parameters())


def test_the_end_token_is_trained(tmp_path, few_questions):
    """With `ids == pad` masked, and pad = end, no gradient reaches the decision to stop."""
    trainer = build(tmp_path, few_questions)
    groups = sample(trainer)
    completions = [c for group in groups for c in group.completions]
    ended = [c for c in completions if not c.truncated]
    assert ended and all(c.ids[-1] == trainer.tokenizer.eos_token_id for c in ended)
    batch = pad_batch(fill(trainer, groups).items)
    assert batch.action_mask.sum(-1).tolist() == [len(c.ids) for c in completions]


def test_same_seed_same_metrics_and_another_seed_others(tiny_run):
    a, b = tiny_run("a"), tiny_run("b")
    assert metrics(a) == metrics(b)
    rows = metrics(a)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [("eval/accuracy" in row) for row in rows] == [True, False, True, False, True]
    assert all(isinstance(v, int | float) and abs(v) < 1e9 for row in rows for v in row.values())
    (other,) = metrics(tiny_run("c", "--seed=7", "--steps=1", "--eval_interval=0"))
    assert other["rollout/entropy"] != rows[1]["rollout/entropy"]


def test_resume_holds_the_folder_before_it_looks_for_the_checkpoint(
    tiny_run, tmp_path, monkeypatch
):
    folder = copy_of(shared_run(), tmp_path / "a")
    seen, real = [], checkpoint.lock
    monkeypatch.setattr(checkpoint, "lock", lambda *args: seen.append("lock") or real(*args))
    monkeypatch.setattr(train, "build", lambda *args: seen.append("build") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_run("a", f"--resume={folder}", "--steps=6")
    assert seen == ["lock", "build"]


def test_a_changed_weight_decay_is_used_after_resume():
    folder = shared_run()
    config, _ = parse_config([f"--resume={folder}", "--weight_decay=0.5"])
    trainer = train.build(config, str(folder))
    assert [g["weight_decay"] for g in trainer.optimizer.param_groups] == [0.5]
    assert trainer.start_step == 2


def test_a_changed_entropy_bonus_is_used_after_resume(tiny_run, tmp_path, monkeypatch):
    folder, bonuses, real = copy_of(shared_run(), tmp_path / "a"), [], train.train

    def noted(trainer, steps):
        bonuses.append(trainer.loss.entropy_bonus)
        real(trainer, steps)

    monkeypatch.setattr(train, "train", noted)
    tiny_run("a", f"--resume={folder}", "--steps=3", "--entropy_weight=0.2")
    assert bonuses == [pytest.approx(0.2)] and metrics(folder)[-1]["step"] == 3


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-9",
        "checkpoint-10",
    ]


def copies(trainer):
    """The weights as they are now."""
    return [p.detach().clone() for p in trainer.policy.parameters()]


def unmoved(trainer, before):
    """Whether every weight is what it was, bit for bit."""
    now = trainer.policy.parameters()
    return all(torch.equal(p, q) for p, q in zip(before, now, strict=True))


def test_a_step_with_nothing_to_learn_moves_nothing(tmp_path, few_questions):
    """All rewards equal and no KL: no momentum, no weight decay either, and no loss is claimed."""
    trainer = build(tmp_path, few_questions, "--weight_decay=0.1", "--lr=1e-2")
    before = copies(trainer)
    groups = [replace(g, returns=torch.ones(8)) for g in sample(trainer)]
    assert len(one_step(trainer, groups).items) == 24
    assert unmoved(trainer, before)
    row = trainer.monitor.flush(1, 1)
    assert "train/loss" not in row and row["train/skipped_steps"] == 0


def test_checkpoints_are_hugging_face_folders(tiny_run):
    """The tokenizer is saved too, and everything can be loaded again."""
    flags = ("--keep_checkpoints=1", "--checkpoint_interval=1", "--steps=2", "--eval_interval=0")
    folder = tiny_run("a", *flags)
    assert [p.name for p in checkpoint.checkpoints(folder)] == ["checkpoint-2"]
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-2")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint-2")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tom has 5 apples."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    out = model.generate(
        **tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), max_new_tokens=8
    )
    assert out.shape[0] == 1
    base = AutoModelForCausalLM.from_pretrained("tiny/model", dtype=torch.float32)
    moved = [
        not torch.equal(p, q) for p, q in zip(model.parameters(), base.parameters(), strict=True)
    ]
    assert all(moved), "every weight has been trained"
    assert not list(folder.glob(".checkpoint*")), "nothing half-written stays"


@pytest.mark.parametrize("where", ["loss", "nan", "inf"])
def test_a_bad_number_skips_the_step_and_is_counted(tmp_path, few_questions, where):
    """With a finite loss and a NaN gradient, clipping would spread the NaN into every weight."""
    flags = ("--train_batch_size=12", "--micro_batch_size=12")
    bonus = ("--entropy_weight=0.1", "--entropy_target=9")
    trainer = build(tmp_path, few_questions, *flags, *bonus)
    buffer, before = fill(trainer), copies(trainer)
    if where == "loss":
        infinite = torch.tensor(float("inf"))
        buffer.items = [replace(e, advantages=infinite) for e in buffer.items]
    else:
        next(trainer.policy.parameters()).register_hook(lambda g: g * float(where))
    learn(trainer, buffer)
    assert unmoved(trainer, before)
    assert all(p.grad is None or not p.grad.any() for p in trainer.policy.parameters())
    row = trainer.monitor.flush(1, 1)
    assert row["train/skipped_steps"] == 2 == trainer.skipped and "train/loss" not in row
    assert float(trainer.loss.entropy_weight) == pytest.approx(0.1), "the bonus does not move"


def test_numbers_that_stay_bad_stop_the_run_with_a_checkpoint(
    tiny_run, tmp_path, monkeypatch, capsys
):
    """From step 2 on no loss is finite. With two updates in a step, the fourth one that is skipped
    is in step 3."""
    real, calls = train.add_gradients, []

    def broken(*arguments):
        calls.append(1)
        bad = float("nan") if len(calls) > 2 else 1.0
        return [(share * bad, *others) for share, *others in real(*arguments)]

    monkeypatch.setattr(train, "add_gradients", broken)
    flags = ("--eval_interval=0", "--checkpoint_interval=100", "--kl_weight=0.1")
    with pytest.raises(SystemExit) as caught:
        tiny_run("a", "--max_skipped_steps=4", "--steps=9", *flags)
    said, folder = capsys.readouterr(), tmp_path / "a"
    assert caught.value.code == 2 and "4 optimizer steps in a row had no finite loss" in said.err
    assert "lower --lr" in said.err and f"--resume {folder}" in said.err
    assert "ALARM skipped" in said.out
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3]
    monkeypatch.setattr(train, "add_gradients", real)
    one = tiny_run("b", "--steps=1", "--eval_interval=0", "--kl_weight=0.1")
    weights = [folder / "checkpoint-3", one / "checkpoint-1"]
    first, second = ((path / "model.safetensors").read_bytes() for path in weights)
    assert first == second, "the weights are those from before the bad numbers"
    tiny_run("a", f"--resume={folder}", "--steps=4", "--lr=1e-6")
    assert metrics(folder)[-1]["step"] == 4 and metrics(folder)[-1]["train/skipped_steps"] == 0


def test_skipped_steps_are_counted_over_a_resume(tiny_run, monkeypatch):
    """Bad numbers in the last step before it and in the first one after; and 0 never stops."""
    real, bad = train.add_gradients, torch.tensor(float("nan"))
    monkeypatch.setattr(
        train, "add_gradients", lambda *args: [(bad, *others) for _, *others in real(*args)]
    )
    flags = ("--kl_weight=0.1", "--eval_interval=0")
    folder = tiny_run("a", "--max_skipped_steps=3", "--steps=1", *flags)
    with pytest.raises(SystemExit):
        tiny_run("a", f"--resume={folder}", "--steps=4")
    assert metrics(folder)[-1]["step"] == 2
    rows = metrics(tiny_run("b", "--max_skipped_steps=0", "--steps=3", *flags))
    assert [row["train/skipped_steps"] for row in rows] == [2, 2, 2]


def test_each_step_draws_numbers_of_its_own():
    def draw(seed, step):
        generator = seed_step(seed, step)
        return torch.rand(1).item(), torch.rand(1, generator=generator).item()

    assert draw(1, 1) == draw(1, 1)
    assert len({draw(*pair) for pair in [(1, 1), (1, 2), (2, 1), (0, 3)]}) == 4


def test_warm_up(tiny_run):
    rows = metrics(tiny_run("a", "--warmup_steps=4", "--lr=1e-4", "--eval_interval=0"))
    assert [row["train/lr"] for row in rows] == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4])


def test_every_reward_is_logged_by_name(tmp_path, few_questions):
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, **columns):\n"
        "    return [-len(c) / 100 for c in completions]\n"
    )
    for row in metrics(shared_run()):
        assert {"reward/accuracy_mean", "reward/accuracy_std"} <= row.keys()
    flags = ("--reward", "format", f"{tmp_path}/mine.py:short", "--reward_weights", "1", "2")
    trainer = build(tmp_path, few_questions, *flags)
    sample(trainer)
    row = trainer.monitor.flush(1, 1)
    expected = row["reward/format_mean"] + 2 * row["reward/short_mean"]
    assert row["rollout/returns"] == pytest.approx(expected)


def test_run_folders_are_never_overwritten(tiny_run, tmp_path):
    folder = copy_of(shared_run(), tmp_path / "a")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as caught:
        tiny_run("a")
    assert caught.value.code == 2 and (folder / "metrics.jsonl").read_bytes() == before
    held = checkpoint.lock(folder)
    try:
        with pytest.raises(UserError, match="in use by another process"):
            checkpoint.lock(folder)
        with pytest.raises(SystemExit):
            tiny_run("a", f"--resume={folder}", "--steps=6")
    finally:
        held.release()
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_says_so(tiny_run, tmp_path, capsys):
    folder = copy_of(shared_run(), tmp_path / "a")
    with pytest.raises(SystemExit):
        tiny_run("a", f"--resume={folder}")
    assert "already at step 2 of 2; raise --steps" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(tiny_run, monkeypatch, capsys):
    real = torch.save

    def full(state, path):
        if state["step"] == 2:
            raise OSError(28, "No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as caught:
        tiny_run("a", "--checkpoint_interval=1", "--eval_interval=0")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "No space left" in error and "checkpoint-1" in error


def test_demo_learns(tiny_run):
    """The demo, shortened: from a model that answers at once to one that shows its work.

    Six steps of half the questions, at twice the learning rate. With each of three seeds the
    accuracy was above 0.98 after them.
    """
    flags = ("--steps=6", "--rollouts_per_step=16", "--train_batch_size=128", "--lr=6e-5")
    sizes = ("--group_size=8", "--micro_batch_size=128", "--max_new_tokens=48")
    often = ("--eval_interval=6", "--eval_questions=200", "--checkpoint_interval=0")
    folder = tiny_run("demo", "--dataset=tiny/task", *flags, *sizes, *often)
    first, last = metrics(folder)[0], metrics(folder)[-1]
    assert first["eval/accuracy"] <= 0.45
    assert last["eval/accuracy"] >= 0.70
    assert last["eval/completion_tokens"] >= 1.5 * first["eval/completion_tokens"]


def test_a_disk_that_is_full_before_the_logs_are_open_is_one_sentence(
    tiny_run, tmp_path, monkeypatch, capsys
):
    folder = copy_of(shared_run(), tmp_path / "a")
    before = (folder / "metrics.jsonl").read_bytes()

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Config, "save", full)
    with pytest.raises(SystemExit) as caught:
        tiny_run("a", f"--resume={folder}", "--steps=6")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "No space left on device. Put that right" in error
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_full_gpu_halves_the_micro_batch_and_changes_nothing_else(
    tmp_path, few_questions, capsys
):
    """As CUDA does: the memory is full in the middle of an optimizer step, when a part of the
    gradient is there already."""
    found, groups = {}, None
    for limit in (100, 3):
        flags = ("--train_batch_size=24", "--micro_batch_size=auto", "--kl_weight=0.1")
        trainer = build(tmp_path / str(limit), few_questions, *flags)
        assert trainer.micro_batch.size == 24
        forward, asked = trainer.policy.forward, []

        def crowded(batch, *others, forward=forward, asked=asked, limit=limit):
            asked.append(len(batch.sequences))
            if len(batch.sequences) > limit or len(asked) == 7:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return forward(batch, *others)

        trainer.policy.forward = crowded
        groups = groups or sample(trainer)
        one_step(trainer, groups)
        found[limit] = copies(trainer), trainer.monitor.flush(1, 1)
        assert trainer.micro_batch.size == (24 if limit == 100 else 2), (
            asked,
            "the 7th forward pass runs out of memory too",
        )
    assert "micro-batches of 3 from here on" in capsys.readouterr().out
    (whole, row), (halved, other) = found.values()
    for a, b in zip(whole, halved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for name in (
        "train/loss",
        "train/kl_divergence",
        "train/grad_norm",
        "train/entropy",
        "train/ratio_mean",
    ):
        assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-7), name


def test_one_sequence_that_does_not_fit_is_said():
    sizes = []

    def full(size):
        sizes.append(size)
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(UserError, match="lower --max_new_tokens"):
        MicroBatch(2).halve_on_oom(full)
    assert sizes == [2, 1]


def test_bf16_is_sampled_from_a_copy_that_follows_the_policy(tmp_path, few_questions, monkeypatch):
    trainer = build(tmp_path, few_questions, "--precision=bf16", "--lr=1e-2")
    policy, asked, real = trainer.policy, [], train.rollout
    monkeypatch.setattr(train, "rollout", lambda *args: asked.append(args[0]) or real(*args))
    names = dict(policy.model.named_buffers())
    for trained in (False, True):
        sampler = policy.sampler()
        assert sampler is policy.bf16_copy and sampler is not policy.model
        for own, theirs in zip(policy.model.parameters(), sampler.parameters(), strict=True):
            assert own.dtype == torch.float32 and theirs.dtype == torch.bfloat16
            assert not theirs.requires_grad
            assert torch.equal(own.to(torch.bfloat16), theirs)
        for name, buffer in sampler.named_buffers():
            assert buffer.dtype == names[name].dtype, "rotary frequencies in full"
        if not trained:
            before = [p.clone() for p in sampler.parameters()]
            one_step(trainer)
            gap = trainer.monitor.flush(1, 1)["train/sampler_gap"]
            assert 1e-5 < gap < 0.05, "noticed, and small"
            assert len(asked) == 1 and asked[0] is policy.bf16_copy
    assert any((a != b).any() for a, b in zip(before, sampler.parameters(), strict=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert build(tmp_path / "fp32", few_questions).policy.bf16_copy is None


@pytest.mark.parametrize("flags", [
    ["--entropy_weight=0.3"], ["--entropy_weight=0.2", "--entropy_target=9"],
    ["--kl_weight=0.5", "--kl_estimator=full"], ["--top_entropy=0.3"],
], ids=" ".join)  # fmt: skip
def test_the_fast_way_has_the_whole_gradient(tmp_path, few_questions, flags):
    """Shared prompts, and entropies with a gradient only where it is needed, against the plain way
    with everything."""
    trainer = build(tmp_path, few_questions, *flags)
    policy, found = trainer.policy, []
    assert policy.log_probs.func is shared_log_probs
    items = [replace(e, token_weight=torch.tensor(0.01)) for e in fill(trainer).items]
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.01 * torch.randn_like(p)
    reference = trainer.reference if trainer.objective.needs_exact_kl else None
    for log_probs in (policy.log_probs, equations.sequences_log_probs):
        policy.log_probs = log_probs
        train.add_gradients(policy, reference, trainer.loss, items, 5)
        found.append(flat_gradient(trainer))
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


def test_memory_that_ends_in_a_backward_pass_leaves_no_gradient(tmp_path, few_questions):
    trainer, found = build(tmp_path, few_questions), []
    items = [replace(e, token_weight=torch.tensor(0.01)) for e in fill(trainer).items]
    work = partial(train.add_gradients, trainer.policy, None, trainer.loss, items)
    for boom in (None, 2):
        passes = []

        def crowded(gradient, passes=passes, boom=boom):
            passes.append(1)
            if len(passes) == boom:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

        hook = next(trainer.policy.parameters()).register_hook(crowded)
        trainer.micro_batch.size = 10
        shares, entropies, _ = zip(*trainer.micro_batch.halve_on_oom(work), strict=True)
        found.append((sum(shares), sum(entropies), flat_gradient(trainer)))
        hook.remove()
    assert trainer.micro_batch.size == 5
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_it_can_be_imported_where_unix_is_not():
    """On Windows there is no `resource` and no SIGHUP: both are done without."""

    def work():
        for name in [
            n for n in sys.modules if n.split(".")[0] in ("train", "support", "objectives")
        ]:
            del sys.modules[name]
        sys.modules["resource"] = None
        del signal.SIGHUP, signal.setitimer
        importlib.import_module("train")
        print(len(importlib.import_module("support.schedule").Interruption.SIGNALS))

    code, out, error = forked(work)
    assert code == 0 and out.strip() == "2", error


def test_memory_on_a_mac_is_in_bytes(monkeypatch):
    here = monitor.peak_memory_gb()
    monkeypatch.setattr(monitor.sys, "platform", "darwin")
    assert monitor.peak_memory_gb() == pytest.approx(here / 1024, rel=0.1)


def test_auto_takes_apples_gpu_only_where_it_works(monkeypatch, capsys):
    """No Mac has tried it: the start check decides, and the CPU is what is left."""
    asked = []

    def build(refused, config, resume):
        asked.append(config.device)
        if config.device in refused:
            raise UserError("Sampler and trainer disagree.")
        return "run"

    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    for refused, device, expected in (
        (["auto"], "auto", ["auto", "cpu"]),
        ([], "auto", ["auto"]),
        ([], "cpu", ["cpu"]),
    ):
        asked.clear()
        found = schedule.build_on(Config(device=device), None, partial(build, refused))
        assert found == "run" and asked == expected
    words = "Apple's GPU cannot be used (Sampler and trainer disagree.): on the CPU"
    assert words in capsys.readouterr().out
    with pytest.raises(UserError, match="disagree"):
        schedule.build_on(Config(device="cpu"), None, partial(build, ["cpu"]))


def test_a_run_that_was_stopped_goes_on_to_its_end(tiny_run, tmp_path, capsys):
    """The command that is printed asks for more steps only where the run has done all of its own."""
    say_goodbye(shared_run(), 2, 9)
    assert capsys.readouterr().out.rstrip().endswith(f"--resume {shared_run()}")
    say_goodbye(shared_run(), 2, 2)
    assert capsys.readouterr().out.rstrip().endswith(f"--resume {shared_run()} --steps 4")


def test_other_held_out_questions_are_not_compared_with_those_before(tiny_run, tmp_path):
    for name, changed, kept in (("a", "--eval_questions=7", False), ("b", "--lr=1e-4", True)):
        folder = copy_of(shared_run("--eval_interval=1"), tmp_path / name)
        config, others = parse_config([f"--resume={folder}", "--steps=9", changed])
        with open_run(config, others["resume"], train.build) as (trainer, _):
            known = [*trainer.monitor.evaluated, *trainer.monitor.rows]
            assert len(trainer.monitor.rows) > 1
            assert any("eval/accuracy" in row for row in known) == kept
