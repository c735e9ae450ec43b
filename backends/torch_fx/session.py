"""A lowered model, open to be run."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from graphopt import model_io
from graphopt.backend import Array, Feeds
from graphopt.data import input_specs
from graphopt.errors import BackendError, one_line

from .lowering import lower
from .tensors import to_numpy, to_torch


def open_session(model: ir.Model | Path, device: str, threads: int) -> TorchSession:
    """Lower a model and put it on a device.

    Raises:
        BackendError: There is an operator torch cannot compute.
    """
    own = model_io.load(model) if isinstance(model, Path) else model
    module = lower(own).to(device)
    types = {value.name or "": value.dtype for value in own.graph.outputs}
    fixed = [value.name or "" for value in own.graph.inputs if value.is_initializer()]
    dtypes = {spec.name: spec.dtype for spec in input_specs(own)}
    return TorchSession(module, dtypes, types, fixed, torch.device(device), threads)


class TorchSession:
    """A module, and how arrays become its tensors and come back.

    Args:
        module: The lowered model.
        inputs: Name and numpy's dtype of each input, in their order; None where it is no tensor.
        outputs: Name and element type of each output.
        fixed: Inputs with a default, which a session takes for constants.
        device: Where the module lies.
        threads: Threads inside an operator; 0 leaves them as they are.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: dict[str, np.dtype[Any] | None],
        outputs: dict[str, ir.DataType | None],
        fixed: Sequence[str],
        device: torch.device,
        threads: int,
    ) -> None:
        self._module: fx.GraphModule | None = module
        self._inputs, self._outputs, self._fixed = inputs, outputs, fixed
        self._device, self._threads = device, threads
        self._stored = {_storage(one) for one in (*module.parameters(), *module.buffers())}
        self.input_names: Sequence[str] = list(inputs)
        self.output_names: Sequence[str] = list(module.meta["graphopt"].outputs)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the model once; see `graphopt.backend.Session.run`."""
        with self._running():
            tensors = self._tensors(feeds)
            given = self._stored | {_storage(one) for one in tensors}
            values = zip(self.output_names, self._compute(tensors), strict=True)
            return {name: to_numpy(_own(value, given), self._outputs[name]) for name, value in values}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Return what runs the model on a feed in place; see `graphopt.backend.Bindable.bind`."""
        with self._running():
            tensors = self._tensors({name: np.array(array) for name, array in feeds.items()})

        def run() -> None:
            with self._running():
                self._compute(tensors)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)

        return run

    def _compute(self, tensors: Sequence[Any]) -> Any:
        assert self._module is not None, "the session is open"
        try:
            return self._module.forward(*tensors)  # a call would print where it fails before it raises
        except Exception as error:
            where = failing_node(self._module, error)
            if where is None or isinstance(error, BackendError):
                raise
            raise BackendError(f"torch fails at node `{where}`: {one_line(error)}") from error

    def _tensors(self, feeds: Feeds) -> list[Any]:
        for name in feeds:
            if name in self._fixed:
                raise BackendError(
                    f"torch takes `{name}` for a constant, as it has a default, and cannot be fed another",
                    hint="leave it out of the feed, or use another `--backend`",
                )
            if name not in self._inputs:
                raise BackendError(f"torch: the model has no input `{name}`", hint="give inputs by their names")
        return [self._tensor(name, feeds) for name in self._inputs]

    def _tensor(self, name: str, feeds: Feeds) -> Any:
        if name not in feeds:
            raise BackendError(f"torch: input `{name}` is not fed", hint="give every input of the model")
        given: Any = feeds[name]
        wanted = self._inputs[name]
        if wanted is None:  # a sequence, or an optional
            return _each(given, lambda array: self._placed(array))
        array = np.asarray(given)
        if array.dtype != wanted and not {array.dtype.kind, wanted.kind} <= set("OSUT"):
            raise BackendError(f"torch: input `{name}` is {wanted}, and was given {array.dtype}", hint="convert it")
        return self._placed(array)

    def _placed(self, array: Array) -> Any:
        tensor = to_torch(np.asarray(array))
        return tensor.to(self._device) if isinstance(tensor, torch.Tensor) else tensor

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Run without gradients, on the threads asked for, and turn what torch raises into one line."""
        before = torch.get_num_threads()
        if self._threads:
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode(), in_float32() if self._device.type == "cuda" else contextlib.nullcontext():
                yield
        except (RuntimeError, ValueError, TypeError) as error:
            raise BackendError(f"torch fails on the model: {one_line(error)}") from error
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        """Free the module."""
        self._module = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Let a GPU compute float32 as float32: torch has it round what convolutions multiply to 10 bits, unasked."""
    cudnn: Any = torch.backends.cudnn
    settings = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before = [one.fp32_precision for one in settings]
    try:
        for one in settings:
            one.fp32_precision = "ieee"
        yield
    finally:
        for one, precision in zip(settings, before, strict=True):
            one.fp32_precision = precision


def failing_node(module: fx.GraphModule, error: BaseException) -> str | None:
    """Return the name of the model's node during which a module raised an error, or None where it is none."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code is module.forward.__func__.__code__:  # type: ignore[attr-defined]
            source = module.code.splitlines()[line - 1]
            name = source.split("=")[0].strip()
            return next((node.meta.get("onnx") for node in module.graph.nodes if node.name == name), None)
    return None


def _storage(value: Any) -> int | None:
    """Return where a tensor's memory begins."""
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None


def _own(value: Any, given: Collection[int | None]) -> Any:
    """Return what a model gives in memory of its own: operators hand on what they are fed, and weights of a file."""
    if isinstance(value, list):
        return [_own(one, given) for one in value]
    return value.clone() if isinstance(value, torch.Tensor) and _storage(value) in given else value


def _each(given: Any, change: Callable[[Array], Any]) -> Any:
    if given is None:
        return None
    return [_each(one, change) for one in given] if isinstance(given, (list, tuple)) else change(given)
