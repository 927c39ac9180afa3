"""Tried before a run: the model does what GRPO asks of it, and sampler and trainer agree.

What belongs to the algorithm (log-probabilities, sampling) is handed in.
"""

import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import GenerationConfig

from support.config import Config
from support.data import Question
from support.errors import UserError, is_of_the_disk
from support.generation import Sampling, replaced_generation_config
from support.model import logits_at, pad_rows

TOKENS = 16  # of each completion that is tried
# Nats for a token. Rounding is 1e-6, and 0.03 in bf16 at the most.
GAP = {"fp32": 1e-3, "bf16": 0.3, "bf16-pure": 0.3}

# What the code of a model may raise for a config or an input that it does not take.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    StrictDataclassError,
)


def mend_padding(tokenizer: Any, rows: int) -> bool:
    """Whether a padding token of its own is all that a tokenizer has beyond the model's rows.

    Some tools (Unsloth) add one, and the model never sees it: the end token takes its place.
    """
    beyond = [token for token, place in tokenizer.get_vocab().items() if place >= rows]
    if beyond != [tokenizer.pad_token]:
        return False
    print(f"the padding token {tokenizer.pad_token} has no place in the model: the end token pads")
    tokenizer.pad_token = tokenizer.eos_token
    return True


def check_model(
    model: nn.Module, tokenizer: Any, config: Config, log_probs: Callable[..., tuple[Tensor, ...]]
) -> None:
    """Raise UserError for a model that cannot do what the run asks of it, before it samples.

    Tokens without an embedding; fewer positions than prompt and completion may need; and what
    `find_fault` finds.

    Args:
        log_probs: of padded sequences, as loss.sequences_log_probs.
    """
    try:
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows and not mend_padding(tokenizer, rows):
            raise UserError(
                f"The tokenizer of {config.model} has {len(tokenizer)} tokens, the model only "
                f"{rows}: no match. Give the model its own tokenizer."
            )
        settings = vars(model.config)
        positions = settings.get("max_position_embeddings") or settings.get("n_positions")
        if positions and positions < config.max_prompt_tokens + config.max_new_tokens:
            raise UserError(
                f"{config.model} reads {positions} tokens at the most; --max_prompt_tokens "
                f"{config.max_prompt_tokens} and --max_new_tokens {config.max_new_tokens} together "
                "must not be more."
            )
        fault = find_fault(model, log_probs)
    except REFUSALS as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(
            f"{config.model} does not work as a language model of text alone ({words})."
        ) from error
    if fault:
        raise UserError(f"{config.model} {fault}.")


@torch.no_grad()
def find_fault(model: nn.Module, log_probs: Callable[..., tuple[Tensor, ...]]) -> str:
    """What keeps the log-probabilities from being those of the text, tried on a few tokens; or "".

    Encoders (BERT), which transformers loads as causal language models with attention to both
    sides. Architectures (RWKV, for one) that read padding as text: their log-probabilities would
    silently be those of another prompt. And those whose state in `generate` is not what a pass over
    the whole text would have.
    """
    # The same completion of the same prompt: alone, beside a longer prompt, and with other tokens
    # after it. Long enough for attention that puts neighbours together (DeepSeek V4), which padding
    # puts together otherwise. The completion is the model's own: of tokens that it finds unlikely,
    # the rounding of bf16 alone moves the log-probability by whole nats.
    prompt, longer = list(range(1, 14)), [6] * 18
    completion = likely_tokens(model, prompt, 4)
    both = pad_rows([(prompt, completion), (longer, completion)])
    alone, beside, before = (
        log_probs(model, *batch)[0][0, :4]
        for batch in (
            pad_rows([(prompt, completion)]),
            both,
            pad_rows([(prompt, [*completion, 6, 7])]),
        )
    )
    if not alone.isfinite().all():
        return "computes NaN: its weights are damaged; download or save it again"
    # Rounding alone may choose another expert, of a like weight.
    most = 0.05 if model.dtype == torch.float32 else 0.5
    if (alone - before).abs().max() > most:
        return (
            "looks at the tokens that come after, as an encoder does; choose a causal language "
            "model"
        )
    if (alone - beside).abs().max() > most:
        return "does not leave padding out of its computation; choose an attention model"
    if generation_gap(model, both[0][:, :18], both[1][:, :18]) > most:
        return (
            "generates from other probabilities than a pass over the whole text has; choose an "
            "attention model"
        )
    return ""


def check_saving(model: nn.Module, tokenizer: Any, name: str) -> None:
    """UserError for a model that could be trained and then not be saved; tried without weights."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:  # transformers raises many kinds for settings that it refuses
            if is_of_the_disk(error):  # which says nothing of the model
                return
            raise UserError(
                f"{name} could be trained, but not saved ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); mend its generation_config.json, "
                "config.json or tokenizer first."
            ) from error


def likely_tokens(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """What the model finds likeliest after a prompt, one token after the other, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        row = torch.tensor([ids], device=model.device)
        last = torch.tensor([len(ids) - 1], device=model.device)
        logits = logits_at(model, row, torch.ones_like(row, dtype=torch.bool), last)
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def generation_gap(model: nn.Module, prompts: Tensor, mask: Tensor) -> float:
    """How far `generate` is from a pass over the whole text, in nats, at its own tokens."""
    settings = GenerationConfig(
        max_new_tokens=8, output_logits=True, return_dict_in_generate=True, pad_token_id=1
    )
    with replaced_generation_config(model, settings):
        output = model.generate(
            input_ids=prompts, attention_mask=mask.long(), generation_config=settings
        )
    logits = torch.stack(output.logits, dim=1)
    mask = nn.functional.pad(mask, (0, logits.shape[1]), value=True)
    # Picked by position, as the log-probabilities do: a head that picks others is noticed here.
    width = output.sequences.shape[1]
    positions = torch.arange(width - logits.shape[1] - 1, width - 1, device=prompts.device)
    again = logits_at(model, output.sequences, mask, positions)
    gap = logits.float().log_softmax(dim=-1) - again.float().log_softmax(dim=-1)
    chosen = output.sequences[:, -logits.shape[1] :]
    return gap.gather(-1, chosen.unsqueeze(-1)).abs().max().item()


@torch.no_grad()
def check_sampler(
    sample: Callable[..., list[Any]],
    policy: Any,
    pad_batch: Callable[[list[Any]], Any],
    questions: list[Question],
    config: Config,
) -> None:
    """Sample a few completions and ask the trainer how likely their tokens are.

    Padding that is read as text, positions that count it, a precision or a head of the trainer's
    own, a cache that forgets: all of them show as a distance between the log-probability that a
    token was drawn with and the trainer's. The shortest and the longest prompt are sampled
    together, so that one is padded; the trainer is asked about each completion alone and about all
    together.

    Args:
        sample: groups of completions for questions, as rollout.rollout.
        policy: log-probabilities of a padded batch. pad_batch: makes one of experiences.
    Raises:
        UserError: the two disagree.
    """
    ranked = sorted(questions, key=lambda question: len(question.prompt_ids))
    sampling = Sampling(min(TOKENS, config.max_new_tokens), config.temperature)
    groups = sample([ranked[0], ranked[-1]], 2, sampling)
    experiences = [experience for group in groups for experience in group.experiences]
    drawn = torch.cat([experience.sampler_log_probs for experience in experiences])
    alone, together = [[experience] for experience in experiences], [experiences]
    limit = GAP[config.precision] / min(1.0, config.temperature)
    policy.train()  # as in the update: what is random there is noticed here
    said = [ask_policy(policy, map(pad_batch, batches)) for batches in (alone, together, together)]
    policy.eval()
    noise = (said[2] - said[1]).abs().mean().item()
    if noise > limit / 10:
        raise UserError(
            f"{config.model} gives other log-probabilities each time that it is trained "
            f"({noise:.2g} nats per token apart): it has a dropout, or other noise, of its own; "
            "try another model."
        )
    gaps = [(log_probs - drawn).abs().mean().item() for log_probs in said]
    if not max(gaps) <= limit:
        finer = "" if config.precision == "fp32" else "--precision fp32, or "
        raise UserError(
            f"{config.model} is sampled from otherwise than it is trained: log-probabilities "
            f"differ by {max(gaps):.2g} nats per token, and rounding would be below {limit:.2g}; "
            f"try {finer}another model."
        )
    print(
        f"tried: sampler and trainer give the same log-probabilities ({max(gaps):.1g} nats per "
        "token apart)"
    )


def ask_policy(policy: Any, batches: Iterable[Any]) -> Tensor:
    """What a policy says of the tokens of padded batches, one after the other: float32 (N,)."""
    found = []
    for batch in batches:
        found.append(policy(batch)[0].float().cpu()[batch.action_mask])
    return torch.cat(found)
