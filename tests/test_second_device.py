"""The real job runs on CUDA: here every command runs on a pretended second device, and no tensors of two devices meet."""

import math

import pytest
import torch
from conftest import FEW, metrics
from second_device import second_device

import evaluate
import loss
import run
import sft
import train

TINY = [
    "--preset=tiny", "--device=cuda", "--steps=1", "--rollouts_per_step=1", "--group_size=4", "--train_batch_size=4",
    "--micro_batch_size=2", "--eval_interval=0", "--max_new_tokens=24", "--checkpoint_interval=1", "--reward=length_penalty",
]  # fmt: skip
# One objective of each kind, and the precisions, with and without a KL and gradient checkpointing.
RUNS = {
    "grpo in bf16": [
        "--precision=bf16",
        "--kl_weight=0.01",
        "--gradient_checkpointing=true",
    ],
    "exact KL": ["--kl_weight=0.01", "--kl_estimator=full", "--train_batch_size=2"],
    "rloo, pure bf16": ["--objective=rloo", "--precision=bf16-pure"],
    "dapo": [
        "--objective=dapo",
        "--reward",
        "accuracy",
        "soft_overlong",
        "--reward_weights",
        "1",
        "1",
    ],
    "gspo_token, entropy": ["--objective=gspo_token", "--entropy_weight=0.01", "--top_entropy=0.5"],
    "cispo, correction": [
        "--objective=cispo",
        "--sampler_correction=token_truncate",
        "--whiten_advantages=true",
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_the_second_device(name, tmp_path, monkeypatch):
    """No meeting; and nothing inside the update of a micro-batch waits for the device. The first one is resumed too."""
    flags = [*TINY, *RUNS[name], f"--dataset={FEW[0]}", f"--run_dir={tmp_path / 'run'}"]
    with second_device(monkeypatch) as ledger:
        train.main(flags)
        if name == "grpo in bf16":
            train.main([f"--resume={tmp_path / 'run'}", "--steps=2"])
    assert "train/loss" in metrics(tmp_path / "run")[-1]
    inside = [place for place in ledger.waits if "shared_prompts.py" in place or "loss.py" in place]
    assert not inside, "a micro-batch waits for the device"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_real_gpu(name, tmp_path):
    """The same where there is one: every number is finite, the sampler is the trainer's, and the run goes on."""
    flags = [*TINY, *RUNS[name], f"--dataset={FEW[0]}", f"--run_dir={tmp_path / 'run'}"]
    train.main([*flags, "--sampler_correction=none"] if "correction" not in name else flags)
    train.main([f"--resume={tmp_path / 'run'}", "--steps=2"])
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["train/loss"]) for row in rows)
    assert all(row["train/sampler_gap"] < (0.1 if "bf16" in name else 1e-4) for row in rows)


def test_the_other_commands_on_the_second_device(tmp_path, monkeypatch, capsys):
    own = [
        f"--dataset={FEW[0]}",
        f"--run_dir={tmp_path / 'sft'}",
        "--device=cuda",
        "--preset=tiny",
        "--steps=2",
        "--train_batch_size=4",
    ]
    with second_device(monkeypatch):
        sft.main(own)
        model = [
            f"--model={tmp_path / 'sft' / 'model'}",
            "--eval_questions=4",
            "--max_new_tokens=12",
            "--device=cuda",
        ]
        evaluate.main([*model, "--eval_samples=2"])
        run.main([*model, "--question=Tom has 5 apples. Tom gets 2. How many?"])
    assert "eval/pass_at_k" in capsys.readouterr().out


def test_a_planted_fault_is_found(tmp_path, monkeypatch):
    """One `.cpu()` in the loss."""
    own = loss.GRPOLoss.policy_term
    monkeypatch.setattr(loss.GRPOLoss, "policy_term", lambda *arguments: own(*arguments).cpu())
    flags = [*TINY, f"--dataset={FEW[0]}", f"--run_dir={tmp_path / 'run'}", "--kl_weight=0.01"]
    with (
        second_device(monkeypatch),
        pytest.raises(RuntimeError, match="to be on the same device"),
    ):
        train.main(flags)
