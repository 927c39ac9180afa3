"""The policy and its frozen reference, the tokenizer, the optimizer: loaded, and looked at before they are used.

Any causal language model of transformers, by hub name or folder; code from the hub is never run.
"""

import copy
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from config import Config, located
from errors import UserError
from log_probs import sequences_log_probs
from replay_buffer import Experience, pad_batch


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
    # Out of the file's memory map, where a tensor may begin at any byte: matrix products round by alignment, so a run
    # that had loaded a checkpoint would differ in the last bit from one that has trained the same weights.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.18 and later
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.eval()


@torch.no_grad()
def decoding_copy(model: nn.Module, name: str) -> nn.Module | None:
    """The model again in bf16, to sample from: half the bytes for each token, and no autocast between its operations.

    Its buffers stay as they are: rotary frequencies in bf16 would put late tokens in wrong places. None for models that
    do not take that (XGLM); those are sampled from in fp32.
    """
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    try:
        twin(input_ids=torch.tensor([[1, 2, 3]], device=twin.device))
    except RuntimeError as error:
        print(f"{name} cannot be sampled from in bf16 ({' '.join(str(error).split())[:80]}): fp32, slower")
        return None
    return twin


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the weights of `source`, in its own precision."""
    for theirs, own in zip(source.parameters(), target.parameters(), strict=True):
        own.copy_(theirs)


def loading_failed(what: str, name: str, error: Exception) -> str:
    """The sentence for a model or tokenizer that cannot be loaded."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"Cannot load the {what} {name!r}: --model takes a hub name or a Hugging Face folder ({reason})"


def build_optimizer(policy: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit version from bitsandbytes."""
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(policy.parameters(), fused=True, **settings)  # half the time of the default, on a CPU
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
