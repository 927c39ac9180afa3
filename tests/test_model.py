"""Models and what is asked of them: log-probabilities against the plain forward pass; what is loaded and what is not."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BioGptForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    MixtralConfig,
    OPTConfig,
    RwkvConfig,
    RwkvForCausalLM,
)

from loss import sequences_log_probs
from objectives import equations
from replay_buffer import Experience, pad_batch
from support import pieces
from support.config import Config
from support.errors import UserError
from support.model import (
    bf16_copy,
    build_accelerator,
    load_model,
    load_tokenizer,
    remove_randomness,
)
from support.policy import Policy
from support.preflight import check_model

PLAIN = {"loss": sequences_log_probs, "equations": equations.sequences_log_probs}

# 2 is the end token, 0 is what pad_batch pads with: both are real tokens too.
ROWS = [([5, 2, 9], [11, 0, 2]), ([6], [13]), ([2, 0, 7, 8, 30], [14, 15, 16, 17])]


def batch():
    return pad_batch([Experience.of(*row) for row in ROWS])


def plain_log_probs(network, prompt, completion, temperature):
    """One row, no padding, all logits, the shift written out."""
    logits = network(input_ids=torch.tensor([prompt + completion])).logits[0].double() / temperature
    log_probs = torch.log_softmax(logits, -1)
    return torch.stack(
        [log_probs[len(prompt) + t - 1, token] for t, token in enumerate(completion)]
    )


@pytest.mark.parametrize("function", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("piece", [2**24, 200])
def test_equal_to_the_plain_forward_pass(model, temperature, piece, function, monkeypatch):
    """Padded, scaled by the temperature, in pieces; as if each row were alone and plain."""
    monkeypatch.setitem(pieces.LOGITS_AT_A_TIME, "cpu", piece)
    e = batch()
    log_probs, entropies = function(
        model, e.sequences, e.attention_mask, e.num_actions, temperature
    )
    assert (
        log_probs.dtype == torch.float32
        and entropies.shape == log_probs.shape == e.action_mask.shape
    )
    for row, (prompt, completion) in zip(log_probs, ROWS, strict=True):
        expected = plain_log_probs(model, prompt, completion, temperature)
        torch.testing.assert_close(row[: len(completion)].double(), expected, rtol=1e-4, atol=1e-5)
    prompt, completion = ROWS[0]
    logits = (
        model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1]
        / temperature
    )
    assert entropies[0, 0].item() == pytest.approx(
        torch.distributions.Categorical(logits=logits).entropy().item(), rel=1e-4
    )


@pytest.mark.parametrize("function", PLAIN.values(), ids=PLAIN)
def test_the_gradient_is_that_of_the_plain_forward_pass(model, function, tmp_path, monkeypatch):
    monkeypatch.setitem(pieces.LOGITS_AT_A_TIME, "cpu", 200)
    e = batch()
    model.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "fp32", gradient_checkpointing=True).train()
    log_probs, *_ = Policy(model, function, 0.8)(e)
    log_probs[e.action_mask].sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.eval()
    sum(plain_log_probs(model, *row, 0.8).sum() for row in ROWS).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_only_completion_logits_are_computed(model):
    """The prompt's logits would be the largest tensors of the whole run, and nothing reads them."""
    seen = []
    model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[1]))
    e = batch()
    Policy(model, sequences_log_probs)(e)
    assert seen == [e.num_actions]


def test_a_head_without_logits_to_keep_gives_the_same(model):
    """Some architectures compute all logits; the completion's are then picked from them."""
    e = batch()
    arguments = (e.sequences, e.attention_mask, e.num_actions)
    expected, *_ = sequences_log_probs(model, *arguments)

    class Old(torch.nn.Module):
        def forward(self, input_ids, attention_mask, position_ids, use_cache):
            return model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
            )

    torch.testing.assert_close(sequences_log_probs(Old(), *arguments)[0], expected)


@pytest.mark.parametrize(
    "network",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2)),
        BioGptForCausalLM(
            BioGptConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        ),
    ],
    ids=["gpt2", "biogpt"],
)
def test_dropout_is_off_in_training(tmp_path, network):
    """With dropout the ratio is noise before any update. Both defaults are 0.1, under different names."""
    network.save_pretrained(tmp_path / "model")
    network = load_model(str(tmp_path / "model"), "fp32")
    e = batch()
    quiet, *_ = Policy(network, sequences_log_probs)(e)
    network.train()
    loud, *_ = Policy(network, sequences_log_probs)(e)
    torch.testing.assert_close(loud[e.action_mask], quiet[e.action_mask])


def test_the_bundled_tokenizer_survives_autotokenizer(tokenizer):
    """transformers 5 rebuilds some tokenizers from their class and silently loses a custom one."""
    text = "Tom has 25 apples. Tom gives 7 to Mary. How many apples does Tom have?"
    done = "<think>25-7=18</think><answer>18</answer>"
    ids = tokenizer(text + done)["input_ids"]
    assert tokenizer.unk_token_id not in ids and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text + done
    assert len(tokenizer(done)["input_ids"]) == 13, "tags are one token each, digits one token each"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == f"<|user|>{text}<|end|><|assistant|>"
    assert tokenizer.eos_token_id in tokenizer(prompt)["input_ids"], (
        "the end token inside the prompt, as in Qwen's"
    )
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_bad_models_are_one_sentence(tmp_path, model):
    with pytest.raises(UserError, match="Cannot load the model"):
        load_model(str(tmp_path), "fp32")
    with pytest.raises(UserError, match="There is no folder .*nowhere; give --model"):
        load_tokenizer(str(tmp_path / "nowhere"))
    model.resize_token_embeddings(10)
    small = Config(max_prompt_tokens=8, max_new_tokens=8)
    with pytest.raises(UserError, match="no match"):
        check_model(model, load_tokenizer("tiny/model"), small, sequences_log_probs)


def test_models_that_cannot_do_the_job_are_refused(model, tokenizer):
    small = Config(max_prompt_tokens=128, max_new_tokens=128)
    check_model(model, tokenizer, small, sequences_log_probs)
    too_long = Config(max_prompt_tokens=128, max_new_tokens=129)
    with pytest.raises(UserError, match="reads 256 tokens at the most"):
        check_model(model, tokenizer, too_long, sequences_log_probs)
    network = RwkvForCausalLM(
        RwkvConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2)
    ).eval()
    with torch.no_grad():
        for p in network.parameters():
            p += 0.5 * torch.randn_like(p)
    with pytest.raises(UserError, match="does not leave padding out"):
        check_model(network, tokenizer, small, sequences_log_probs)


@pytest.mark.parametrize(
    ("precision", "weights", "arithmetic"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("bf16-pure", torch.bfloat16, torch.bfloat16),
    ],
)
def test_precision(precision, weights, arithmetic):
    """Weights, logits and the log-probabilities that leave the policy; and a gradient that reaches the weights."""
    accelerator = build_accelerator(Config(device="cpu", precision=precision))
    network = load_model("tiny/model", precision)
    policy = accelerator.prepare_model(Policy(network, sequences_log_probs))
    seen = []
    network.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    log_probs, *_ = policy(batch())
    log_probs.sum().backward()
    assert {p.dtype for p in network.parameters()} == {weights} and seen == [arithmetic]
    assert log_probs.dtype == torch.float32 and all(
        p.grad.isfinite().all() for p in network.parameters()
    )
    assert {p.grad.dtype for p in network.parameters()} == {weights}


def test_slow_bf16_is_said(monkeypatch, capsys):
    """A CPU without instructions for it is several times slower in bf16 than in fp32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    for precision, said in (("bf16", 1), ("bf16-pure", 1), ("fp32", 0)):
        build_accelerator(Config(device="cpu", precision=precision))
        assert capsys.readouterr().out.count("--precision fp32 is the better choice") == said
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    build_accelerator(Config(device="cpu", precision="bf16"))
    assert "better choice" not in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_a_preset_for_a_gpu_says_what_runs_without_one():
    with pytest.raises(UserError, match="--preset tiny runs on any machine"):
        build_accelerator(Config())


def test_a_model_that_bf16_breaks_is_sampled_from_in_fp32(model, capsys):
    """XGLM adds a position table in fp32 to what its embeddings say."""
    assert bf16_copy(model, "it") is not None and not capsys.readouterr().out
    model.model.embed_tokens.register_forward_hook(lambda *args: args[2].float())
    assert bf16_copy(model, "it") is None
    assert "cannot be sampled from in bf16" in capsys.readouterr().out


def test_the_bf16_copy_is_no_part_of_the_policy(model):
    """It is not trained or saved, stays in eval mode, and has the policy's weights of the moment, rounded."""
    policy = Policy(model, sequences_log_probs)
    parts = [list(policy.state_dict()), len([*policy.parameters()]), len([*policy.modules()])]
    assert policy.sampler() is model, "without a copy the model samples itself"
    policy.copy_in_bf16("it")
    copy = policy.bf16_copy
    assert [
        list(policy.state_dict()),
        len([*policy.parameters()]),
        len([*policy.modules()]),
    ] == parts
    assert all(copy is not module for module in policy.modules())
    assert {p.data_ptr() for p in copy.parameters()}.isdisjoint(
        p.data_ptr() for p in policy.parameters()
    )
    assert not any(p.requires_grad for p in copy.parameters())

    policy.train()
    assert model.training and not any(module.training for module in copy.modules())
    policy.eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    assert policy.sampler() is copy
    for p, own in zip(model.parameters(), copy.parameters(), strict=True):
        assert own.dtype == torch.bfloat16 and torch.equal(own, p.to(torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    policy.copy_in_bf16(None)
    assert policy.sampler() is model


def test_weights_do_not_stay_in_the_files_memory_map(tmp_path, tokenizer):
    """Where a tensor may begin at any byte: matrix products then round otherwise than in a process that never loaded it."""
    network = load_model("tiny/model", "fp32")
    network.save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert any(p.data_ptr() % 64 for p in mapped.parameters()), (
        "what transformers does; without it nothing is tried here"
    )
    assert not any(p.data_ptr() % 64 for p in load_model(str(tmp_path), "fp32").parameters())


def test_a_head_that_picks_other_positions_is_refused(model, tokenizer):
    """sft.py compares nothing with the sampler: it would train each token's neighbour in silence."""

    class Shifted(type(model)):
        def forward(self, *args, logits_to_keep=0, **kwargs):
            if isinstance(logits_to_keep, torch.Tensor):
                logits_to_keep = logits_to_keep - 1
            return super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)

    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    small = Config(max_prompt_tokens=8, max_new_tokens=8)
    check_model(model, tokenizer, small, sequences_log_probs)
    model.__class__ = Shifted
    with pytest.raises(UserError, match="generates from other probabilities"):
        check_model(model, tokenizer, small, sequences_log_probs)


NOISY = {
    "jitter of a router": MixtralConfig(
        num_local_experts=4, router_jitter_noise=0.9, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=121,
    ),
    "dropped layers": OPTConfig(
        layerdrop=0.5, dropout=0.5, attention_dropout=0.5, hidden_size=32, ffn_dim=32, num_hidden_layers=4,
        num_attention_heads=4, vocab_size=121, word_embed_proj_dim=32,
    ),
    "dropout": GPT2Config(
        resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, n_embd=32, n_layer=1, n_head=4, vocab_size=121,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISY)
def test_the_update_computes_what_was_sampled(name, tmp_path, tokenizer):
    """In train mode as in eval mode: else the ratio is not 1 before anything is trained."""
    torch.manual_seed(0)
    noisy = AutoModelForCausalLM.from_config(NOISY[name])
    for p in noisy.parameters():
        p.data += 0.2 * torch.randn_like(p)
    ids = torch.arange(40)[None] % 121
    noisy.train()
    assert not torch.allclose(noisy(ids).logits, noisy(ids).logits), (
        "noise, or this compares nothing"
    )
    noisy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    quiet = load_model(str(tmp_path), "fp32")
    expected = quiet(ids).logits
    assert torch.equal(quiet.train()(ids).logits, expected)


def test_configs_inside_a_config_have_no_noise():
    config = LlavaConfig(text_config={"model_type": "llama", "attention_dropout": 0.3})
    remove_randomness(config)
    assert config.text_config.attention_dropout == 0.0


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("WORLD_SIZE", "2", "one of 2 processes, and only train.py"),
        ("ACCELERATE_USE_FSDP", "true", "ACCELERATE_USE_FSDP is set"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "ACCELERATE_USE_DEEPSPEED is set"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "models are not compiled"),
    ],
)
def test_what_a_launcher_has_set_is_refused(monkeypatch, variable, value, words):
    build_accelerator(Config(device="cpu"))
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words):
        build_accelerator(Config(device="cpu"))
    monkeypatch.setenv(variable, {"WORLD_SIZE": "1"}.get(variable, "no"))
    build_accelerator(Config(device="cpu"))
