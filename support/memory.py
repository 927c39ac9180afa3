"""Micro-batches that fit the GPU's memory: half the size where it is full, and the same numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from support.distributed import share_out
from support.errors import UserError
from support.monitor import log_line

Result = TypeVar("Result")


class MicroBatch:
    """How many sequences go through a forward pass together. Never part of the mathematics."""

    def __init__(self, size: int) -> None:
        self.size = size

    def share_out(
        self, items: list[Any], work: Callable[[list[Any], int], list[Result]]
    ) -> list[Result]:
        """`work(items, size)` of experiences: each process does a part, in a size that fits it."""
        tokens = [len(item.sequences) for item in items]
        return share_out(items, lambda part: self.halve_on_oom(partial(work, part)), tokens)

    def halve_on_oom(self, work: Callable[[int], Result]) -> Result:
        """`work(size)`; where the memory is full, again from its beginning with half the size.

        The size stays at what fitted.
        """
        while True:
            try:
                return work(self.size)
            except torch.cuda.OutOfMemoryError as error:
                if self.size == 1:
                    raise UserError(
                        "One sequence is more than the GPU's memory holds: lower --max_new_tokens, "
                        "or try --gradient_checkpointing true, --optimizer adamw_8bit or "
                        "--precision bf16-pure."
                    ) from error
            # Outside of `except`, where the error would keep the tensors of the attempt alive.
            self.size = (self.size + 1) // 2
            torch.cuda.empty_cache()
            log_line(
                f"the GPU's memory is full: micro-batches of {self.size} from here on; the numbers "
                "stay the same"
            )
