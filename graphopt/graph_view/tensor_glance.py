"""What a tensor holds, at a glance: extremes, mean, share of zeros and a small histogram, of a part of a large one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.mapped import MappedTensor
from graphopt.model_diff import COMPARED_BYTES, same_content

# Elements are read at this many places of a tensor, this many neighbours at each: a large file is not read whole.
_PLACES, _NEIGHBOURS = 64, 1024
# A tensor that is computed, or unpacked as a whole, is looked at up to this size.
_MOST_COSTLY_BYTES = 1 << 25
_BINS = 24
_SHOWN_ELEMENTS = 6
_DIGITS = 5
_BYTE_BITS = 8


def glance(tensor: ir.TensorProtocol) -> dict[str, Any]:
    """Return what a tensor holds, in JSON values.

    Keys: `bytes`; `first` (text of the first elements); of more numbers than these `min`, `max`, `mean`, `zeros` (a
    share), `histogram` (counts of equal bins from `min` to `max`), and `of`, how many elements they are of, if not of
    all. A tensor that would have to be computed and is large has `bytes` alone.
    """
    found: dict[str, Any] = {"bytes": int(tensor.nbytes)}
    if not _is_quick(tensor) and tensor.nbytes > _MOST_COSTLY_BYTES:
        return found
    flat = np.asarray(tensor.numpy()).reshape(-1)
    found["first"] = _first(flat)
    if tensor.dtype in (ir.DataType.STRING, ir.DataType.BOOL) or np.iscomplexobj(flat) or flat.size <= _SHOWN_ELEMENTS:
        return found
    part = _part(flat).astype(np.float64)
    finite = part[np.isfinite(part)]
    if not finite.size:
        return found
    low, high = float(finite.min()), float(finite.max())
    found |= {"min": _round(low), "max": _round(high), "mean": _round(float(finite.mean()))}
    found["zeros"] = _round(float(np.mean(part == 0)))
    if low < high and np.isfinite(high - low):
        found["histogram"] = np.histogram(finite, bins=_BINS, range=(low, high))[0].tolist()
    if part.size < flat.size:
        found["of"] = int(part.size)
    return found


def look_alike(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Return whether two tensors hold the same, as far as the places looked at of large ones tell."""
    if a is b or same_content(a, b):
        return True
    if a.dtype != b.dtype or walk.dims(a) != walk.dims(b) or a.nbytes <= COMPARED_BYTES:
        return False
    if not (_is_quick(a) and _is_quick(b)):
        return False
    one, other = (np.ascontiguousarray(_part(np.asarray(tensor.numpy()).reshape(-1))) for tensor in (a, b))
    return one.tobytes() == other.tobytes()


def _is_quick(tensor: ir.TensorProtocol) -> bool:
    """Return whether a tensor is in memory or a file as the array it is."""
    return isinstance(tensor, (ir.Tensor, MappedTensor)) and tensor.dtype.bitwidth >= _BYTE_BITS


def _part(flat: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if flat.size <= _PLACES * _NEIGHBOURS:
        return flat
    starts = np.linspace(0, flat.size - _NEIGHBOURS, _PLACES, dtype=np.int64)
    return np.concatenate([flat[start : start + _NEIGHBOURS] for start in starts])


def _first(flat: np.ndarray[Any, Any]) -> str:
    shown = [_text(item) for item in flat[:_SHOWN_ELEMENTS].tolist()]
    return ", ".join(shown) + (", …" if flat.size > _SHOWN_ELEMENTS else "")


def _text(item: Any) -> str:
    if isinstance(item, bytes):
        return repr(item.decode(errors="replace"))
    return f"{item:.{_DIGITS}g}" if isinstance(item, float) else str(item)


def _round(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


def kind(tensor: ir.TensorProtocol) -> str:
    """Return a tensor's dtype and shape as people write them: `float32[64×3×7×7]`."""
    return f"{str(tensor.dtype).lower()}[{'×'.join(map(str, walk.dims(tensor)))}]"
