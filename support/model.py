"""Models, tokenizers and optimizers: loaded, and looked at before they are used.

Any causal language model of transformers, by hub name or folder; code from the hub is never run.
"""

import copy
import inspect
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from support.adapters import (
    add_adapter,
    describe_adapter,
    has_adapter,
    keep_gradients,
    load_adapter,
    quantization,
    read_adapter,
)
from support.config import PRESETS, Config, check_place, multiplies_bf16_fast, resolve_path
from support.distributed import num_processes
from support.errors import UserError, refuse_several
from support.model_card import without_prompt


def build_accelerator(config: Config) -> Accelerator:
    """Device and precision of the run; UserError if the preset wants a GPU that is not there."""
    check_environment()
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda and PRESETS[config.preset].get("device"):
        raise UserError(
            "--device cuda needs a CUDA GPU and there is none here; leave --device out, or choose "
            "cpu."
        )
    if config.device == "cuda" and not has_cuda:
        raise UserError(
            f"The preset {config.preset} needs a CUDA GPU and there is none here; --preset tiny "
            "runs on any machine, --preset laptop trains a pretrained model on a CPU (and --device "
            "cpu makes this one run without a GPU, slowly)."
        )
    cpu = config.device == "cpu" or not (has_cuda or chooses_mps(config))
    if cpu and config.precision != "fp32" and not multiplies_bf16_fast("cpu"):
        print(
            f"--precision {config.precision} is several times slower than fp32 on this CPU, which "
            "has no instructions for it; --precision fp32 is the better choice here"
        )
    # Accelerate keeps both for the life of the process, which may make another run after this one.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=cpu, mixed_precision="bf16" if config.precision == "bf16" else "no")


def chooses_mps(config: Config) -> bool:
    """Whether the run is on Apple's GPU: --device auto, no CUDA, and torch has it."""
    auto = config.device == "auto" and not torch.cuda.is_available()
    return auto and torch.backends.mps.is_available()


def check_environment() -> None:
    """UserError for what a launcher may have set, and what would change the training unseen."""
    if num_processes() == 1:  # nobody has connected it with the others
        refuse_several()
    wanted = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
    for name in (f"ACCELERATE_USE_{kind}" for kind in wanted):
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise UserError(
                f"{name} is set, and here every process has the whole model; unset it (for a model "
                "that is larger than a GPU: --adapter_rank 16 --quantize 4bit, or to_verl.py)."
            )
    # `accelerate launch` says where the first of several processes is, and then may start just one.
    alone = "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    if alone and "MASTER_ADDR" in os.environ:
        print(
            "accelerate launch has started one process (on a CPU it does so whatever "
            "--num_processes says); for several: torchrun --nproc_per_node N train.py"
        )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError("ACCELERATE_DYNAMO_BACKEND is set, and models are not compiled; unset it.")


def load_tokenizer(name: str) -> Any:
    """The model's own tokenizer; of an adapter's folder without one, that of its base model."""
    check_place(name, "--model")
    adapter = read_adapter(name)
    if adapter and not Path(resolve_path(name), "tokenizer_config.json").is_file():
        return load_tokenizer(adapter["base_model_name_or_path"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_path(name), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a damaged file
        raise UserError(loading_failed("tokenizer", name, error)) from error
    tokenizer.chat_template = without_prompt(tokenizer.chat_template)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {name} has no end-of-sequence token, so a completion could never "
            "end."
        )
    return tokenizer


def load_model(
    name: str,
    precision: str,
    gradient_checkpointing: bool = False,
    quantize: str = "none",
    frozen: bool = False,
) -> nn.Module:
    """A causal language model on the CPU: fp32 (bf16 for bf16-pure), no dropout, in eval mode.

    Args:
        name: of a model; or the folder of an adapter, which is loaded with its base model.
        quantize: `4bit` stores the weights of linear layers so.
        frozen: the weights are not trained themselves, and bf16 is enough for `bf16`.
    """
    adapter = read_adapter(name)
    in_bf16 = precision == "bf16-pure" or (precision == "bf16" and (frozen or adapter is not None))
    base = adapter["base_model_name_or_path"] if adapter else name
    model = read_model(base, torch.bfloat16 if in_bf16 else torch.float32, quantize)
    # Out of the file's memory map, where a tensor may begin at any byte: matrix products round by
    # alignment, so a run that had loaded a checkpoint would differ in the last bit from one that
    # has trained the same weights.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    keep_gradients(model)
    if adapter:
        load_adapter(model, name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"{name} cannot recompute activations; give --gradient_checkpointing false."
            )
        if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.18 and later
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.eval()


def load_to_train(config: Config, checkpoint: str | None = None) -> nn.Module:
    """The model that a run trains: all of its weights, or adapters beside frozen ones.

    Args:
        checkpoint: the folder to take the weights from, if not `config.model`.
    """
    frozen = config.adapter_rank > 0
    settings = config.precision, config.gradient_checkpointing, config.quantize, frozen
    model = load_model(checkpoint or config.model, *settings)
    if frozen:
        if not has_adapter(model):
            add_adapter(model, config)
        print(describe_adapter(model, config))
    return model


def read_model(name: str, dtype: torch.dtype, quantize: str = "none") -> nn.Module:
    """What is in the model's folder, or on the hub; UserError if it is no causal language model.

    Only from safetensors: to read a pickle is to run what is in it.
    """
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    try:
        check_whole_model(name)
        architecture = AutoConfig.from_pretrained(resolve_path(name), trust_remote_code=False)
        if architecture.is_encoder_decoder:
            raise UserError(f"{name} is an encoder-decoder; choose a causal language model.")
        if any(head.endswith("ForMaskedLM") for head in architecture.architectures or ()):
            raise UserError(
                f"{name} is an encoder ({architecture.architectures[0]}); choose a causal language "
                "model."
            )
        if getattr(architecture, "quantization_config", None):
            raise UserError(
                f"{name} has quantized weights, and only the few others would be trained; give the "
                "model that it was made from (with --adapter_rank 16 --quantize 4bit to quantize "
                "it here)."
            )
        remove_randomness(architecture)
        # Without its report of missing keys, which `check_weights` says in a sentence.
        transformers.utils.logging.set_verbosity_error()
        model, found = AutoModelForCausalLM.from_pretrained(
            resolve_path(name),
            config=architecture,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **quantization(quantize, dtype),
        )
        check_weights(name, found)
        if has_adapter(model):  # transformers has found one on the hub, and put it in
            raise UserError(
                f"{name} holds an adapter; download it into a folder, and give the folder."
            )
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for a damaged file
        raise UserError(loading_failed("model", name, error)) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    return model


def check_whole_model(name: str) -> None:
    """UserError for a base model that is an adapter itself: transformers would load its base."""
    folder = Path(resolve_path(name))
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{name} is the base model of an adapter, and holds an adapter itself; merge it first "
            "(python merge.py), and write the new folder into the other's adapter_config.json."
        )


def remove_randomness(config: PreTrainedConfig) -> None:
    """Dropout, dropped layers and jittered routers are off, also in the configs inside this one.

    They would make the log-probabilities of sampling and of training differ at random.
    """
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            remove_randomness(value)
        elif isinstance(value, float) and any(word in key for word in ("drop", "jitter")):
            setattr(config, key, 0.0)


@torch.no_grad()
def bf16_copy(model: nn.Module, name: str) -> nn.Module | None:
    """The model again in bf16, to sample from: half the bytes for each token, and no autocast.

    Its buffers stay as they are: rotary frequencies in bf16 would put late tokens in wrong places.
    None for models that do not take that (XGLM); those are sampled from in fp32.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    try:
        copied(input_ids=torch.tensor([[1, 2, 3]], device=copied.device))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:80]
        print(f"{name} cannot be sampled from in bf16 ({reason}): fp32, slower")
        return None
    return copied


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the weights of `source`, in its own precision."""
    for theirs, own in zip(source.parameters(), target.parameters(), strict=True):
        own.copy_(theirs)


def padded_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """What a forward pass is given of rows (B, S) with padding: positions leave the padding out."""
    mask = attention_mask.long()
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def logits_at(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor
) -> Tensor:
    """The logits (B, N, V) at N positions of padded rows (B, S); no others, if the model can."""
    inputs = padded_inputs(model, input_ids, attention_mask) | {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]


def pad_rows(rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, int]:
    """Pairs of prompt and completion, padded on both sides: sequences, attention_mask, num_actions.

    int64 (B, P + C) and bool (B, P + C); C.
    """
    before, after = (max(map(len, column)) for column in zip(*rows, strict=True))
    sequences = torch.zeros(len(rows), before + after, dtype=torch.long)
    mask = torch.zeros_like(sequences, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(rows):
        place = slice(before - len(prompt), before + len(completion))
        sequences[i, place] = torch.tensor(prompt + completion)
        mask[i, place] = True
    return sequences, mask, after


def check_weights(name: str, found: dict[str, Any]) -> None:
    """UserError for weights that are missing, or of another shape: they would be random numbers."""
    if found["mismatched_keys"]:
        key, there, asked = min(found["mismatched_keys"])
        raise UserError(
            f"The weights of {name} do not match its config.json: {key} is {tuple(there)} in the "
            f"file and {tuple(asked)} by the config; take both from the same model."
        )
    if found["missing_keys"]:
        raise UserError(
            f"{name} lacks {len(found['missing_keys'])} of the weights of a causal language model "
            f"({min(found['missing_keys'])}, …); choose a model with its language head, or save it "
            "again, whole."
        )
    if found["unexpected_keys"]:
        print(
            f"{len(found['unexpected_keys'])} weights of {name} are not used: "
            f"{min(found['unexpected_keys'])}, …"
        )


def loading_failed(what: str, name: str, error: Exception) -> str:
    """The sentence for a model or tokenizer that cannot be loaded."""
    folder = Path(resolve_path(name))
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        return (
            f"{name} is the folder of a run; its models are in checkpoint-STEP, or (sft.py) model."
        )
    if (
        what == "model"
        and any(folder.glob("pytorch_model*.bin"))
        and not any(folder.glob("*.safetensors"))
    ):
        return (
            f"{name} has pickled weights only (pytorch_model.bin), and a pickle may run any code. "
            "If you trust it, "
            'convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{name}').save_pretrained('{name}')\"."
        )
    old = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if what == "tokenizer" and old:
        return (
            f"{name} has its tokenizer only as tokenizer.model, which needs a package to be read: "
            "pip install sentencepiece tiktoken protobuf; or take tokenizer.json from the model's "
            "page."
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if "Unrecognized configuration class" in reason:
        reason = "its config.json is not that of a causal language model"
    if reason.startswith("Couldn't instantiate the backend tokenizer"):
        reason = "there is no tokenizer in it"
    if isinstance(error, KeyError):
        reason = f"KeyError: {reason}"
    return (
        f"Cannot load the {what} {name!r} ({reason.rstrip('.')}); --model takes a hub name, or a "
        "Hugging Face folder with config.json, safetensors weights and a tokenizer."
    )


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit version from bitsandbytes, of the weights that are trained."""
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adamw":  # fused: half the time of the default, on a CPU
        return torch.optim.AdamW(trained, fused=True, **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            "--optimizer adamw_8bit needs the package bitsandbytes: pip install bitsandbytes."
        ) from error
    return bitsandbytes.optim.AdamW8bit(trained, **settings)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int) -> float:
    """The learning rate of a step: rising from 0 over `warmup_steps`, then constant."""
    lr = config.lr * min(1.0, step / max(1, config.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
