"""The ways to log-probabilities: the fast one of shared_prompts.py against the plain ones, for many model families."""

from functools import partial

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import loss
from objectives import equations
from replay_buffer import Experience, pad_batch
from support import pieces, shared_prompts
from support.policy import Policy

# Groups of 3, 1, 2 and 1; a one-token prompt, one-token completions, a prompt that begins like its neighbour's.
ROWS = [
    ([5, 2, 9], [11, 0, 2]), ([5, 2, 9], [13]), ([5, 2, 9], [14, 15, 16, 17, 18, 19, 20, 2]), ([6], [13]),
    ([5, 2, 9, 4], [7, 7]), ([5, 2, 9, 4], [7, 8, 9]), ([2, 0, 7, 8, 30, 31, 32, 33, 34, 35, 36, 37], [2]),
]  # fmt: skip
SMALL = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 4}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
}
FAMILIES = {
    "llama": {}, "qwen2": {}, "qwen3": {}, "phi3": {}, "phi": {}, "olmo2": {}, "smollm3": {}, "glm": {},
    "granite": {"logits_scaling": 7.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.3}, "cohere2": WINDOW, "mistral": WINDOW, "starcoder2": WINDOW,
    "gemma": {}, "gemma3_text": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": EXPERTS, "qwen3_moe": EXPERTS, "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128},
    "gpt_neox": {}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "biogpt": {},
}  # fmt: skip
# Attention with softcapping, with ALiBi, of its own; a convolution over neighbours; one that does not pass our row on.
OTHERS = {
    "gemma2": WINDOW | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}, "bloom": {"n_head": 4, "n_layer": 2},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}, "stablelm": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip


def family(name, given):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**(SMALL | given))
    network = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in network.parameters():
            p += 0.2 * torch.randn_like(
                p
            )  # biases and scales that are not 0 and 1, logits that differ
    return network


def ways(module):
    """The plain way and the fast one, with the entropies of a module: `loss` or `equations`."""
    shared = partial(shared_prompts.shared_log_probs, token_log_probs=module.token_log_probs)
    return module.sequences_log_probs, shared


def share_prompts(network, name="it", module=equations):
    return shared_prompts.share_prompts(network, name, 64, *ways(module))


def batch_of(rows):
    return pad_batch([Experience.of(*row) for row in rows])


def both(network, temperature=0.7, reference=None, rows=ROWS):
    """Results and gradient of the plain way and of the fast one, on the same network."""
    e = batch_of(rows)
    weights = (
        torch.randn(2, *e.action_mask.shape, generator=torch.Generator().manual_seed(1))
        * e.action_mask
    )
    arguments = e.sequences, e.attention_mask, e.num_actions, temperature, reference
    for way in ways(equations):
        network.zero_grad()
        found = way(network, *arguments)
        (weights[0] * found[0] + weights[1] * sum(found[1:])).sum().backward()
        yield (
            [x[e.action_mask] for x in found],
            torch.cat([p.grad.flatten() for p in network.parameters()]),
        )


def by_hand(network, reference, temperature):
    """Log-probabilities, entropies and KL of ROWS, one after the other: no padding, float64, the shift written out."""
    found = []
    for prompt, completion in ROWS:
        ids = torch.tensor([prompt + completion])
        policy, other = (
            (
                model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() / temperature
            ).log_softmax(dim=-1)
            for model in (network, reference)
        )
        chosen = policy[torch.arange(len(completion)), completion]
        probs = policy.exp()
        found.append((chosen, -(probs * policy).sum(-1), (probs * (policy - other)).sum(-1)))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize(
    ("module", "exact_kl"),
    [(loss, False), (equations, False), (equations, True)],
    ids=["loss", "equations", "equations, exact KL"],
)
def test_every_way_gives_the_numbers_of_the_definition(
    module, fast, exact_kl, temperature, monkeypatch
):
    """Values and gradients, asked as train.py asks. The exact KL is in equations.py alone, and so is the gradient of the entropies."""
    monkeypatch.setitem(pieces.LOGITS_AT_A_TIME, "cpu", 300)
    network, reference = family("qwen2", {}), family("qwen2", {})
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.05 * torch.randn_like(p)
    reference.requires_grad_(False)
    expected = by_hand(network, reference, temperature)[: 3 if exact_kl else 2]
    differentiable = expected if module is equations else expected[:1]
    weights = torch.randn(3, len(expected[0]), generator=torch.Generator().manual_seed(1))
    sum((w * x).sum() for w, x in zip(weights, differentiable, strict=False)).backward()
    gradients = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()

    if fast:
        assert all(share_prompts(model, module=module) for model in (network, reference))
    policy, frozen = (
        Policy(model, ways(module)[fast], temperature) for model in (network, reference)
    )
    e = batch_of(ROWS)
    found = [x[e.action_mask] for x in policy(e, frozen if exact_kl else None)]
    for x, true in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), true, rtol=1e-4, atol=1e-5)
    assert [x.requires_grad for x in found] == [
        module is equations or i == 0 for i in range(len(found))
    ]
    sum((w * x).sum() for w, x in zip(weights, found, strict=False) if x.requires_grad).backward()
    scale = max(g.abs().max() for g in gradients)
    for p, true in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, true, rtol=1e-4, atol=1e-5 * float(scale))


@pytest.mark.parametrize("name", FAMILIES)
def test_sharing_prompts_changes_nothing(name, monkeypatch):
    """Log-probabilities, entropies and gradient; with the head in many pieces. Windows are shorter than the rows."""
    monkeypatch.setitem(pieces.LOGITS_AT_A_TIME, "cpu", 300)
    network = family(name, FAMILIES[name])
    assert share_prompts(network, name), "must be one of those that can"
    (plain, plain_gradient), (fast, fast_gradient) = both(network)
    for a, b in zip(plain, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert plain_gradient.norm() > 0.1
    assert (plain_gradient - fast_gradient).norm() < 1e-4 * plain_gradient.norm()


@pytest.mark.parametrize("name", OTHERS)
def test_who_cannot_share_says_so_and_stays_as_it_was(name, capsys):
    network = family(name, OTHERS[name])
    own = network.config._attn_implementation
    assert not share_prompts(network, name)
    assert "computes a prompt once for each completion" in capsys.readouterr().out
    assert network.config._attn_implementation == own


def test_a_head_that_does_more_than_is_known_is_noticed(capsys):
    network = family("llama", {})
    network.lm_head.register_forward_hook(lambda *args: args[2] + torch.arange(99))
    assert share_prompts(network), "a hook is part of the head, and runs in both ways"
    plain = type(network).forward

    class Scaled(type(network)):
        def forward(self, *args, **kwargs):
            output = plain(self, *args, **kwargs)
            output.logits = output.logits * 1.1
            return output

    network.__class__ = Scaled
    assert not share_prompts(network)
    assert "would be off by" in capsys.readouterr().out


def test_exact_kl_through_the_fast_way():
    network, reference = family("qwen2", {}), family("qwen2", {})
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.05 * torch.randn_like(p)
    assert share_prompts(network) and share_prompts(reference)
    (plain, plain_gradient), (fast, fast_gradient) = both(network, reference=reference)
    assert fast[2].min() > 0.001
    torch.testing.assert_close(plain[2], fast[2], rtol=1e-3, atol=1e-4)
    assert (plain_gradient - fast_gradient).norm() < 1e-4 * plain_gradient.norm()


def test_each_prompt_is_computed_once_and_no_padding_at_all():
    """What is saved, in tokens: 4 prompts of 3, 1, 4 and 12, and 13 completion tokens that predict another one."""
    network = family("llama", {})
    assert share_prompts(network)
    seen = []
    network.model.embed_tokens.register_forward_hook(
        lambda _, inputs, output: seen.append(output.shape[:2])
    )
    list(both(network))
    plain, fast = seen
    assert plain == (7, 20)
    assert fast == (1, 20 + sum(len(c) - 1 for _, c in ROWS))


@pytest.mark.parametrize("module", [equations, loss], ids=lambda module: module.__name__)
def test_no_logits_are_kept_for_the_backward_pass(module, monkeypatch):
    """With pieces of 4 tokens, nothing as wide as the vocabulary but the head itself is alive afterwards."""
    monkeypatch.setitem(pieces.LOGITS_AT_A_TIME, "cpu", 4 * 99)
    network = family("llama", {})
    assert share_prompts(network)
    e = batch_of(ROWS)
    kept = []
    for way in ways(module):
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept[-1].append(tuple(x.shape)) or x, lambda x: x
        ):
            way(network, e.sequences, e.attention_mask, e.num_actions)
    plain, fast = (
        [s for s in shapes if 99 in s and s not in ((99, 32), (32, 99))] for shapes in kept
    )
    assert plain, "the plain way keeps the model's own logits"
    assert not fast


def test_without_entropy_gradient_only_the_log_probabilities_have_a_gradient():
    network = family("llama", {})
    assert share_prompts(network)
    e = batch_of(ROWS)
    arguments = e.sequences, e.attention_mask, e.num_actions
    for with_gradient, without in zip(ways(equations), ways(loss), strict=True):
        whole = with_gradient(network, *arguments)
        light = without(network, *arguments)
        assert light[0].requires_grad and not light[1].requires_grad
        for a, b in zip(whole, light, strict=True):
            torch.testing.assert_close(a, b)


LONG = [
    ([*range(3, 13)], [*range(20, 45)]),
    ([*range(3, 13)], [*range(50, 60)]),
    ([*range(4, 34)], [*range(40, 70)]),
]
CORNERS = {
    "one token each": [([5, 6, 7], [8]), ([5, 6, 7], [9]), ([4], [8])],
    "one row": [([5], [8, 9, 10])],
    "the pad token begins a prompt": [
        ([0, 5, 6], [8, 9]),
        ([5, 6], [8, 9, 10]),
        ([0, 0, 5, 6], [8, 9]),
    ],
    "prompts that end alike": [([7, 6, 5], [8, 9]), ([4, 6, 5], [8, 9]), ([7, 6, 5], [9, 9])],
    "long": LONG,
}


@pytest.mark.parametrize("rows", CORNERS.values(), ids=CORNERS)
def test_sharing_in_the_corners(rows):
    network = family("qwen2", {})
    assert share_prompts(network)
    (plain, plain_gradient), (fast, fast_gradient) = both(network, rows=rows)
    torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-4)
    assert (plain_gradient - fast_gradient).norm() < 1e-4 * plain_gradient.norm()


def test_a_capped_head_is_known():
    network = family("gemma3_text", FAMILIES["gemma3_text"] | {"final_logit_softcapping": 3.0})
    assert share_prompts(network)
    (plain, _), (fast, _) = both(network)
    torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-4)


BEYOND = {  # limits that the check's few tokens do not reach, and that the attention function is not told of
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16, "use_sliding_window": True, "sliding_window": 24,
                            "layer_types": ["sliding_attention"] * 2},
    "llama4_text": EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 24, "use_qk_norm": False,
                              "no_rope_layers": [1, 0]},
    "mistral": {"sliding_window": 24}, "cohere2": {"sliding_window": 24},  # these are told
}  # fmt: skip


@pytest.mark.parametrize("name", BEYOND)
def test_a_limit_longer_than_the_check_is_kept_or_refused(name):
    network = family(name, BEYOND[name])
    if share_prompts(network, name):
        (plain, _), (fast, _) = both(network, rows=LONG)
        torch.testing.assert_close(plain, fast, rtol=1e-4, atol=1e-4)
