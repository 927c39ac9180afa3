"""Shared fixtures: no hub, the bundled model and task, and a network of random weights."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# One thread for each process of the tests: threads that wait for each other spin, and on a machine
# with other work that takes ten times as long. Before torch is imported; for child processes too.
os.environ["OMP_NUM_THREADS"] = "1"

import json
from pathlib import Path

import pytest

from support.config import Config

# The process that only hands out the tests needs no torch: it is imported where it is used.
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps device and precision for the life of the process; each test leaves it as a process would."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tokenizer():
    from support.model import load_tokenizer

    return load_tokenizer("tiny/model")


@pytest.fixture
def model(tokenizer):
    """Two random layers with the bundled vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


BARE = Config(system_prompt="", max_prompt_tokens=128)  # of the bundled task
FEW: list[Path] = []  # the folder below, for functions that are no fixtures


@pytest.fixture(scope="session", autouse=True)
def few_questions(tmp_path_factory):
    """A folder with 200 of the bundled training questions and 30 of the others: what a short run needs, read quickly."""
    folder = tmp_path_factory.mktemp("few")
    FEW.append(folder)
    for split, count in (("train", 200), ("test", 30)):
        lines = (
            (ROOT / "tiny" / "task" / f"{split}.jsonl")
            .read_text(encoding="utf-8")
            .splitlines(keepends=True)
        )
        (folder / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return folder


@pytest.fixture
def tiny_run(tmp_path, few_questions, monkeypatch):
    """A small, quick run of the bundled task: call it with more flags; returns its folder."""
    import train
    from support import policy

    # What is tried before a run takes a third of its time; test_preflight.py is about it, and the
    # other tests of whole runs (families, commands, mistakes) make it.
    monkeypatch.setattr(train, "check_sampler", lambda *arguments: None)
    monkeypatch.setattr(policy, "check_model", lambda *arguments: None)

    def run(name="run", *flags):
        folder = tmp_path / name
        small = {
            "preset": "tiny", "device": "cpu", "steps": 4, "rollouts_per_step": 4, "group_size": 4, "train_batch_size": 8,
            "micro_batch_size": 4, "max_new_tokens": 16, "eval_interval": 2, "eval_questions": 20,
            "checkpoint_interval": 2, "run_dir": folder, "dataset": few_questions,
        }  # fmt: skip
        given = {f.split("=")[0].removeprefix("--") for f in flags}
        argv = [f"--{k}={v}" for k, v in small.items() if k not in given]
        if any(f.startswith("--resume") for f in flags):
            argv = [f"--run_dir={folder}"]
        train.main([*argv, *flags])
        return folder

    return run


def metrics(folder, timeless=True):
    """The rows of a run's metrics.jsonl, without those that depend on the clock or the machine."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    skip = ("time/", "perf/") if timeless else ()
    return [{k: v for k, v in row.items() if not k.startswith(skip)} for row in rows]
