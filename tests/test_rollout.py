"""rollout.py: what is sampled is what the log-probabilities describe, and completions end where they end."""

import pytest
import torch
from conftest import BARE
from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

import rollout as rollout_file
from loss import sequences_log_probs
from rollout import Completion, rollout, trim_at_eos
from support.config import resolve_path
from support.data import Question, load_questions
from support.errors import UserError
from support.generation import Sampling, TokenSampler, end_tokens, with_seeds
from support.model import load_model
from support.prompts import with_prompts


def complete(model, tokenizer, prompts, sampling):
    """One completion for each prompt, each with random numbers of its own."""
    return rollout_file.complete(model, tokenizer, with_seeds(prompts), sampling)


@pytest.fixture
def prompts(tokenizer):
    texts = [
        "<|user|>Tom has 5 apples.<|end|><|assistant|>",
        "Tom",
        "How many books does Zoe have?",
    ]
    return [tokenizer(t)["input_ids"] for t in texts]


@pytest.fixture(scope="module")
def questions(tokenizer):
    """The bundled test questions, with their prompts."""
    found = load_questions(resolve_path("tiny/task"), "test")
    return with_prompts(found, tokenizer, BARE)[0]


def test_groups_in_order(model, tokenizer, prompts):
    questions = [Question("q", "1", "", prompt_ids=p) for p in prompts]
    for size in (1, 4, 100):  # sequences per generate call: chunks cut through groups
        groups = rollout(model, tokenizer, questions, 3, Sampling(4, 0.0, batch_size=size))
        assert [g.question for g in groups] == questions
        assert [len(g.completions) for g in groups] == [3, 3, 3]
        for prompt, group in zip(prompts, groups, strict=True):
            alone = complete(model, tokenizer, [prompt], Sampling(4, 0.0))[0]
            assert all(c.ids == alone.ids for c in group.completions), (
                "greedy, so each one equals the prompt's answer alone"
            )


def test_the_end_token_stays_and_truncation_is_marked(tokenizer):
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    word = tokenizer(" apples")["input_ids"][0]

    def trim(ids, ends=(end,), log_probs=()):
        return trim_at_eos(ids, [*log_probs], [*ends], tokenizer)

    assert trim([word, end, pad, pad]) == Completion([word, end], " apples", False)
    assert trim([word, end, end, end]).ids == [word, end], "pad = end"
    assert trim([end, pad]) == Completion([end], "", False), (
        "an empty answer still has its end token"
    )
    assert trim([word, word]) == Completion([word, word], " apples apples", True)
    assert trim([word, 7, pad], ends=[end, 7]).ids == [word, 7], "any of several end tokens"
    assert trim([word, end, pad], log_probs=[-1.0, -2.0, -3.0]).log_probs == [-1.0, -2.0]


def test_pad_equal_to_end(model, tokenizer, prompts):
    """Through the whole of generate, with a tokenizer whose pad token is its end token, as Llama users make it."""
    expected = complete(model, tokenizer, prompts, Sampling(6, 0.0))
    pad = tokenizer.pad_token
    try:
        for other in (tokenizer.eos_token, None):
            tokenizer.pad_token = other
            assert complete(model, tokenizer, prompts, Sampling(6, 0.0)) == expected
    finally:
        tokenizer.pad_token = pad


def test_the_budget_is_the_completions_own(model, tokenizer, prompts):
    """A limit that counts the prompt (transformers' max_length) would leave long questions short answers."""
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    model.lm_head.weight.data *= 5
    done = complete(model, tokenizer, [prompts[0] * 5, prompts[1]], Sampling(7, 0.0))
    assert all(len(c.ids) == 7 and c.truncated for c in done if tokenizer.eos_token_id not in c.ids)


def test_nothing_leaks_from_the_models_own_settings(model, tokenizer, prompts):
    """Qwen's own top_k 20 and repetition penalty would shape the samples, but not the log-probabilities.

    With all logits equal every one of the 121 tokens has the same chance; a top_k of 1 would leave one of them.
    2,000 draws miss a given token with probability 7e-8.
    """
    model.lm_head.weight.data.zero_()
    leaks = {
        "top_k": 1, "top_p": 0.01, "temperature": 0.01, "repetition_penalty": 9.0, "min_p": 0.9, "do_sample": False,
        "suppress_tokens": [5], "max_new_tokens": 3, "min_new_tokens": 2, "bad_words_ids": [[6]], "num_beams": 1,
        "forced_eos_token_id": 9, "no_repeat_ngram_size": 1, "typical_p": 0.1, "epsilon_cutoff": 0.5,
    }  # fmt: skip
    model.generation_config.update(**leaks)
    torch.manual_seed(0)
    done = complete(model, tokenizer, [prompts[1]] * 2000, Sampling(1, 1.0, batch_size=2000))
    assert len({c.ids[0] for c in done}) == len(tokenizer)
    assert model.generation_config.top_k == 1, (
        "and the model's own settings are put back, for its checkpoint"
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_log_probabilities(model, tokenizer, prompts, temperature):
    """The frequencies of 20,000 first tokens against exp(log_probs) at the same temperature, by chi-square.

    False alarm: about one in a million, were the seed not fixed.
    """
    model.lm_head.weight.data *= 20
    torch.manual_seed(0)
    done = complete(
        model, tokenizer, [prompts[0]] * 20000, Sampling(1, temperature, batch_size=5000)
    )
    counts = torch.bincount(
        torch.tensor([c.ids[0] for c in done]), minlength=len(tokenizer)
    ).double()
    every = torch.tensor([prompts[0] + [token] for token in range(len(tokenizer))])
    log_probs, *_ = sequences_log_probs(
        model, every, torch.ones_like(every, dtype=torch.bool), 1, temperature
    )
    expected = log_probs[:, 0].detach().double().exp() * 20000
    assert expected.sum() == pytest.approx(20000, rel=1e-4)
    common = expected > 5
    chi = ((counts - expected)[common] ** 2 / expected[common]).sum()
    degrees = int(common.sum())
    assert chi < degrees + 6 * (2 * degrees) ** 0.5, (chi, degrees)
    wrong = sequences_log_probs(
        model, every, torch.ones_like(every, dtype=torch.bool), 1, temperature * 1.3
    )[0][:, 0]
    wrong = wrong.detach().double().exp() * 20000
    assert ((counts - wrong)[wrong > 5] ** 2 / wrong[wrong > 5]).sum() > 2 * chi, (
        "the test can tell temperatures apart"
    )


def plain_greedy(network, prompt, end, budget):
    """The slow way: the whole sequence again for every token, without cache, padding or batch."""
    ids = list(prompt)
    while len(ids) < len(prompt) + budget and ids[len(prompt) :][-1:] != [end]:
        ids.append(int(network(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_the_whole_forward_pass_token_by_token(tokenizer, questions):
    """The bundled model, whose answers end at different lengths, so that rows leave while others go on."""
    network = load_model("tiny/model", "fp32")
    prompts = [q.prompt_ids for q in questions[:12]] + [[5], [5, 9]]
    done = complete(network, tokenizer, prompts, Sampling(40, 0.0))
    assert len({len(c.ids) for c in done}) > 2, "or nothing leaves early"
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.ids == plain_greedy(network, prompt, tokenizer.eos_token_id, 40)
        assert completion.truncated == (completion.ids[-1] != tokenizer.eos_token_id)


def watched(network):
    """A list of the (rows, columns) of every forward pass."""
    seen = []
    network.model.embed_tokens.register_forward_hook(
        lambda _, inputs, output: seen.append(tuple(output.shape[:2]))
    )
    return seen


def test_prompts_are_read_once_and_ended_rows_make_room(tokenizer, questions):
    network = load_model("tiny/model", "fp32")
    seen = watched(network)
    torch.manual_seed(0)
    groups = rollout(network, tokenizer, questions[:4], 32, Sampling(48, batch_size=128))
    width = max(len(q.prompt_ids) for q in questions[:4])
    assert seen[0] == (4, width - 1), "4 prompts, not 128; their last tokens go with the first step"
    assert seen[1] == (128, 1)
    rows = [r for r, columns in seen[1:]]
    assert all(columns == 1 for _, columns in seen[1:]) and sorted(rows, reverse=True) == rows
    lengths = sorted((len(c.ids) for g in groups for c in g.completions), reverse=True)
    for t, n in enumerate(rows):
        going = sum(length > t for length in lengths)
        assert going <= n <= max(2 * going, 1), "at the most half of a batch has ended"
    assert rows[-1] < 64


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_token_was_drawn_with_the_trainers_own_log_probability(
    tokenizer, questions, temperature
):
    """Across prompts of several lengths and rows that leave: cache, padding and positions stay right to the end."""
    network = load_model("tiny/model", "fp32")
    torch.manual_seed(0)
    groups = rollout(network, tokenizer, questions[:6], 8, Sampling(48, temperature, batch_size=20))
    flat = [(g.question, c) for g in groups for c in g.completions]
    assert len({len(c.ids) for _, c in flat}) > 5
    for q, c in flat:
        sequence = torch.tensor([q.prompt_ids + c.ids])
        mask = torch.ones_like(sequence, dtype=torch.bool)
        expected, *_ = sequences_log_probs(network, sequence, mask, len(c.ids), temperature)
        torch.testing.assert_close(
            torch.tensor(c.log_probs), expected[0].detach(), rtol=1e-3, atol=1e-4
        )


def test_a_token_without_probability_is_never_drawn():
    """At both ends of the random numbers, and for a tail that single precision would lose: 10⁵ tokens of 10⁻⁹ each."""
    scores = torch.full((4, 700), -torch.inf)
    scores[:, 2], scores[:, 300], scores[:, 304] = 0.3, 0.2, 0.1
    for number, token in ((0.0, 2), (0.5, 300), (1 - 2**-53, 304)):
        draw = TokenSampler(Sampling(1), torch.full((4, 1), number, dtype=torch.float64))
        chosen = draw(None, scores.clone())
        assert chosen.argmax(-1).tolist() == [token] * 4 and (chosen.exp().sum(-1) == 1).all()
        torch.testing.assert_close(draw.log_probs()[:, 0], scores.log_softmax(-1)[:, token])
    long = torch.full((1, 100_001), -20.72)
    long[0, 0] = 0.0
    number = torch.full((1, 1), 1 - 0.25e-4, dtype=torch.float64)
    assert TokenSampler(Sampling(1), number)(None, long).argmax(-1).item() == pytest.approx(
        75_000, rel=0.01
    )


def test_what_is_drawn_depends_neither_on_the_batch_nor_on_the_others(model, tokenizer, questions):
    """Batches of 1, 5 and 100, and a longer budget: the same tokens, and no two rows alike."""
    model.lm_head.weight.data *= 20
    found = []
    for size, budget in ((1, 12), (5, 12), (100, 12), (100, 20)):
        torch.manual_seed(3)
        sampling = Sampling(budget, batch_size=size)
        groups = rollout(model, tokenizer, questions[:4], 4, sampling)
        found.append([c.ids[:12] for group in groups for c in group.completions])
    assert found[0] == found[1] == found[2] == found[3]
    assert len({tuple(ids) for ids in found[0]}) > 12
    torch.manual_seed(4)
    other = rollout(model, tokenizer, questions[:4], 4, Sampling(12))
    assert [c.ids for group in other for c in group.completions] != found[0]


def test_a_model_with_another_kind_of_state_is_sampled_plainly(tokenizer):
    """Mamba has no keys and values that could be repeated or dropped."""
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4
    )
    network = MambaForCausalLM(config).eval()
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    alone = [complete(network, tokenizer, [p], Sampling(6, 0.0))[0] for p in ([5, 6, 7], [8, 9, 4])]
    assert complete(network, tokenizer, [[5, 6, 7], [8, 9, 4]], Sampling(6, 0.0)) == alone


def test_all_end_tokens_count(model, tokenizer):
    model.generation_config.eos_token_id = [9, 4]
    assert end_tokens(model, tokenizer) == sorted({9, 4, tokenizer.eos_token_id})
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]


def test_a_cache_that_holds_more_than_keys_and_values(tokenizer):
    """LFM2's convolutions keep a state that cannot be picked from by row; its class does not say `_is_stateful`."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    network = Lfm2ForCausalLM(config).eval()
    prompts = [[9, 6, 7], [5, 6, 4], [9, 6, 7]]
    done = complete(network, tokenizer, prompts, Sampling(6, 0.0))
    assert [c.ids for c in done] == [
        plain_greedy(network, p, tokenizer.eos_token_id, 6) for p in prompts
    ]


def test_the_pad_token_as_a_prompts_own(tokenizer):
    """Only the mask tells [pad] 5 9 from 5 9 when prompts are read once; and any of several end tokens ends a row."""
    network = load_model("tiny/model", "fp32")
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    prompts = [[pad, 5, 9], [5, 9], [pad, pad, 5, 9], [pad], [end, 5, end, 9]]
    for size in (1, 64):
        for prompt, c in zip(
            prompts,
            complete(network, tokenizer, prompts, Sampling(20, 0.0, batch_size=size)),
            strict=True,
        ):
            assert c.ids == plain_greedy(network, prompt, end, 20)


def test_logits_that_are_not_finite_are_said(model, tokenizer):
    """Not an index out of range, which on a GPU ends the process's use of it. One row of three is enough."""
    for bad in (float("nan"), float("inf")):
        draw = TokenSampler(Sampling(1), torch.full((3, 1), 0.5, dtype=torch.float64))
        scores = torch.zeros(3, 1000)
        scores[1, 7] = bad
        out = draw(torch.zeros(3, 1, dtype=torch.long), scores)
        assert (out == 0).sum(-1).tolist() == [1, 1, 1]
        assert draw.columns[0].isnan().squeeze(-1).tolist() == [False, True, False]
        with pytest.raises(UserError, match="logits are not finite"):
            draw.log_probs()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(UserError, match="logits are not finite"):
        complete(model, tokenizer, [[4, 5], [6]], Sampling(4))
