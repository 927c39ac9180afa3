"""Adapters: LoRA matrices that are trained beside frozen weights, which may be stored in 4 bits.

LoRA is arXiv 2106.09685, the 4-bit storage (NF4 with double quantization) is QLoRA's, 2305.14314.
transformers' own `add_adapter` puts the matrices in, so the model keeps its class, its `generate`
and its `save_pretrained`. With its adapters off it is the model that it was made from: that is the
reference of the KL, and no second model is loaded.

Adapters are never merged in place. To add them to weights in bf16 and to take them away again
rounds both times: once moves the base by 8 % of the adapter, 200 times by 27 %. So the model is
sampled from with its adapters beside it, and merge.py writes a new model, in fp32.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig

from support.config import Config, resolve_path
from support.errors import UserError

LEAST_SHARE = 0.9  # of the weights in matrices, that adapters on all linear layers must be beside
# What adapter_config.json of plain LoRA may say. Anything else changes more than the two matrices
# do (a copy of the head, a base model that was changed first, DoRA's lengths), so that the adapter
# could neither be turned off for the reference nor be merged.
PLAIN = {
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "inference_mode"),
    *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("layers_to_transform", "layers_pattern", "exclude_modules", "fan_in_fan_out"),
    *("lora_dropout", "bias", "init_lora_weights"),
    # These have a value although nothing uses it.
    *("megatron_core", "qalora_group_size", "auto_mapping"),
}
PLAIN_VALUES = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}


def without_kernel_warning() -> None:
    """Before bitsandbytes is imported, as peft does too: it warns of a kernel that is not used."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def import_peft() -> Any:
    """The package peft; UserError if it is missing."""
    without_kernel_warning()
    try:
        import peft
    except ImportError as error:
        raise UserError("Adapters need the package peft: pip install peft.") from error
    return peft


def read_adapter(folder: str) -> dict[str, Any] | None:
    """The adapter_config.json of a folder, checked; None if there is none in it."""
    file = Path(resolve_path(folder), "adapter_config.json")
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind, base = found["peft_type"], found["base_model_name_or_path"]
        known = {"r": int, "lora_alpha": int | float, "target_modules": list | str}
        good = all(isinstance(found[name], types) for name, types in known.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} does not describe a LoRA adapter ({type(error).__name__}: {error}); copy the "
            "folder again, or choose another model."
        ) from error
    others = [name for name, value in found.items() if value and name not in PLAIN]
    for name, values in PLAIN_VALUES.items():
        others += [f"{name} {found[name]}"] if found.get(name, values[0]) not in values else []
    if kind != "LORA" or others or not good:
        raise UserError(
            f"{folder} holds an adapter ({', '.join([str(kind), *others])}), and only plain LoRA "
            "can be trained here; merge it into its base model first (peft: merge_and_unload, then "
            "save_pretrained)."
        )
    if isinstance(base, str) and os.path.isabs(base) and not os.path.isdir(base):
        base = base_of_run(file.parent)
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{folder} holds an adapter, and its base model "
            f"{found['base_model_name_or_path']!r} is not there; put the model in that place again."
        )
    return found | {"base_model_name_or_path": base}


def base_of_run(folder: Path) -> str | None:
    """The model that the run of an adapter began with, if it is here: projects move."""
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        place = Path(resolve_path(saved["model"]))
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return None
    whole = (place / "config.json").is_file() and not (place / "adapter_config.json").is_file()
    return str(place.resolve()) if whole else None


def adapter_options(model: str) -> dict[str, Any]:
    """The options that made the adapter in the folder `model`; none if there is no adapter."""
    found = read_adapter(model)
    if not found:
        return {}
    targets = found["target_modules"]
    return {
        "adapter_rank": found["r"],
        "adapter_alpha": float(found["lora_alpha"]),
        "adapter_targets": [targets] if isinstance(targets, str) else in_order(targets),
    }


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has adapters beside its weights."""
    return hasattr(model, "peft_config")


def add_adapter(model: nn.Module, config: Config) -> None:
    """Freeze the model and put new adapters beside its linear layers; they change nothing yet."""
    peft = import_peft()
    targets = config.adapter_targets
    alpha = config.adapter_alpha
    settings = peft.LoraConfig(
        r=config.adapter_rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules="all-linear" if targets == ["all-linear"] else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        model.add_adapter(settings)
    except ValueError as error:  # no layer of that name, or one that is not linear
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--adapter_targets {' '.join(targets)} cannot be adapted ({reason}); give names of "
            "linear layers, such as q_proj v_proj, or all-linear."
        ) from error
    adapted = peft_layers(model)
    for name in () if targets == ["all-linear"] else targets:
        if not any(layer == name or layer.endswith(f".{name}") for layer in adapted):
            raise UserError(
                f"--adapter_targets {' '.join(targets)}: no layer is called {name}; leave it out, "
                "or give all-linear alone."
            )
    settings.target_modules = in_order(settings.target_modules)
    # A path from where the run began would be of no use elsewhere.
    place = Path(resolve_path(config.model))
    settings.base_model_name_or_path = str(place.resolve()) if place.is_dir() else config.model
    finish_adapter(model)


def peft_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def learning_rate(lr: float, adapted: bool) -> float:
    """That of adapters for a rate of all weights, or the other way round: ten times, or a tenth."""
    return float(f"{lr * 10 if adapted else lr / 10:.12g}")


def load_adapter(model: nn.Module, folder: str) -> None:
    """Freeze the model and put the adapters of a folder beside its linear layers.

    Not by transformers' `load_adapter`, which rounds them to the precision of the base model.
    """
    peft = import_peft()
    place = Path(resolve_path(folder))
    if not (place / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{folder} has no adapter_model.safetensors, the only file that adapters are read "
            "from (a pickle may run any code); save the adapter again with peft."
        )
    try:
        saved = load_file(place / "adapter_model.safetensors")
        settings = peft.LoraConfig.from_pretrained(str(place))
        settings.inference_mode = False
        base = read_adapter(folder)["base_model_name_or_path"]
        model.add_adapter(settings)
    except Exception as error:  # peft and safetensors raise many kinds for a damaged file
        raise UserError(
            f"Cannot load the adapter in {folder} ({' '.join(str(error).split())[:200]}); copy it "
            "again, or choose another model."
        ) from error
    settings.base_model_name_or_path = base  # add_adapter has put its own there
    settings.target_modules = in_order(settings.target_modules)
    finish_adapter(model)
    saved = {name.removeprefix("base_model.model."): values for name, values in saved.items()}
    own = peft.get_peft_model_state_dict(model)
    wrong = [n for n in own.keys() & saved.keys() if own[n].shape != saved[n].shape]
    wrong += own.keys() ^ saved.keys()
    if wrong:
        raise UserError(
            f"The adapter in {folder} does not fit its base model ({len(wrong)} of its weights: "
            f"{min(wrong)}, …); take both from the same run."
        )
    for name, values in saved.items():
        own[name].copy_(values)


def in_order(targets: Any) -> Any:
    """The names of layers, which peft keeps as a set and writes in another order each time."""
    return targets if isinstance(targets, str) else sorted(targets)


def finish_adapter(model: nn.Module) -> None:
    """Adapters in fp32, where no update is rounded away; UserError for those in other places."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        raise UserError(
            "The experts of this model are one block of weights, which adapters here do not cover; "
            "name other layers, as in --adapter_targets q_proj k_proj v_proj o_proj."
        )
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(layer, BaseTunerLayer):
            raise UserError(
                "Adapters beside the embeddings or the head are not supported; leave those names "
                "out of --adapter_targets."
            )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.eval()


@contextmanager
def adapters_off(model: nn.Module, off: bool = True) -> Iterator[None]:
    """Inside, the model is what its adapters were added to: the reference; only if `off`."""
    if not off:
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def describe_adapter(model: nn.Module, config: Config) -> str:
    """How much of the model is adapted, in a sentence; UserError if that is too little.

    Experts that are stored as one block (gpt-oss) are not linear layers, so adapters on all linear
    layers would leave most of such a model as it is.
    """
    adapted = sum(size(layer.base_layer.weight) for layer in peft_layers(model).values())
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if model.get_output_embeddings() is not None:
        tables.add(id(model.get_output_embeddings().weight))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    matrices = sum(size(p) for p in frozen if p.dim() > 1 and id(p) not in tables)
    share = adapted / matrices
    if share < LEAST_SHARE and config.adapter_targets == ["all-linear"]:
        raise UserError(
            f"Adapters on all linear layers of {config.model} would be beside {share:.0%} of the "
            "weights in its matrices; the others (experts in one block, for example) would not be "
            "trained. If that is what you want, name the layers with --adapter_targets; else train "
            "all weights, with --adapter_rank 0."
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = trained + sum(map(size, frozen))
    return (
        f"LoRA of rank {config.adapter_rank} on {' '.join(config.adapter_targets)}, which is "
        f"{share:.0%} of the weights in layers: {trained:,} trained parameters "
        f"({trained / everything:.2%} of the model); learning rate {config.lr:g}"
    )


def size(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds; in 4 bits two of them share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def quantization(quantize: str, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers' `from_pretrained` is given to store a model in 4 bits, on the CPU."""
    if quantize == "none":
        return {}
    without_kernel_warning()
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--quantize 4bit needs the package bitsandbytes: pip install bitsandbytes."
        ) from error
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": "cpu"}}


def keep_gradients(model: nn.Module) -> None:
    """Keep layers in 4 bits in the layout that has a gradient.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 packs the weights again at the first pass without
    gradients, for a kernel that knows no backward pass: the gradients after it are wrong by 82 %.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


@torch.no_grad()
def merge(trained: nn.Module, whole: nn.Module) -> None:
    """Give `whole`, the base model in fp32, the weights that `trained` computes with.

    Those of the frozen model, also where it is in 4 bits or in bf16; and what the adapters add.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, target in whole.named_modules():
        layer = trained.get_submodule(name)
        has_adapters = isinstance(layer, BaseTunerLayer)
        base = layer.get_base_layer() if has_adapters else layer
        for key, weight in target.named_parameters(recurse=False):
            weight.copy_(dequantized(getattr(base, key)))
        if has_adapters:
            target.weight.add_(layer.get_delta_weight(layer.active_adapters[0]))


def dequantized(weight: nn.Parameter) -> torch.Tensor:
    """The numbers that a weight stands for, which may be stored in 4 bits."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)
