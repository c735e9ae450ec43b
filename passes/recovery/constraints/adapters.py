"""Adapters: a product of two small factors is trained beside each weight, and added to it in the end."""

from __future__ import annotations

import math
import zlib

import torch
from torch import nn


class Adapter(nn.Module):
    """Gives W + (alpha / rank) · B A for a weight that does not train (Hu et al., LoRA: Low-Rank Adaptation, 2021).

    A weight of several axes is the matrix of its first axis by all others; of a stack of matrices, all of them below
    each other. A begins as a uniform distribution of variance 1 / (3 · columns), the same for a name in every run,
    and B as zeros, so that training begins with the weight as it is.

    Args:
        name: Name of the weight.
        shape: Its shape.
        rank: Columns of B and rows of A; no more than the matrix has.
        alpha: What the product is multiplied by, over the rank.
        is_stack: Whether the last two axes are the matrix, and those before them count matrices.
    """

    def __init__(self, name: str, shape: tuple[int, ...], rank: int, alpha: float, *, is_stack: bool = False) -> None:
        super().__init__()
        self._rows, columns = (math.prod(shape[:-1]), shape[-1]) if is_stack else (shape[0], math.prod(shape[1:]))
        rank = min(rank, self._rows, columns)
        self._factor = alpha / rank
        drawn = torch.rand(rank, columns, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        self.A = nn.Parameter((drawn * 2 - 1) / math.sqrt(columns))
        self.B = nn.Parameter(torch.zeros(self._rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with the product added, float32."""
        # In full precision also where products are not: what is stored in the end is this very sum.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + (self.B @ self.A).reshape(weight.shape) * self._factor
