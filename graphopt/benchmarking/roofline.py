"""The roofline of this machine, measured through a backend, and how close the kernels of a run come to it.

After Williams, Waterman and Patterson, Roofline: an insightful visual performance model (2009): a kernel takes at
least as long as its arithmetic at the peak rate, and as long as its bytes at the memory's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array, Backend
from graphopt.benchmarking.kernel_profile import KernelTime, Profile
from graphopt.errors import BackendError
from graphopt.latency import runner, timed, uncollected, warm_up
from graphopt.machine import last_level_cache

# Runtimes reach their best with matrices of one or the other.
_GEMM_SIZES = (1024, 2048)
# Their convolutions may come closer to what the cores can: 3×3, as many channels in as out, on this many rows.
_CONV_CHANNELS, _CONV_ROWS, _CONV_KERNEL = 256, 28, 3
# One row against this: 128 MiB of weights, more than caches hold; and 4 MiB, which they do.
_MEMORY_SHAPE, _CACHE_SHAPE = (4096, 8192), (1024, 1024)
_SECONDS = 0.25  # for each product, the best run of which counts
_LEAST_RUNS = 3
_OPSET, _IR_VERSION = 21, 10

Bound = Literal["compute", "memory", "caches"]


@dataclass(frozen=True)
class Peaks:
    """The most a backend gets out of this machine, measured.

    Attributes:
        backend: The backend.
        float_operations: Multiplications and additions a second, in float32.
        integer_operations: The same in 8 bits; None where the backend refuses such models.
        memory: Bytes a second from memory.
        caches: Bytes a second from caches.
        cache_bytes: What the last cache holds, or None where the system does not tell.
    """

    backend: str
    float_operations: float
    integer_operations: float | None
    memory: float
    caches: float
    cache_bytes: int | None

    def least(self, kernel: KernelTime, run_bytes: int) -> tuple[float, Bound] | None:
        """Return the milliseconds a kernel takes at least and what holds it; None where its work is not known.

        Args:
            kernel: The kernel.
            run_bytes: What the whole run moves: where the caches hold that, memory is no bound.
        """
        if kernel.operations is None or kernel.bytes is None:
            return None
        cached = self.cache_bytes is not None and run_bytes <= self.cache_bytes
        peak = self.float_operations
        if kernel.integers and self.integer_operations is not None:
            peak = self.integer_operations
        compute = kernel.operations / peak * 1e3
        moving = kernel.bytes / (max(self.caches, self.memory) if cached else self.memory) * 1e3
        if compute >= moving:
            return compute, "compute"
        return moving, "caches" if cached else "memory"


@dataclass(frozen=True)
class Roof:
    """A profile under the roofline.

    Attributes:
        peaks: The peaks.
        least: Milliseconds all kernels whose work is known would take at the peaks.
        taken: Milliseconds they take.
        unknown: Milliseconds of the others.
        bound_by: Which share of the least time is held by what.
    """

    peaks: Peaks
    least: float
    taken: float
    unknown: float
    bound_by: dict[Bound, float]

    @property
    def share(self) -> float:
        """How close the kernels come to the peaks; 1 is as fast as this machine can."""
        return self.least / self.taken if self.taken else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        return asdict(self) | {"share": self.share}


def roof_of(profiled: Profile, peaks: Peaks) -> Roof:
    """Return a profile under the roofline."""
    least, taken, unknown = 0.0, 0.0, 0.0
    bound_by: dict[Bound, float] = {}
    for kernel in profiled.kernels:
        bound = peaks.least(kernel, profiled.bytes)
        if bound is None:
            unknown += kernel.milliseconds
            continue
        least, taken = least + bound[0], taken + kernel.milliseconds
        bound_by[bound[1]] = bound_by.get(bound[1], 0.0) + bound[0]
    return Roof(peaks, least, taken, unknown, {name: part / least for name, part in bound_by.items() if least})


def measure_peaks(backend: Backend, *, threads: int = 0, seconds: float = _SECONDS) -> Peaks:
    """Measure the best a backend does here.

    Square matrix products and a convolution in float32, products in int8, and one row against a large matrix.

    Args:
        backend: The backend.
        threads: Threads inside an operator; 0 leaves it to the runtime.
        seconds: Time for each product.

    Raises:
        BackendError: It refuses products of floats.
    """
    floats = [_rate(backend, *_float_product(n, n, n), 2 * n**3, threads, seconds) for n in _GEMM_SIZES]
    work = 2 * _CONV_CHANNELS**2 * _CONV_ROWS**2 * _CONV_KERNEL**2
    floats.append(_rate(backend, *_float_convolution(), work, threads, seconds))
    integers = list(_integer_rates(backend, threads, seconds))
    by_shape = {}
    for rows, columns in (_MEMORY_SHAPE, _CACHE_SHAPE):
        work = rows * columns * np.dtype(np.float32).itemsize
        by_shape[rows, columns] = _rate(backend, *_float_product(1, rows, columns), work, threads, seconds)
    return Peaks(
        backend=backend.describe(),
        float_operations=max(floats),
        integer_operations=max(integers, default=None),
        memory=by_shape[_MEMORY_SHAPE],
        caches=by_shape[_CACHE_SHAPE],
        cache_bytes=last_level_cache(),
    )


def _integer_rates(backend: Backend, threads: int, seconds: float) -> Iterator[float]:
    for size in _GEMM_SIZES:
        for make in (_quantized_product, _integer_product):
            try:
                yield _rate(backend, *make(size), 2 * size**3, threads, seconds)
            except BackendError:
                continue  # it knows integers in another form


def _rate(backend: Backend, model: ir.Model, feed: dict[str, Array], work: int, threads: int, seconds: float) -> float:
    """Return how much work a second the best run does."""
    with backend.open(model, threads=threads) as session, uncollected():
        run = runner(session, feed)
        warm_up([run], 0.0)
        times = [timed(run) for _ in range(_LEAST_RUNS)]
        while sum(times) < seconds:
            times.append(timed(run))
    return work / min(times)


def _float_product(rows: int, inner: int, columns: int) -> tuple[ir.Model, dict[str, Array]]:
    x, weight = (np.full(shape, 0.5, np.float32) for shape in ((rows, inner), (inner, columns)))
    node = ir.node("MatMul", [_input("x", x), _constant("w", weight)])
    return _model([node], {"x": x}, ir.DataType.FLOAT, (rows, columns))


def _float_convolution() -> tuple[ir.Model, dict[str, Array]]:
    shape = (1, _CONV_CHANNELS, _CONV_ROWS, _CONV_ROWS)
    x = np.full(shape, 0.5, np.float32)
    weight = np.full((_CONV_CHANNELS, _CONV_CHANNELS, _CONV_KERNEL, _CONV_KERNEL), 0.5, np.float32)
    attributes = {"pads": [_CONV_KERNEL // 2] * 4}
    node = ir.node("Conv", [_input("x", x), _constant("w", weight)], attributes)
    return _model([node], {"x": x}, ir.DataType.FLOAT, shape)


def _integer_product(size: int) -> tuple[ir.Model, dict[str, Array]]:
    x, weight = np.full((size, size), 7, np.uint8), np.full((size, size), 5, np.int8)
    inputs = [_input("x", x), _constant("w", weight)]
    zeros = [_constant("zero", np.uint8(128)), _constant("w_zero", np.int8(0))]
    return _model([ir.node("MatMulInteger", [*inputs, *zeros])], {"x": x}, ir.DataType.INT32, (size, size))


def _quantized_product(size: int) -> tuple[ir.Model, dict[str, Array]]:
    x, weight = np.full((size, size), 7, np.uint8), np.full((size, size), 5, np.int8)
    scale, zero = _constant("scale", np.float32(0.01)), _constant("zero", np.uint8(128))
    left = ir.node("DequantizeLinear", [_input("x", x), scale, zero])
    right = ir.node("DequantizeLinear", [_constant("w", weight), scale, _constant("w_zero", np.int8(0))])
    product = ir.node("MatMul", [left.outputs[0], right.outputs[0]])
    coded = ir.node("QuantizeLinear", [product.outputs[0], _constant("out", np.float32(1)), zero])
    return _model([left, right, product, coded], {"x": x}, ir.DataType.UINT8, (size, size))


def _input(name: str, array: Array) -> ir.Value:
    dtype = ir.DataType.from_numpy(array.dtype)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape))


def _constant(name: str, content: Any) -> ir.Value:
    array = np.asarray(content)
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)


def _model(
    nodes: list[ir.Node], feed: dict[str, Array], dtype: ir.DataType, shape: tuple[int, ...]
) -> tuple[ir.Model, dict[str, Array]]:
    out = nodes[-1].outputs[0]
    out.name, out.type, out.shape = "out", ir.TensorType(dtype), ir.Shape(shape)
    read = {value.name: value for node in nodes for value in node.inputs if value is not None and not value.producer()}
    inputs = [value for name, value in read.items() if name in feed]
    weights = [value for name, value in read.items() if name not in feed]
    graph = ir.Graph(inputs, [out], nodes=nodes, initializers=weights, opset_imports={"": _OPSET}, name="peak")
    return ir.Model(graph, ir_version=_IR_VERSION), feed
