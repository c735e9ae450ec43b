"""Constants in float while they train: zeros, factors beside them and the dtype they are stored in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from graphopt import walk
from graphopt.stored_weights import as_floats

from ..held import ADAPTERS, Held
from .adapters import Adapter
from .constant_kinds import SCALE, TABLE, WEIGHT, ZERO_POINT
from .kept_constants import Kept
from .masks import Masked, kept_of_floats, pattern_of
from .surgery import Surgery
from .trainable import UNREAD, Trainable

_NARROW: Mapping[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
NO_MATRIX = "adapters are for matrices"
"""Why a weight is left where adapters train."""


class Narrowed(nn.Module):
    """Gives a weight in the dtype it is stored in, while it trains in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight, rounded."""
        return weight.to(self._dtype)


def keep_floats(surgery: Surgery, found: Sequence[Trainable], held: Held, left: Counter[str]) -> Iterator[Kept]:
    """Let the chosen constants in float train, but for scales of codes, and yield them."""
    for one in found:
        if (
            one.kind in (SCALE, ZERO_POINT)
            or not one.tensor.dtype.is_floating_point()
            or one.tensor.dtype.bitwidth <= 8
        ):
            continue
        path = surgery.path(one.value)
        if path is None:
            left[UNREAD] += 1
        elif one.kind == WEIGHT and ADAPTERS in held.train and not takes_adapter(one):
            left[NO_MATRIX] += 1
        else:
            yield _keep(surgery, path, one, held)


def adapter_for(one: Trainable, held: Held) -> Adapter | None:
    """Return the adapter that trains in the place of a weight, or None where the weight itself does."""
    if one.kind != WEIGHT or ADAPTERS not in held.train or not takes_adapter(one):
        return None
    dims = walk.dims(one.tensor)
    is_stack = len(dims) > 2 and not any("Conv" in reader.node.op_type for reader in one.readers)
    return Adapter(one.name, dims, held.adapter_rank, held.adapter_alpha, is_stack=is_stack)


def takes_adapter(one: Trainable) -> bool:
    """Return whether a weight is a matrix, or several."""
    return len(walk.dims(one.tensor)) > 1


def _keep(surgery: Surgery, path: str, one: Trainable, held: Held) -> Kept:
    start = as_floats(one.tensor)
    adapter = adapter_for(one, held)
    kept = kept_of_floats(start.numpy()) if one.kind in (WEIGHT, TABLE) and held.zeros != "free" else None
    surgery.train(path, start, trains=adapter is None)
    chain: list[nn.Module] = [] if adapter is None else [adapter]
    if kept is not None:
        chain.append(Masked(kept))
    narrow = _NARROW.get(one.tensor.dtype)
    if narrow is not None:
        chain.append(Narrowed(narrow))
    made = nn.Sequential(*chain)
    if chain:
        surgery.behind(one.value, made)

    def now() -> torch.Tensor:
        result: torch.Tensor = made(surgery.parameter(path))
        return result

    def parameters() -> dict[str, nn.Parameter]:
        own = {one.name: surgery.parameter(path)}
        return own if adapter is None else own | {f"{one.name}.A": adapter.A, f"{one.name}.B": adapter.B}

    zeros = None if kept is None else np.logical_not(kept)
    return Kept(
        one.value, one.name, one.kind, now, parameters, zeros, None if kept is None else pattern_of(start.numpy())
    )
