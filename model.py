"""The policy and its frozen reference, the tokenizer, the optimizer: loaded, and looked at before they are used.

Any causal language model of transformers, by hub name or folder; code from the hub is never run.
"""

import copy
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from config import Config, located
from errors import UserError
from log_probs import completion_logits, sequences_log_probs
from replay_buffer import Experience, pad_batch

# What the code of a model may raise for a config or an input that it does not take.
REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    StrictDataclassError,
)  # fmt: skip


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
    except (*REFUSALS, ImportError, OSError) as error:  # it reads the model's config too
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
    except (*REFUSALS, ImportError, OSError, SafetensorError) as error:  # a model class may raise anything
        raise UserError(loading_failed("model", name, error)) from error
    # Out of the file's memory map, where a tensor may begin at any byte: matrix products round by alignment, so a run
    # that had loaded a checkpoint would differ in the last bit from one that has trained the same weights.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"{name} cannot recompute activations; give --gradient_checkpointing false.")
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
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = " ".join(map(str.strip, lines[: 2 if lines[0].endswith(":") else 1]))
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

    Tokens without an embedding; fewer positions than prompt and completion may need; and what `trial` finds.
    """
    try:
        rows = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise UserError(
                f"The tokenizer of {config.model} has {len(tokenizer)} tokens, the model only {rows}: no match."
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
    most = 0.05 if model.dtype == torch.float32 else 0.5  # rounding alone may choose another expert, of a like weight
    if (alone - before).abs().max() > most:
        return "is no causal language model: what it says of a token depends on later ones"
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
