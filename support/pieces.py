"""Logits in pieces: a function of (tokens × vocabulary) tensors, and never one of them in float32.

The function is applied to some rows at a time, and applied to them again in the backward pass. The
result is the same as of one call with all rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Numbers in a piece of float32 logits; a few tensors of that size are alive at a time. On a CPU
# 24 MB: from 32 MB on, malloc asks the system for every single tensor, which takes longer than the
# arithmetic. On a GPU 256 MB: the backward pass of each piece makes a gradient as large as the
# head, so there should be few pieces.
LOGITS_AT_A_TIME = {"cpu": 6 * 2**20, "cuda": 2**26}


def in_pieces(
    function: Callable[..., tuple[Tensor, ...]], *rows: Tensor, vocabulary: int | None = None
) -> tuple[Tensor, ...]:
    """`function(*rows)`, some of the N rows at a time.

    Args:
        function: of tensors with n rows each; returns a tuple of tensors with n rows each.
        rows: tensors with N rows each; logits (N, V), or what `function` makes logits of, first.
        vocabulary: V, if the first tensor is not as wide.
    """
    size = max(1, LOGITS_AT_A_TIME[rows[0].device.type] // (vocabulary or rows[0].shape[-1]))
    pieces = zip(*(tensor.split(size) for tensor in rows), strict=True)
    found = [checkpoint(function, *piece, use_reentrant=False) for piece in pieces]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
