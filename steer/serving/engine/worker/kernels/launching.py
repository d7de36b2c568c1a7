"""What every kernel over rows of the residual stream is launched with."""

from __future__ import annotations

from torch import Tensor


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, in which each row lies in one piece."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def for_row(hidden: int) -> dict[str, int]:
    """The block and the warps with which one program handles a row of this size in registers."""
    block = 1 << (hidden - 1).bit_length()
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8 if block <= 8192 else 16}
