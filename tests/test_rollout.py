"""rollout.py: what is sampled is what the log-probabilities describe, and completions end where they end."""

import pytest
import torch

from data import Question
from model import sequences_log_probs
from rollout import Completion, Sampling, complete, cut, end_tokens, rollout


@pytest.fixture
def prompts(tokenizer):
    texts = ["<|user|>Tom has 5 apples.<|end|><|assistant|>", "Tom", "How many books does Zoe have?"]
    return [tokenizer(t)["input_ids"] for t in texts]


def test_groups_in_order(model, tokenizer, prompts):
    questions = [Question("q", "1", "", prompt_ids=p) for p in prompts]
    for size in (1, 4, 100):  # sequences per generate call: chunks cut through groups
        groups = rollout(model, tokenizer, questions, 3, Sampling(4, 0.0, batch_size=size))
        assert [len(g) for g in groups] == [3, 3, 3]
        for prompt, group in zip(prompts, groups, strict=True):
            alone = complete(model, tokenizer, [prompt], Sampling(4, 0.0))[0]
            assert all(c.ids == alone.ids for c in group), "greedy, so each one equals the prompt's answer alone"


def test_the_end_token_stays_and_truncation_is_marked(tokenizer):
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    word = tokenizer(" apples")["input_ids"][0]
    assert cut([word, end, pad, pad], [end], tokenizer) == Completion([word, end], " apples", False)
    assert cut([word, end, end, end], [end], tokenizer).ids == [word, end], "pad = end"
    assert cut([end, pad], [end], tokenizer) == Completion([end], "", False), "an empty answer still has its end token"
    assert cut([word, word], [end], tokenizer) == Completion([word, word], " apples apples", True)
    assert cut([word, 7, pad], [end, 7], tokenizer).ids == [word, 7], "any of several end tokens"


def test_pad_equal_to_end(model, tokenizer, prompts):
    """Faults 1 and 2 through the whole of generate: a tokenizer whose pad is its end token, as Llama users make it."""
    expected = complete(model, tokenizer, prompts, Sampling(6, 0.0))
    pad = tokenizer.pad_token
    try:
        for other in (tokenizer.eos_token, None):
            tokenizer.pad_token = other
            assert complete(model, tokenizer, prompts, Sampling(6, 0.0)) == expected
    finally:
        tokenizer.pad_token = pad


def test_the_budget_is_the_completions_own(model, tokenizer, prompts):
    """Fault 10: a max_length that counts the prompt leaves long questions short answers."""
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    model.lm_head.weight.data *= 5
    done = complete(model, tokenizer, [prompts[0] * 5, prompts[1]], Sampling(7, 0.0))
    assert all(len(c.ids) == 7 and c.truncated for c in done if tokenizer.eos_token_id not in c.ids)


def test_nothing_leaks_from_the_models_own_settings(model, tokenizer, prompts):
    """Fault 8: Qwen's own top_k 20 and repetition penalty would shape the samples, not the log-probabilities.

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
    assert model.generation_config.top_k == 1, "and the model's own settings are put back, for its checkpoint"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_log_probabilities(model, tokenizer, prompts, temperature):
    """Fault 9: frequencies of 20,000 first tokens against exp(log_probs) at the same temperature, by chi-square.

    False alarm: about one in a million, were the seed not fixed.
    """
    model.lm_head.weight.data *= 20
    torch.manual_seed(0)
    done = complete(model, tokenizer, [prompts[0]] * 20000, Sampling(1, temperature, batch_size=5000))
    counts = torch.bincount(torch.tensor([c.ids[0] for c in done]), minlength=len(tokenizer)).double()
    every = torch.tensor([prompts[0] + [token] for token in range(len(tokenizer))])
    log_probs, *_ = sequences_log_probs(model, every, torch.ones_like(every, dtype=torch.bool), 1, temperature)
    expected = log_probs[:, 0].detach().double().exp() * 20000
    assert expected.sum() == pytest.approx(20000, rel=1e-4)
    common = expected > 5
    chi = ((counts - expected)[common] ** 2 / expected[common]).sum()
    degrees = int(common.sum())
    assert chi < degrees + 6 * (2 * degrees) ** 0.5, (chi, degrees)
    wrong = sequences_log_probs(model, every, torch.ones_like(every, dtype=torch.bool), 1, temperature * 1.3)[0][:, 0]
    wrong = wrong.detach().double().exp() * 20000
    assert ((counts - wrong)[wrong > 5] ** 2 / wrong[wrong > 5]).sum() > 2 * chi, "the test can tell temperatures apart"


def test_all_end_tokens_count(model, tokenizer):
    model.generation_config.eos_token_id = [9, 4]
    assert end_tokens(model, tokenizer) == sorted({9, 4, tokenizer.eos_token_id})
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]
