"""What is tried before a run begins: does the model do what GRPO asks of it, is the sampler what the trainer thinks?"""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import GenerationConfig

from config import Config
from data import Question
from errors import UserError
from log_probs import completion_logits, sequences_log_probs
from replay_buffer import Experience, pad_batch
from rollout import Sampling, rollout

TOKENS = 16  # of each completion that is tried
GAP = {"fp32": 1e-3, "bf16": 0.3, "bf16-pure": 0.3}  # nats per token; rounding is 1e-6, and 0.03 in bf16 at the most


# What the code of a model may raise for a config or an input that it does not take.
REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    StrictDataclassError,
)  # fmt: skip


def check_model(model: nn.Module, tokenizer: Any, config: Config) -> None:
    """Raise UserError for a model that cannot do what the run asks of it, before anything is sampled.

    Tokens without an embedding; fewer positions than prompt and completion may need; and what `trial` finds.
    """
    try:
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise UserError(
                f"The tokenizer of {config.model} has {len(tokenizer)} tokens, the model only {rows}: no match. "
                "Give the model its own tokenizer."
            )
        positions = vars(model.config).get("max_position_embeddings") or vars(model.config).get("n_positions")
        if positions and positions < config.max_prompt_tokens + config.max_new_tokens:
            raise UserError(
                f"{config.model} reads {positions} tokens at the most; --max_prompt_tokens {config.max_prompt_tokens} "
                f"and --max_new_tokens {config.max_new_tokens} together must not be more."
            )
        fault = trial(model)
    except REFUSALS as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{config.model} does not work as a language model of text alone ({words}).") from error
    if fault:
        raise UserError(f"{config.model} {fault}.")


@torch.no_grad()
def trial(model: nn.Module) -> str:
    """What keeps the log-probabilities from being those of the text, tried on a few tokens; empty if nothing does.

    Encoders (BERT), which transformers loads as causal language models with attention to both sides; architectures
    (RWKV, for one) that read padding as text: their log-probabilities would silently be those of another prompt; and
    those whose state in `generate` is not what a pass over the whole text would have.
    """
    # The same completion of the same prompt: alone, beside a longer prompt, and with other tokens after it. Long enough
    # for attention that puts neighbours together (DeepSeek V4), which padding puts together otherwise.
    prompt, completion = list(range(1, 14)), [9, 4, 5, 2]
    rows = (prompt, completion), ([6] * 18, completion), (prompt, [*completion, 6, 7])
    short, longer, more = (Experience.of(*row, 0.0, 0.0) for row in rows)
    padded = pad_batch([short, longer])
    alone, beside, before = (
        sequences_log_probs(model, batch.sequences[:1], batch.attention_mask[:1], batch.num_actions)[0][:, :4]
        for batch in (pad_batch([short]), padded, pad_batch([more]))
    )
    if not alone.isfinite().all():
        return "computes NaN: its weights are damaged; download or save it again"
    most = 0.05 if model.dtype == torch.float32 else 0.5  # rounding alone may choose another expert, of a like weight
    if (alone - before).abs().max() > most:
        return "looks at the tokens that come after, as an encoder does; choose a causal language model"
    if (alone - beside).abs().max() > most:
        return "does not leave padding out of its computation; choose an attention model"
    prompts, mask = padded.sequences[:, :18], padded.attention_mask[:, :18]
    settings = GenerationConfig(max_new_tokens=8, output_logits=True, return_dict_in_generate=True, pad_token_id=1)
    own, model.generation_config = model.generation_config, settings  # or generate fills in beams and such from it
    try:
        output = model.generate(input_ids=prompts, attention_mask=mask.long(), generation_config=settings)
    finally:
        model.generation_config = own
    logits = torch.stack(output.logits, 1)
    mask = nn.functional.pad(mask, (0, logits.shape[1]), value=True)
    again = completion_logits(model, output.sequences, mask, logits.shape[1])
    if (logits.float().log_softmax(-1) - again.float().log_softmax(-1)).abs().max() > most:
        return "generates from other probabilities than a pass over the whole text has; choose an attention model"
    return ""


@torch.no_grad()
def check_sampler(
    model: nn.Module, policy: nn.Module, tokenizer: Any, questions: list[Question], config: Config
) -> None:
    """Sample a few completions and ask the trainer how likely their tokens are; UserError if the two disagree.

    Padding that is read as text, positions that count it, a precision or a head of the trainer's own, a cache that
    forgets: all of them show as a distance between the log-probability that a token was drawn with and the trainer's.
    The shortest and the longest prompt are sampled together, so that one is padded; the trainer is asked about each
    completion alone and about all together.

    Args:
        model: what is sampled from; policy: what `sequences_log_probs` is asked of (a Policy, on the same device).
    """
    ranked = sorted(questions, key=lambda q: len(q.prompt_ids))
    chosen = [ranked[0], ranked[-1]]
    sampling = Sampling(min(TOKENS, config.max_new_tokens), config.temperature)
    groups = rollout(model, tokenizer, chosen, 2, sampling)
    completions = [(q, c) for q, group in zip(chosen, groups, strict=True) for c in group]
    experiences = [Experience.of(q.prompt_ids, c.ids, 0.0, 0.0) for q, c in completions]
    drawn = torch.cat([torch.tensor(c.log_probs) for _, c in completions])
    gaps = []
    for batches in ([[e] for e in experiences], [experiences]):
        found = []
        for items in batches:
            batch = pad_batch(items).to(model.device)
            found.append(policy(batch)[0][batch.action_mask].float().cpu())
        gaps.append((torch.cat(found) - drawn).abs().mean().item())
    limit = GAP[config.precision] / min(1.0, config.temperature)
    if not max(gaps) <= limit:
        other = "another model" if config.precision == "fp32" else "--precision fp32, or another model"
        raise UserError(
            f"{config.model} is sampled from otherwise than it is trained: log-probabilities differ by {max(gaps):.2g} "
            f"nats per token, and rounding would be below {limit:.2g}; try {other}."
        )
    print(f"tried: sampler and trainer give the same log-probabilities ({max(gaps):.1g} nats per token apart)")
