"""The policy and its frozen reference, the tokenizer, token log-probabilities, the optimizer.

Any causal language model of transformers, by hub name or folder; code from the hub is never run. V is the
vocabulary's size; the other letters are those of replay_buffer.py.
"""

import inspect
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from config import Config, located
from errors import UserError
from replay_buffer import Experience, pad_batch

# The largest piece of fp32 logits that is alive at a time, in numbers: 64 MB.
LOGITS_AT_A_TIME = 2**24
LOWEST_LOGIT = -1e30  # a masked token's; with −inf the entropy and its gradient would have 0 × inf


def build_accelerator(config: Config) -> Accelerator:
    """Device and precision of the run; UserError if the preset wants a GPU that is not there."""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise UserError(
            f"The preset {config.preset} needs a CUDA GPU and there is none here; --preset tiny runs on any machine "
            "(and --device cpu makes this one run without a GPU, slowly)."
        )
    cpu = config.device == "cpu" or not has_cuda
    return Accelerator(cpu=cpu, mixed_precision="bf16" if config.precision == "bf16" else "no")


def load_tokenizer(name: str) -> Any:
    """The model's own tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(located(name))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(loading_failed("tokenizer", name, error)) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"The tokenizer of {name} has no end-of-sequence token, so a completion could never end.")
    return tokenizer


def load_model(name: str, precision: str, gradient_checkpointing: bool = False) -> nn.Module:
    """A causal language model, in fp32 (or bf16 for bf16-pure), without dropout, in eval mode, on the CPU."""
    transformers.utils.logging.disable_progress_bar()
    try:
        architecture = AutoConfig.from_pretrained(located(name))
        if architecture.is_encoder_decoder:
            raise UserError(f"{name} is an encoder-decoder; GRPO here trains causal language models only.")
        # Dropout would make the log-probabilities of sampling and of training differ at random.
        for key, value in vars(architecture).items():
            if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                setattr(architecture, key, 0.0)
        dtype = torch.bfloat16 if precision == "bf16-pure" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(located(name), config=architecture, dtype=dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(loading_failed("model", name, error)) from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.18 and later
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.eval()


def loading_failed(what: str, name: str, error: Exception) -> str:
    """The sentence for a model or tokenizer that cannot be loaded."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"Cannot load the {what} {name!r}: --model takes a hub name or a Hugging Face folder ({reason})"


class Policy(nn.Module):
    """A language model that is asked for the log-probabilities of its completions.

    The module that Accelerate prepares is this one, so precision (and, with several processes, gradient exchange)
    act on the whole computation and not on the logits, which never leave it.
    """

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, experience: Experience, reference: "Policy | None" = None) -> tuple[Tensor, Tensor, Tensor]:
        """What `sequences_log_probs` says of each completion token; with `reference`, its exact KL too."""
        return sequences_log_probs(
            self.model, experience.sequences, experience.attention_mask, experience.num_actions, self.temperature,
            None if reference is None else reference.model,
        )  # fmt: skip


def sequences_log_probs(
    model: nn.Module, sequences: Tensor, attention_mask: Tensor, num_actions: int, temperature: float = 1.0,
    reference: nn.Module | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probabilities of the last `num_actions` tokens of each sequence, and the entropies beside them.

    Args:
        model: a causal language model.
        sequences: int64 (B, P + C); attention_mask: bool (B, P + C).
        num_actions: C.
        temperature: what the sampler divided its logits by.
        reference: a model with the same vocabulary, for the KL.
    Returns:
        log-probabilities, entropies in nats, and KL(model ‖ reference) over the whole vocabulary (0 without a
        reference), all float32 (B, C) and with gradient.
    """
    logits = completion_logits(model, sequences, attention_mask, num_actions).flatten(0, 1)
    others = None
    if reference is not None:
        with torch.no_grad():
            others = completion_logits(reference, sequences, attention_mask, num_actions).flatten(0, 1)
    found = token_log_probs(logits, sequences[:, -num_actions:].flatten(), temperature, others)
    return tuple(x.view(-1, num_actions) for x in found)


def completion_logits(model: nn.Module, sequences: Tensor, attention_mask: Tensor, num_actions: int) -> Tensor:
    """The logits (B, C, V) that the last `num_actions` tokens of each sequence were read off.

    The causal shift is here and nowhere else: the logits at position t are about the token at t + 1, so the
    completion in columns P … P+C-1 is read off the logits at P-1 … P+C-2. No other logits are computed.
    """
    width = sequences.shape[1]
    positions = torch.arange(width - num_actions - 1, width - 1, device=sequences.device)
    inputs = {"input_ids": sequences, "attention_mask": attention_mask.long(), "use_cache": False}
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" in accepted:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]


def token_log_probs(
    logits: Tensor, tokens: Tensor, temperature: float, reference: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of `logits` (N, V) over temperature, read at `tokens` (N,); its entropy; its KL to `reference`.

    All float32 (N,). In pieces that are computed again in the backward pass, so that a full fp32 copy of the logits is
    never alive. Without a reference the KL is 0.
    """

    def scaled(logits: Tensor) -> Tensor:
        return (logits.float() / temperature).clamp(min=LOWEST_LOGIT)

    def piece(logits: Tensor, tokens: Tensor, others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logits = scaled(logits)
        normalizer = logits.logsumexp(-1)
        probs = torch.softmax(logits, -1)
        entropy = normalizer - (probs * logits).sum(-1)
        kl = torch.zeros_like(entropy)
        if others is not None:
            kl = -entropy - (probs * torch.log_softmax(scaled(others), -1)).sum(-1)
        return logits.gather(-1, tokens[:, None]).squeeze(-1) - normalizer, entropy, kl

    rows = max(1, LOGITS_AT_A_TIME // logits.shape[-1])
    pieces = logits.split(rows), tokens.split(rows)
    others = [None] * len(pieces[0]) if reference is None else reference.split(rows)
    found = (checkpoint(piece, *args, use_reentrant=False) for args in zip(*pieces, others, strict=True))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def build_optimizer(policy: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit version from bitsandbytes."""
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(policy.parameters(), **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("--optimizer adamw_8bit needs the package bitsandbytes: pip install bitsandbytes.") from error
    return bitsandbytes.optim.AdamW8bit(policy.parameters(), **settings)


def check_model(model: nn.Module, tokenizer: Any, config: Config) -> None:
    """Raise UserError for a model that cannot do what the run asks of it, before anything is sampled.

    Tokens without an embedding; fewer positions than prompt and completion may need; and architectures (RWKV, for one)
    that read padding as text: their log-probabilities would silently be those of another prompt.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"The tokenizer of {config.model} has {len(tokenizer)} tokens, the model only {rows}: no match."
        )
    positions = vars(model.config).get("max_position_embeddings") or vars(model.config).get("n_positions")
    if positions and positions < config.max_prompt_tokens + config.max_new_tokens:
        raise UserError(
            f"{config.model} reads {positions} tokens at the most; --max_prompt_tokens {config.max_prompt_tokens} and "
            f"--max_new_tokens {config.max_new_tokens} together must not be more."
        )
    short = Experience.of([1, 2, 3], [4, 5], 0.0, 0.0)
    with torch.no_grad():
        alone, padded = (
            sequences_log_probs(model, batch.sequences[:1], batch.attention_mask[:1], 2)[0]
            for batch in (pad_batch([short]), pad_batch([short, Experience.of([6] * 9, [4, 5], 0.0, 0.0)]))
        )
    if (alone - padded).abs().max() > 0.5:
        raise UserError(f"{config.model} does not leave padding out of its computation; choose an attention model.")
