"""preflight.py: a sampler that is not the trainer is noticed before anything is written."""

import pytest
import torch
from conftest import ROOT
from torch import nn
from transformers import AutoModelForCausalLM

import rollout
import train
from config import Config
from data import load_questions, with_prompts
from errors import UserError
from log_probs import Policy
from model import load_model
from preflight import check_sampler


@pytest.fixture(scope="module")
def questions(tokenizer):
    return with_prompts(
        load_questions(str(ROOT / "tiny" / "task"), "train")[:50], tokenizer, "", 128
    )[0]


def check(sampler, trainer, tokenizer, questions, temperature=1.0, **settings):
    torch.manual_seed(0)
    config = Config(
        preset="tiny",
        precision=settings.pop("precision", "fp32"),
        temperature=temperature,
        **settings,
    )
    check_sampler(sampler, Policy(trainer, temperature), tokenizer, questions, config)


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
    real = rollout.pad_left

    def forgotten(prompts, pad, device):
        ids, mask = real(prompts, pad, device)
        assert not mask.all(), "there must be padding, or nothing is tried"
        return ids, torch.ones_like(mask)

    monkeypatch.setattr(rollout, "pad_left", forgotten)
    with pytest.raises(UserError, match="sampled from otherwise"):
        check(model, model, tokenizer, questions)


def test_another_prompt_is_refused(tokenizer, questions, monkeypatch):
    """A template of the sampler's own: a token more in front of each prompt."""
    model = load_model("tiny/model", "fp32")
    real = rollout.pad_left
    monkeypatch.setattr(
        rollout,
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
    real = rollout.pad_left
    monkeypatch.setattr(
        rollout,
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


class Wrong(nn.Module):
    """A trainer whose log-probabilities are off by `error(batch)`."""

    def __init__(self, model, error):
        super().__init__()
        self.policy, self.error = Policy(model, 1.0), error

    def forward(self, batch):
        log_probs, *others = self.policy(batch)
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
    torch.manual_seed(0)
    config = Config(preset="tiny", precision="fp32")
    with pytest.raises(UserError, match="sampled from otherwise"):
        check_sampler(model, Wrong(model, MISTAKES[mistake]), tokenizer, questions, config)


@pytest.mark.parametrize(("precision", "temperature", "fine", "bad"), [
    ("fp32", 1.0, 9e-4, 1.1e-3), ("fp32", 0.1, 9e-3, 1.1e-2), ("fp32", 2.0, 9e-4, 1.1e-3), ("bf16", 1.0, 0.29, 0.31),
    ("bf16-pure", 1.0, 0.29, 0.31),
])  # fmt: skip
def test_the_tolerance(tokenizer, questions, precision, temperature, fine, bad):
    """Per precision, and wider where the temperature spreads the logits."""
    model = load_model("tiny/model", "fp32")
    for gap in (fine, bad):
        torch.manual_seed(0)
        config = Config(preset="tiny", precision=precision, temperature=temperature)
        trainer = Wrong(model, lambda batch, log_probs, gap=gap: gap)
        trainer.policy.temperature = temperature
        if gap == fine:
            check_sampler(model, trainer, tokenizer, questions, config)
        else:
            with pytest.raises(UserError, match="sampled from otherwise"):
                check_sampler(model, trainer, tokenizer, questions, config)


def test_what_is_tried_is_what_will_sample(tmp_path, monkeypatch):
    """In bf16 that is the twin."""
    seen = []
    monkeypatch.setattr(train, "check_sampler", lambda model, *others: seen.append(model))
    config = train.parse_config(
        ["--preset=tiny", "--device=cpu", "--precision=bf16", f"--run_dir={tmp_path}/run"]
    )[0]
    t = train.build(config, None)
    assert t.twin is not None and seen == [t.twin]
