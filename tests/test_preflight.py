"""preflight.py: a sampler that is not the trainer is noticed before anything is written."""

import shutil
from functools import partial

import pytest
import torch
from conftest import BARE, FEW, ROOT
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import train
from loss import sequences_log_probs
from replay_buffer import pad_batch
from rollout import rollout
from support import generation
from support.command_line import is_of_a_run, parse_config
from support.config import Config
from support.data import load_questions
from support.errors import UserError
from support.model import load_model, load_tokenizer, pad_rows
from support.policy import Policy
from support.preflight import check_sampler, find_fault, mend_padding
from support.prompts import with_prompts


@pytest.fixture(scope="module")
def questions(tokenizer):
    return with_prompts(load_questions(str(ROOT / "tiny" / "task"), "train")[:50], tokenizer, BARE)[
        0
    ]


def check(sampler, policy, tokenizer, questions, temperature=1.0, precision="fp32", **settings):
    """`check_sampler` of a model to sample from, and of a model or a policy that is trained."""
    torch.manual_seed(0)
    config = Config(preset="tiny", precision=precision, temperature=temperature, **settings)
    if not isinstance(policy, Policy):
        policy = Policy(policy, sequences_log_probs, temperature)
    check_sampler(partial(rollout, sampler, tokenizer), policy, pad_batch, questions, config)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_the_bundled_model_agrees_to_rounding(tokenizer, questions, capsys, temperature):
    model = load_model("tiny/model", "fp32")
    check(model, model, tokenizer, questions, temperature, top_p=0.5)
    assert float(capsys.readouterr().out.split("log-probabilities (")[1].split()[0]) < 1e-5


def other_temperature(model):
    class Hot(nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head, self.weight = head, head.weight

        def forward(self, states):
            return self.head(states) / 0.5

    model.lm_head = Hot(model.lm_head)


def noisy_weights(model):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)


def rounded_head(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    "spoil", [other_temperature, noisy_weights, rounded_head], ids=lambda f: f.__name__
)
def test_a_sampler_that_differs_is_refused(tokenizer, questions, spoil):
    model, other = load_model("tiny/model", "fp32"), load_model("tiny/model", "fp32")
    torch.manual_seed(1)
    spoil(other)
    with pytest.raises(
        UserError, match="sampled from otherwise than it is trained.*try another model"
    ):
        check(other, model, tokenizer, questions)


def test_padding_that_is_read_is_refused(tokenizer, questions, monkeypatch):
    """The sampler's mask forgotten: the shorter prompt is read with its padding."""
    model = load_model("tiny/model", "fp32")
    real = generation.pad_left

    def forgotten(prompts, pad, device):
        ids, mask = real(prompts, pad, device)
        assert not mask.all(), "there must be padding, or nothing is tried"
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(generation, "pad_left", forgotten)
    with pytest.raises(UserError, match="sampled from otherwise"):
        check(model, model, tokenizer, questions)


def test_another_prompt_is_refused(tokenizer, questions, monkeypatch):
    """A template of the sampler's own: a token more in front of each prompt."""
    model = load_model("tiny/model", "fp32")
    real = generation.pad_left
    monkeypatch.setattr(
        generation,
        "pad_left",
        lambda prompts, pad, device: real([[5, *p] for p in prompts], pad, device),
    )
    with pytest.raises(UserError, match="sampled from otherwise"):
        check(model, model, tokenizer, questions)


def test_bf16_is_rounding_in_bf16_and_not_in_fp32(tokenizer, questions):
    model, rough = load_model("tiny/model", "fp32"), load_model("tiny/model", "fp32")
    rough.to(torch.bfloat16)
    check(rough, model, tokenizer, questions, precision="bf16")
    with pytest.raises(UserError, match="sampled from otherwise"):
        check(rough, model, tokenizer, questions)


def test_weights_that_are_not_finite_are_said(tokenizer, questions):
    model = load_model("tiny/model", "fp32")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        check(model, model, tokenizer, questions)


def test_a_run_that_is_refused_writes_nothing(tmp_path, monkeypatch, capsys):
    real = generation.pad_left
    monkeypatch.setattr(
        generation,
        "pad_left",
        lambda prompts, pad, device: real([[5, *p] for p in prompts], pad, device),
    )
    with pytest.raises(SystemExit) as caught:
        train.main(["--preset=tiny", "--device=cpu", f"--run_dir={tmp_path}/run"])
    assert caught.value.code == 2 and "sampled from otherwise" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_broken_model_file_is_said_at_the_start(tmp_path, tokenizer, capsys):
    model = AutoModelForCausalLM.from_pretrained("tiny/model", dtype=torch.float32)
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        train.main(
            [
                "--preset=tiny",
                "--device=cpu",
                f"--model={tmp_path}/model",
                f"--run_dir={tmp_path}/run",
            ]
        )
    assert (
        "computes NaN: its weights are damaged" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )


class Wrong(Policy):
    """A policy whose log-probabilities are off by `error(batch, log_probs)`."""

    def __init__(self, model, error, temperature=1.0):
        super().__init__(model, sequences_log_probs, temperature)
        self.error = error

    def forward(self, batch, reference=None):
        log_probs, *others = super().forward(batch, reference)
        return (log_probs + self.error(batch, log_probs), *others)


def alternating(batch, log_probs):
    """A mistake whose mean is 0."""
    error = (0.1 * (-1.0) ** torch.arange(log_probs.shape[1])).expand(log_probs.shape)
    return error - error[batch.action_mask].mean()


MISTAKES = {
    "only together": lambda batch, log_probs: 0.1 * (len(batch.sequences) > 1),
    "only alone": lambda batch, log_probs: 0.1 * (len(batch.sequences) == 1),
    "up and down": alternating,
    "not a number": lambda batch, log_probs: float("nan"),
    "only late tokens": lambda batch, log_probs: 0.1 * (torch.arange(log_probs.shape[1]) >= 4),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_that_are_easily_overlooked(tokenizer, questions, mistake):
    model = load_model("tiny/model", "fp32")
    with pytest.raises(UserError, match="sampled from otherwise"):
        check(model, Wrong(model, MISTAKES[mistake]), tokenizer, questions)


@pytest.mark.parametrize(("precision", "temperature", "fine", "bad"), [
    ("fp32", 1.0, 9e-4, 1.1e-3), ("fp32", 0.1, 9e-3, 1.1e-2), ("fp32", 2.0, 9e-4, 1.1e-3), ("bf16", 1.0, 0.29, 0.31),
    ("bf16-pure", 1.0, 0.29, 0.31),
])  # fmt: skip
def test_the_tolerance(tokenizer, questions, precision, temperature, fine, bad):
    """Per precision, and wider where the temperature spreads the logits."""
    model = load_model("tiny/model", "fp32")
    for gap in (fine, bad):
        policy = Wrong(model, lambda batch, log_probs, gap=gap: gap, temperature)
        arguments = model, policy, tokenizer, questions, temperature, precision
        if gap == fine:
            check(*arguments)
        else:
            with pytest.raises(UserError, match="sampled from otherwise"):
                check(*arguments)


def test_what_is_tried_is_what_will_sample(tmp_path, monkeypatch):
    """In bf16 that is the copy of the policy; and what is asked about it is the policy that is trained."""
    sampled, tried = [], []

    def recorded(model, *others):
        sampled.append(model)
        return rollout(model, *others)

    def check_and_record(sample, policy, *others):
        tried.append(policy)
        check_sampler(sample, policy, *others)

    monkeypatch.setattr(train, "rollout", recorded)
    monkeypatch.setattr(train, "check_sampler", check_and_record)
    flags = ["--preset=tiny", "--device=cpu", "--precision=bf16", f"--run_dir={tmp_path}/run"]
    trainer = train.build(parse_config(flags)[0], None)
    assert trainer.policy.bf16_copy is not None
    assert sampled == [trainer.policy.bf16_copy] and tried == [trainer.policy]
    train.sample_and_score(trainer, 1)
    assert sampled == [trainer.policy.bf16_copy] * 2


def test_noise_in_the_update_is_said_at_the_start(tokenizer, questions):
    """A dropout that no config knows of, in a model's own code: silent in eval mode, and so while it samples."""

    class Noisy(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = nn.functional.dropout(output.logits, 0.3, training=self.training)
            return output

    model = load_model("tiny/model", "fp32")
    model.__class__ = Noisy
    with pytest.raises(UserError, match="other log-probabilities each time that it is trained"):
        check(model, model, tokenizer, questions)
    assert not model.training


def test_rounding_alone_refuses_no_model(tokenizer):
    """In bf16, logits of thousands: of a token that the model finds unlikely its log-probability is off by nats."""
    model = load_model("tiny/model", "bf16-pure")
    with torch.no_grad():
        model.model.norm.weight *= 1000  # as sure of itself as a large model is
    prompt, unlikely = list(range(1, 14)), [9, 4, 5, 2]
    rows = (pad_rows([(prompt, unlikely)]), pad_rows([(prompt, unlikely), ([6] * 18, unlikely)]))
    with torch.no_grad():
        alone, beside = (sequences_log_probs(model, *batch)[0][0] for batch in rows)
        assert (alone - beside).abs().max() > 0.5, "rounding must matter, or this compares nothing"
    assert find_fault(model, sequences_log_probs) == ""


def test_a_model_that_cannot_be_saved_is_said_at_the_start(tmp_path, monkeypatch, capsys):
    """Not after a night of training; transformers 5.17 refuses some generation configs only then."""

    def refuse(self, *arguments, **settings):
        raise ValueError("The generation config instance is invalid: temperature without do_sample")

    monkeypatch.setattr("transformers.GenerationConfig.save_pretrained", refuse)
    with pytest.raises(SystemExit):
        own = [f"--dataset={FEW[0]}", f"--run_dir={tmp_path}/run"]
        train.main(["--preset=tiny", "--device=cpu", *own])
    error = capsys.readouterr().err
    assert "could be trained, but not saved (ValueError: The generation config" in error
    assert "generation_config.json" in error and not list(tmp_path.iterdir())


def test_a_padding_token_beyond_the_model_is_done_without(tmp_path, capsys):
    """As Unsloth adds one: the model never sees it. Any other token without a row is refused."""
    tokenizer, model = load_tokenizer("tiny/model"), load_model("tiny/model", "fp32")
    rows = model.get_input_embeddings().num_embeddings
    tokenizer.add_special_tokens({"pad_token": "<|PAD|>"})
    assert len(tokenizer) == rows + 1 and mend_padding(tokenizer, rows)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert "<|PAD|> has no place in the model: the end token pads" in capsys.readouterr().out
    tokenizer.add_tokens(["<more>"])
    assert not mend_padding(tokenizer, rows)


def test_a_tokenizer_that_needs_a_package_is_said(tmp_path):
    shutil.copytree(ROOT / "tiny" / "model", tmp_path / "m")
    for file in (tmp_path / "m").glob("tokenizer*"):
        file.unlink()
    (tmp_path / "m" / "tokenizer.model").write_text("x")
    with pytest.raises(UserError, match="only as tokenizer.model.*pip install sentencepiece"):
        load_tokenizer(str(tmp_path / "m"))


def test_a_config_of_another_program_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("training:\n  lr: 1e-4\n")
    assert (
        not is_of_a_run(tmp_path / "config.yaml") and "another program's" in capsys.readouterr().out
    )
    Config().save(tmp_path / "config.yaml")
    assert is_of_a_run(tmp_path / "config.yaml") and not is_of_a_run(tmp_path / "none.yaml")
