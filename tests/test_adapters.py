"""Adapters: the reference is the model without them, they are saved, resumed and merged, and a base in 4 bits."""

import copy
import json
import shutil
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import BARE, ROOT, metrics
from safetensors.torch import load_file
from steps import build, copy_of, fill, learn, sample, shared_run
from transformers import AutoModelForCausalLM

import evaluate
import merge
import run
import sft
import train
from objectives import equations
from objectives.table import OBJECTIVES
from replay_buffer import Experience, pad_batch
from support.adapters import adapters_off, add_adapter, describe_adapter, load_adapter
from support.adapters import merge as merge_weights
from support.command_line import parse_config
from support.errors import UserError
from support.model import load_model, load_to_train
from support.policy import Policy
from support.shared_prompts import share_prompts, shared_log_probs

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

SETTINGS = replace(
    BARE, model="tiny/model", precision="fp32", adapter_rank=4, gradient_checkpointing=False
)
PLAIN = equations.sequences_log_probs
SHARED = partial(shared_log_probs, token_log_probs=equations.token_log_probs)
KINDS = [("fp32", "none"), ("bf16", "none"), ("fp32", "4bit"), ("bf16", "4bit")]


def fill_at_random(model, seed=0):
    """Both matrices. B is 0 in a new adapter, which would hide a path that forgets it."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    return model


def adapted(precision="fp32", quantize="none", **changes):
    """The bundled model with adapters that are not 0."""
    config = replace(SETTINGS, precision=precision, quantize=quantize, **changes)
    return fill_at_random(load_to_train(config))


def batch():
    """Two prompts with completions of different lengths, two of the same prompt."""
    rows = [([5, 6, 7, 8], [9, 10, 11]), ([5, 6, 7, 8], [12, 13]), ([20, 21], [22, 23, 24, 25])]
    return pad_batch([Experience.of(*row) for row in rows])


def gradients(model):
    """Of the adapters, by name; taken away from the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits.float()


# ---------------------------------------------------------------------------- the reference


@pytest.mark.parametrize(("precision", "quantize"), KINDS)
@pytest.mark.parametrize("way", [PLAIN, SHARED], ids=["plain", "shared"])
def test_the_reference_is_the_model_without_its_adapters(way, precision, quantize):
    """As a second model says it, to the last bit: the sampled KL, and value and gradient of the exact one."""
    model = adapted(precision, quantize)
    second = load_model("tiny/model", precision, quantize=quantize, frozen=True)
    if way is SHARED:
        assert all(share_prompts(network, "m", 64, PLAIN, SHARED) for network in (model, second))
    policy, reference = Policy(model, way), Policy(model, way, without_adapters=True)
    other = Policy(second.requires_grad_(False), way)
    data = batch()
    for ours, theirs in zip(reference(data), other(data), strict=True):
        assert torch.equal(ours, theirs)
    assert (policy(data)[0] - reference(data)[0]).abs().max() > 0.01  # the adapters do something
    found = []
    for compared in (reference, other):
        values = policy(data, compared)
        (values[0] + 3 * values[2]).sum().backward()
        found.append([*values, *gradients(model).values()])
    assert len(found[0]) == 3 + 2 * 28 and found[0][2].abs().max() > 0.001
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_adapters_are_on_again_afterwards():
    """Also when what is done without them fails; and they can still be trained."""
    model = adapted()
    before = logits(model)
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        assert torch.equal(logits(model), logits(load_model("tiny/model", "fp32")))
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)
    assert sum(p.requires_grad for p in model.parameters()) == 56
    with adapters_off(model, off=False):
        assert torch.equal(logits(model), before)


def test_gradients_are_those_of_finite_differences(model, tokenizer):
    """Of the loss of a row with the exact KL, along a random direction of all adapters."""
    add_adapter(model, replace(SETTINGS, adapter_alpha=4))
    fill_at_random(model)
    policy = Policy(model, PLAIN)
    reference = Policy(model, PLAIN, without_adapters=True)
    data, advantages = batch(), torch.tensor([1.0, -0.5, 0.3])

    def loss():
        log_probs, _, kl = policy(data, reference)
        terms = -advantages[:, None] * log_probs + 0.5 * kl
        return torch.where(data.action_mask, terms, 0.0).double().sum()

    loss().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in trained]
    exact = sum((p.grad * d).double().sum() for p, d in zip(trained, directions, strict=True))
    step, values = 1e-3, []
    for sign in (1, -1):
        for p, d in zip(trained, directions, strict=True):
            p.data += sign * step * d
        values.append(loss().item())
        for p, d in zip(trained, directions, strict=True):
            p.data -= sign * step * d
    measured = (values[0] - values[1]) / (2 * step)
    assert exact.abs() > 0.1 and abs(measured - exact) < 0.01 * abs(exact)


# ---------------------------------------------------------------------------- training


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_the_adapters_alone(tmp_path, few_questions, objective):
    flags = [
        "--adapter_rank=2",
        "--kl_weight=0.05",
        "--rollouts_per_step=2",
        "--group_size=3",
        "--train_batch_size=3",
    ]
    trainer = build(
        tmp_path,
        few_questions,
        f"--objective={objective}",
        "--max_new_tokens=4",
        "--mask_truncated=false",
        *flags,
    )
    model = fill_at_random(trainer.policy.model)
    assert trainer.policy.sampler() is model and trainer.reference.model is model
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = sample(trainer)
    for group in groups:  # so that every objective learns something
        group.returns[:] = torch.tensor([1.0, 0.0, 0.0])
        group.rewards[:] = group.returns
    learn(trainer, fill(trainer, groups))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_there_is_no_second_model(tmp_path, few_questions):
    """Neither a copy in bf16 to sample from, nor a reference: the base is in bf16 itself."""
    flags = "--precision=bf16", "--adapter_rank=2", "--kl_weight=0.1"
    trainer = build(tmp_path, few_questions, *flags)
    model = trainer.policy.model
    assert trainer.policy.sampler() is model and trainer.reference.model is model
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    half = [name for name, dtype in dtypes.items() if dtype == torch.bfloat16]
    assert len(half) == 38 and not any("lora_" in name for name in half)


RESUMED = {
    "exact KL": ["--kl_estimator=full"],
    "4 bits": ["--precision=bf16", "--quantize=4bit", "--gradient_checkpointing=true"],
}


@pytest.mark.parametrize("flags", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_the_same_to_the_last_bit(tiny_run, tmp_path, flags):
    """With a KL and two optimizer steps for each rollout."""
    small = [
        "--group_size=2",
        "--train_batch_size=4",
        "--max_new_tokens=8",
        "--reward=length_penalty",
    ]
    whole = tiny_run(
        "whole", "--adapter_rank=4", "--kl_weight=0.1", "--eval_interval=0", *small, *flags
    )
    copy_of(whole, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    again = tiny_run("again", "--resume")
    files = [folder / "checkpoint-4" / "adapter_model.safetensors" for folder in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    earlier, final = load_file(whole / "checkpoint-2" / files[0].name), load_file(files[0])
    assert all(not torch.equal(final[name], earlier[name]) for name in final)
    states = [torch.load(file.parent / "trainer_state.pt") for file in files]
    for one, two in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert len(states[0]["optimizer"]["state"]) == 56
    assert metrics(whole) == metrics(again) and len(metrics(whole)) == 4


@pytest.mark.parametrize(
    "flag", ["--adapter_rank=2", "--adapter_alpha=8", "--quantize=4bit", "--adapter_targets=q_proj"]
)
def test_a_resumed_run_keeps_its_adapters(flag):
    with pytest.raises(UserError, match="cannot be changed on resume; leave out --"):
        parse_config(["--resume", str(shared_run("--adapter_rank=4")), "--steps=4", flag])


def test_the_learning_rate_of_adapters_is_ten_times_as_high(tmp_path):
    """As the preset has it, unless a flag says otherwise; a config file has its own, for what it trains."""
    file = str(tmp_path / "config.yaml")
    config, _ = parse_config(["--preset=tiny", "--adapter_rank=8"])
    assert config.lr == 3e-4
    config.save(tmp_path / "config.yaml")
    assert parse_config(["--adapter_rank=1"])[0].lr == 1e-5
    assert parse_config(["--preset=tiny", "--adapter_rank=8", "--lr=0.001"])[0].lr == 0.001
    assert parse_config(["--preset=tiny"])[0].lr == 3e-5
    assert parse_config(["--config", file])[0].lr == 3e-4
    assert parse_config(["--config", file, "--adapter_rank=1"])[0].lr == 3e-4
    assert parse_config(["--config", file, "--adapter_rank=0"])[0].lr == 3e-5


# ---------------------------------------------------------------------------- 4 bits


def test_gradients_in_4_bits_are_those_of_the_same_numbers():
    """Also after a pass without gradients, where bitsandbytes takes another layout on some CPUs."""
    quantized, whole = adapted(quantize="4bit"), adapted()
    for name, layer in quantized.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is not None and not hasattr(layer, "base_layer"):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
            whole.get_submodule(name).weight.data.copy_(weight)
    assert not torch.equal(logits(whole), logits(adapted()))  # it was rounded
    found = []
    for model in (quantized, whole):
        logits(model)  # in eval mode, as the sampler does
        Policy(model.train(), PLAIN)(batch())[0].sum().backward()
        found.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()
    assert quantized.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8


@pytest.mark.parametrize(("precision", "quantize"), KINDS)
def test_adapters_are_in_fp32_and_saved_as_they_are(tmp_path, precision, quantize):
    """The frozen weights are in bf16 where the arithmetic is."""
    model = adapted(precision, quantize)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in own.values()} == {torch.float32}
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    assert model.dtype == model.model.norm.weight.dtype == half
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), precision, quantize=quantize)
    loaded = dict(again.named_parameters())
    assert all(torch.equal(p, loaded[name]) for name, p in own.items())
    assert torch.equal(logits(again), logits(model))


# ---------------------------------------------------------------------------- checkpoints


def test_peft_loads_a_checkpoint(tmp_path, monkeypatch):
    """From any folder, with the base model that it names."""
    folder = shared_run("--adapter_rank=4") / "checkpoint-2"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"])
    monkeypatch.chdir(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        settings["base_model_name_or_path"], dtype=torch.float32
    )
    plain = logits(base)
    theirs = logits(peft.PeftModel.from_pretrained(base, folder).eval())
    assert torch.equal(theirs, logits(load_model(str(folder), "fp32")))
    assert not torch.equal(theirs, plain)
    assert "library_name: peft" in (folder / "README.md").read_text()


def test_an_adapter_of_weights_in_4_bits_goes_on_beside_them():
    """What was trained beside rounded weights does not fit others."""
    folder = shared_run("--adapter_rank=4", "--quantize=4bit") / "checkpoint-2"
    config, _ = parse_config([f"--model={folder}", "--preset=tiny"])
    assert (config.quantize, config.adapter_rank, config.lr) == ("4bit", 4, 3e-4)
    with pytest.raises(
        UserError, match="holds an adapter with --quantize 4bit, and goes on with it"
    ):
        parse_config([f"--model={folder}", "--quantize=none"])


def test_evaluate_and_run_load_as_the_training_did(monkeypatch, capsys):
    """The base in 4 bits beside its adapters; and, in run.py, the base model in 4 bits too."""
    folder, loaded = shared_run("--adapter_rank=4", "--quantize=4bit"), []
    for command in (evaluate, run):
        monkeypatch.setattr(
            command, "load_model", lambda *a, **k: loaded.append(load_model(*a, **k)) or loaded[-1]
        )
        command.main([f"--model={folder}", "--eval_questions=3"])
    assert [hasattr(model, "peft_config") for model in loaded] == [True, False, True]
    assert all(model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8 for model in loaded)
    assert "on 3 held-out questions" in capsys.readouterr().out
    evaluate.main([f"--model={folder}", "--eval_questions=3", "--preset=tiny", "--device=cpu"])
    assert loaded[-1].model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    run.main([f"--model={folder}", "--base=tiny/model", "--question=1+1?"])
    assert loaded[-2].model.layers[0].mlp.up_proj.weight.dtype != torch.uint8, "as it is"
    with pytest.raises(SystemExit):
        evaluate.main([f"--model={folder}", "--quantize=none"])


@pytest.mark.parametrize("flags", [[], ["--quantize=4bit"]], ids=["plain", "4 bits"])
def test_a_merged_model_computes_the_same(tmp_path, flags):
    folder, new = shared_run("--adapter_rank=4", *flags), tmp_path / "merged"
    merge.main([f"--model={folder}", f"--output={new}"])
    trained = load_model(str(folder / "checkpoint-2"), "fp32", quantize="4bit" if flags else "none")
    merged = load_model(str(new), "bf16")  # all weights: in fp32
    assert merged.dtype == torch.float32 and not hasattr(merged, "peft_config")
    assert (logits(merged) - logits(trained)).abs().max() < 1e-4
    weights = dict(merged.named_parameters())
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(weights[norm], dict(trained.named_parameters())[norm])
    assert (logits(merged) - logits(load_model("tiny/model", "fp32"))).abs().max() > 1e-3
    config, _ = parse_config([f"--config={new / 'config.yaml'}"])
    assert (config.adapter_rank, config.quantize, config.model) == (0, "none", "tiny/model")
    assert config.lr == 3e-5, "of all weights again"


def test_a_chain_of_adapters_is_merged_into_one_model(tmp_path, few_questions):
    """An adapter that was begun with another one: the config that is written names the base of both."""
    first = shared_run("--adapter_rank=4", "--quantize=4bit") / "checkpoint-2"
    folder = shared_run("--adapter_rank=4", f"--model={first}", "--lr=1e-4")
    merge.main([f"--model={folder}", f"--output={tmp_path / 'new'}"])
    config, _ = parse_config([f"--config={tmp_path / 'new' / 'config.yaml'}"])
    assert (config.adapter_rank, config.quantize, config.lr) == (0, "none", 1e-5)
    assert config.model == str((ROOT / "tiny" / "model").resolve())


def test_nothing_is_rounded_where_nothing_is_known(tmp_path):
    """An adapter without a config of ours is merged in fp32."""
    adapted().save_pretrained(tmp_path / "other")
    file = tmp_path / "other" / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "tiny/model"}
    file.write_text(json.dumps(settings))
    merge.main([f"--model={tmp_path / 'other'}", f"--output={tmp_path / 'new'}", "--device=cpu"])
    merged = logits(load_model(str(tmp_path / "new"), "fp32"))
    assert (merged - logits(load_model(str(tmp_path / "other"), "fp32"))).abs().max() < 1e-4


def test_a_project_may_move(tmp_path):
    """The base model is found again through the run's config, where adapter_config.json has an old place."""
    folder = copy_of(shared_run("--adapter_rank=4"), tmp_path / "run") / "checkpoint-2"
    before, file = logits(load_model(str(folder), "fp32")), folder / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "/nowhere/at/all"}
    file.write_text(json.dumps(settings))
    assert torch.equal(logits(load_model(str(folder), "fp32")), before)
    (folder / "config.yaml").write_text("model: /nowhere/either\n")
    with pytest.raises(UserError, match="'/nowhere/at/all' is not there; put the model in that"):
        load_model(str(folder), "fp32")


def test_training_goes_on_from_an_adapter(tmp_path, few_questions, capsys):
    """sft.py writes one; a run that begins with it has its rank, and says what its KL is measured to."""
    small = [
        "--preset=tiny",
        "--device=cpu",
        "--steps=2",
        "--train_batch_size=4",
        f"--dataset={few_questions}",
    ]
    sft.main(
        [
            *small,
            "--adapter_rank=3",
            "--adapter_targets",
            "q_proj",
            "v_proj",
            f"--run_dir={tmp_path}/warm",
        ]
    )
    start = tmp_path / "warm" / "model"
    assert {file.name for file in start.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.yaml",
    }
    saved = load_file(start / "adapter_model.safetensors")
    trainer = build(tmp_path / "log", few_questions, f"--model={start}", "--kl_weight=0.1")
    config = trainer.config
    assert (config.adapter_rank, config.adapter_targets, config.lr) == (
        3,
        ["q_proj", "v_proj"],
        3e-4,
    )
    own = [p for p in trainer.policy.model.parameters() if p.requires_grad]
    assert len(own) == len(saved) == 16
    assert sum(p.sum() for p in own).item() == pytest.approx(
        sum(p.sum() for p in saved.values()).item(), rel=1e-5
    )
    assert "the KL is measured to the base model, without the adapter in" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="holds an adapter with --adapter_rank 3, and goes on with it"
    ):
        parse_config([f"--model={start}", "--adapter_rank=8"])
    evaluate.main([f"--model={start}", "--eval_questions=2"])
    assert "on 2 held-out questions" in capsys.readouterr().out


# ---------------------------------------------------------------------------- what is refused


def test_a_model_that_would_be_adapted_in_part_is_refused():
    """gpt-oss' experts are no linear layers; by name its other layers can be adapted."""
    from transformers import GptOssConfig, GptOssForCausalLM

    small = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    for targets in (["all-linear"], ["q_proj", "k_proj", "v_proj", "o_proj"]):
        model = GptOssForCausalLM(small)
        config = replace(SETTINGS, adapter_targets=targets)
        add_adapter(model, config)
        if targets == ["all-linear"]:
            with pytest.raises(
                UserError, match=r"would be beside \d+% of the weights in its matrices"
            ):
                describe_adapter(model, config)
        else:
            assert "LoRA of rank 4 on" in describe_adapter(model, config)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # peft's, of the experts
def test_experts_in_one_block_are_not_adapted():
    """peft would adapt them by another layer, which could not be merged or loaded here."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    small = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with pytest.raises(UserError, match="The experts of this model are one block of weights"):
        add_adapter(Qwen3MoeForCausalLM(small), SETTINGS)
    model = Qwen3MoeForCausalLM(small)
    add_adapter(model, replace(SETTINGS, adapter_targets=["q_proj"]))
    assert sum(p.requires_grad for p in model.parameters()) == 2


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of the transposed weights
def test_transposed_weights_are_merged():
    """GPT-2's, whose layers are no nn.Linear."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    whole = copy.deepcopy(model)
    add_adapter(model, SETTINGS)
    fill_at_random(model)
    assert (logits(model) - logits(whole)).abs().max() > 1e-3
    merge_weights(model, whole)
    assert (logits(model) - logits(whole)).abs().max() < 1e-5


@pytest.mark.parametrize("quantize", ["none", "4bit"])
def test_the_share_that_is_adapted_is_printed(capsys, quantize):
    adapted(quantize=quantize)
    out = capsys.readouterr().out
    assert (
        "rank 4 on all-linear, which is 100% of the weights in layers" in out
        and "4.62% of the model" in out
    )
    adapted(quantize=quantize, adapter_targets=["q_proj", "v_proj"])
    share = (128 * 128 + 128 * 64) / (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384)
    numbers = 4 * 4 * (128 + 128 + 128 + 64)
    assert (
        f"on q_proj v_proj, which is {share:.0%} of the weights in layers: {numbers:,} trained"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["nothing"], "--adapter_targets nothing cannot be adapted"),
        (["input_layernorm"], "cannot be adapted"),
        (["lm_head", "q_proj"], "beside the embeddings or the head are not supported"),
        (["embed_tokens"], "beside the embeddings or the head are not supported"),
        (["q_proj", "v_porj"], "q_proj v_porj: no layer is called v_porj"),
        (["all-linear", "q_proj"], "no layer is called all-linear"),
    ],
)
def test_layers_that_cannot_be_adapted(targets, says):
    with pytest.raises(UserError, match=says):
        adapted(adapter_targets=targets)


ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny/model",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "holds an adapter .IA3., and only plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "LORA, modules_to_save"),
        ({"use_dora": True}, "LORA, use_dora"),
        ({"bias": "all"}, "LORA, bias all"),
        ({"init_lora_weights": "pissa"}, "LORA, init_lora_weights pissa"),
        ({"alora_invocation_tokens": [5]}, "LORA, alora_invocation_tokens"),
        ({"r": None}, "only plain LoRA"),
        (
            {"base_model_name_or_path": "/nowhere/at/all"},
            "base model '/nowhere/at/all' is not there",
        ),
        ({"base_model_name_or_path": None}, "base model None is not there"),
        ({}, "has no adapter_model.safetensors, the only file"),
    ],
)
def test_adapters_of_other_programs(tmp_path, changes, says):
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER | changes))
    with pytest.raises(UserError, match=says):
        load_model(str(tmp_path), "fp32")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"peft_type": "LORA"}'])
def test_an_adapter_config_that_is_none(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="does not describe a LoRA adapter"):
        parse_config([f"--model={tmp_path}"])


def test_an_adapter_of_another_model(tmp_path, model):
    """Its shapes, its layers, or its file are not those of the base model."""
    adapted().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not fit its base model|Cannot load the adapter"):
        load_adapter(model, str(tmp_path))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="Cannot load the adapter"):
        load_model(str(tmp_path), "fp32")


def test_a_damaged_checkpoint_is_found(tmp_path):
    folder = copy_of(shared_run("--adapter_rank=4"), tmp_path / "run")
    weights = folder / "checkpoint-2" / "adapter_model.safetensors"
    weights.write_bytes(b"\0" + weights.read_bytes()[1:])
    with pytest.raises(SystemExit):
        train.main([f"--resume={folder}", "--steps=4"])


@pytest.mark.parametrize(
    ("package", "changes", "says"),
    [
        ("peft", {}, "Adapters need the package peft: pip install peft."),
        ("bitsandbytes", {"quantize": "4bit"}, "--quantize 4bit needs the package bitsandbytes"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, changes, says):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=says):
        load_to_train(replace(SETTINGS, **changes))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["--quantize=4bit"],
            "freezes the weights, so nothing would be trained; give --adapter_rank 16, or --quantize none",
        ),
        (["--quantize=8bit", "--adapter_rank=4"], "8bit"),
        (["--adapter_rank=-1"], "--adapter_rank is -1; it must be 0 or more"),
        (
            ["--adapter_rank=4", "--adapter_alpha=0"],
            "--adapter_alpha is 0.0; it must be more than 0",
        ),
    ],
)
def test_settings_that_mean_nothing(flags, says):
    with pytest.raises(UserError, match=says):
        parse_config(["--preset=tiny", *flags])
