"""Statistics that leave NaN out: a completion that no reward could score takes no part in them."""

from torch import Tensor


def unbiased_std(values: Tensor) -> Tensor:
    """Standard deviation (n - 1) over the last dimension, which is kept; 0 of a single value."""
    count = (~values.isnan()).sum(dim=-1, keepdim=True)
    squares = (values - values.nanmean(dim=-1, keepdim=True)).square()
    return (squares.nansum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
