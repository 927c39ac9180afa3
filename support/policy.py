"""The policy and its frozen reference: models that are asked how likely tokens are."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from support.adapters import adapters_off, read_adapter
from support.config import Config
from support.model import bf16_copy, copy_weights, load_model, load_to_train
from support.preflight import check_model, check_saving
from support.served_rollout import ServedModel
from support.shared_prompts import share_prompts, shared_log_probs

LogProbs = Callable[..., tuple[Tensor, ...]]


class Policy(nn.Module):
    """A language model together with the function that computes log-probabilities with it.

    Accelerate prepares this module, so that its precision is that of the whole computation and not
    of the logits, which never leave it.
    """

    def __init__(
        self,
        model: nn.Module,
        log_probs: LogProbs,
        temperature: float = 1.0,
        on_host: bool = False,
        without_adapters: bool = False,
    ) -> None:
        super().__init__()
        self.without_adapters = without_adapters  # the reference of a model with adapters
        self.on_host = on_host  # whether log_probs looks at tokens before they are moved
        self.model = model
        self.log_probs = log_probs
        self.temperature = temperature
        self.copy_in_bf16(None)
        self.served: ServedModel | None = None

    def forward(self, batch: Any, reference: "Policy | None" = None) -> tuple[Tensor, ...]:
        """What `log_probs` says of a padded batch: log-probabilities, entropies, ...; each (B, C).

        Args:
            batch: an Experience, best on the CPU.
            reference: for functions that compute the exact KL to it.
        """
        others = () if reference is None else (reference.model,)
        tokens = batch.sequences, batch.attention_mask
        if not self.on_host:
            tokens = [tensor.to(self.device) for tensor in tokens]
        arguments = *tokens, batch.num_actions, self.temperature
        with adapters_off(self.model, self.without_adapters):
            return self.log_probs(self.model, *arguments, *others)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def copy_in_bf16(self, name: str | None) -> None:
        """From now on sample from a bf16 copy of the model, if it can have one; None: itself."""
        copy = None if name is None else bf16_copy(self.model, name)
        # Not a part of this module: it is neither trained nor saved, and stays in eval mode.
        object.__setattr__(self, "bf16_copy", copy)

    def sampler(self) -> nn.Module | ServedModel:
        """The model to sample from, with the present weights."""
        if self.served is not None:
            return self.served.with_present_weights()
        if self.bf16_copy is None:
            return self.model
        copy_weights(self.model, self.bf16_copy)
        return self.bf16_copy


def load_policies(
    config: Config,
    checkpoint: str | None,
    tokenizer: Any,
    accelerator: Accelerator,
    with_reference: bool,
    log_probs: LogProbs,
    token_log_probs: LogProbs,
) -> tuple[Policy, Policy | None]:
    """The policy, and the reference if there is to be one, checked and on the device.

    Args:
        checkpoint: the folder to take the policy's weights from, if not `config.model`.
        log_probs: of padded sequences, as loss.sequences_log_probs.
        token_log_probs: of logits, as loss.token_log_probs: what the first one is made of.
    """
    set_seed(config.seed)
    name, precision, adapted = config.model, config.precision, config.adapter_rank > 0
    model = load_to_train(config, checkpoint)
    check_model(model, tokenizer, config, log_probs)
    check_saving(model, tokenizer, name)
    models = [model]
    if with_reference and adapted and read_adapter(name):
        print(
            f"the KL is measured to the base model, without the adapter in {name} that the run "
            "begins with; to measure it to the beginning, merge that adapter first (merge.py)"
        )
    if with_reference and not adapted:
        models.append(load_model(name, precision).requires_grad_(False))
    longest = config.max_prompt_tokens + config.max_new_tokens
    shared = partial(shared_log_probs, token_log_probs=token_log_probs)
    if all(share_prompts(network, name, longest, log_probs, shared) for network in models):
        log_probs = shared
    settings = log_probs, config.temperature, log_probs is shared
    # No DistributedDataParallel: where there are several processes, support/distributed.py adds up.
    policy = accelerator.prepare_model(Policy(model, *settings), evaluation_mode=True)
    if precision == "bf16" and not adapted:
        policy.copy_in_bf16(name)
    if config.rollout_url:
        policy.served = ServedModel(policy, config)
    reference = None
    if with_reference:
        reference = Policy(models[-1], *settings, without_adapters=adapted)
        reference = accelerator.prepare_model(reference, evaluation_mode=True)
    return policy, reference
