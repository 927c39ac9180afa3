"""support/evaluation.py, and the commands beside training: evaluate, run, sft."""

import os
from functools import partial

import pytest
import torch
from conftest import BARE, metrics

import evaluate
import run
import sft
from rollout import rollout
from support import evaluation
from support.checkpoint import find_model
from support.command_line import parse_config
from support.model import load_model, load_tokenizer


def test_wilson_interval():
    """Against published values: Brown, Cai & DasGupta (2001) and the usual textbook case."""
    assert evaluation.wilson_interval(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    low, high = evaluation.wilson_interval(0, 20)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.161, abs=1e-3)


def test_evaluation_leaves_the_random_numbers_alone(model, tokenizer):
    config, _ = parse_config(
        [
            "--preset=tiny",
            "--device=cpu",
            "--eval_questions=5",
            "--eval_samples=3",
            "--max_new_tokens=4",
        ]
    )
    questions = evaluation.held_out_questions(config, tokenizer)
    assert len(questions) == 5
    sample = partial(rollout, model, tokenizer)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    found = evaluation.evaluate(sample, questions, config)
    assert torch.rand(1) == expected
    assert found["eval/sampled_accuracy"][1] == 15 and found["eval/pass_at_k"][1] == 5
    assert found == evaluation.evaluate(sample, questions, config)


def test_commands_on_a_run(tiny_run, capsys, monkeypatch):
    """The figures of `evaluate.py --model RUN` are those that the run logged, with no other flag."""
    monkeypatch.setenv("COLUMNS", "400")  # room for the folder's name in one line of run.py's table
    folder = tiny_run("a")
    assert find_model(str(folder)) == str(folder / "checkpoint-4")
    capsys.readouterr()
    evaluate.main(["--model", str(folder)])
    printed = capsys.readouterr().out
    last = metrics(folder)[-1]
    assert "on 20 held-out questions" in printed
    assert (
        f"{last['eval/accuracy']:8.4f}" in printed
        and f"{last['eval/completion_tokens']:8.4f}" in printed
    )
    evaluate.main(
        ["--model", str(folder / "checkpoint-2"), "--eval_questions", "7", "--eval_samples", "2"]
    )
    printed = capsys.readouterr().out
    assert "on 7 held-out questions" in printed and "eval/pass_at_k" in printed

    run.main(
        [
            "--model",
            str(folder),
            "--question",
            "Tom has 5 apples. Tom loses 2. How many apples does Tom have?",
        ]
    )
    printed = capsys.readouterr().out
    assert (
        "tiny/model" in printed
        and "checkpoint-4" in printed
        and "reasoning" in printed
        and "reference" not in printed
    )
    run.main(["--model", str(folder)])
    printed = capsys.readouterr().out
    assert printed.count("reference") == 6, "three questions, two models"


def test_commands_refuse(tmp_path, capsys):
    for main, argv, message in [
        (run.main, ["--preset=tiny", "--model=nowhere", "--question=x"], "Cannot load"),
        (
            run.main,
            ["--preset=tiny", "--question=" + "Tom " * 500],
            "longer than --max_prompt_tokens",
        ),
        (evaluate.main, ["--preset=tiny", "--eval_question=3"], "did you mean --eval_questions?"),
        (sft.main, ["--preset=tiny", "--lr=-1"], "--lr is -1"),
    ]:
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2 and message in capsys.readouterr().err


def test_sft_teaches_the_datasets_own_solutions(tmp_path, capsys):
    """Ten supervised steps on the bundled task's GSM8K-style solutions: the loss of such solutions falls."""
    folder = tmp_path / "warm"
    flags = [
        "--preset=tiny",
        "--device=cpu",
        "--train_batch_size=16",
        "--micro_batch_size=8",
        "--lr=1e-3",
    ]
    sft.main([*flags, "--steps=10", f"--run_dir={folder}"])
    tokenizer = load_tokenizer(str(folder / "model"))
    questions = sft.with_prompts(sft.load_questions("tiny/task", "test"), tokenizer, BARE)[0][:50]
    assert sft.target(questions[0]).startswith("<think>") and "<<" not in sft.target(questions[0])
    batch = sft.pad_batch([sft.example(q, tokenizer, 48) for q in questions])
    assert (batch.sequences[0] == tokenizer.eos_token_id).any(), "it learns to stop"
    losses = []
    for name in ("tiny/model", str(folder / "model")):
        log_probs, *_ = sft.Policy(load_model(name, "fp32"), sft.sequences_log_probs)(batch)
        losses.append(-float(log_probs.detach()[batch.action_mask].mean()))
    assert losses[1] < 0.8 * losses[0], losses


def test_without_a_model_the_newest_run_is_looked_at(tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    for name in ("old", "new"):
        tiny_run(f"runs/{name}", "--steps=1", "--eval_interval=0")
    (tmp_path / "runs" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    evaluate.main(["--eval_questions=3"])
    assert "--model runs/new, the newest run" in capsys.readouterr().out
    os.utime(tmp_path / "runs" / "old")
    run.main(["--question", "Tom has 5 apples."])
    assert "--model runs/old, the newest run" in capsys.readouterr().out
