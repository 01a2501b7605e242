"""What a backend hands to the weight update: small gradients whole, the two big ones by rows, on demand."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .nested_loss import NestedLoss


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of one batch. `rows` may be asked twice for the same range and answers the same bits."""

    nested: NestedLoss
    small: dict[str, Tensor]
    """b_enc [d_sae], b_dec [d_out] and W_skip [d_in, d_out] when there is one."""
    decoder_dot: Tensor
    """[d_sae]: the inner product of each row of W_dec with its gradient, which the sparse backend gets for nothing
    as sum_entries acts * d_acts."""
    rows: Callable[[str, int, int], Tensor]
    """rows("W_enc" | "W_dec", start, end) -> the gradient of those rows, a tensor the caller may overwrite."""
    stored: bool
    """Whether rows() reads a stored matrix (True) or computes (False)."""
