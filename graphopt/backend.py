"""The border to runtimes: what graphopt asks of one, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import BackendError

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


class Session(Protocol):
    """A model opened in a runtime, ready to run."""

    @property
    def input_names(self) -> Sequence[str]:
        """Names of the inputs a feed must give."""

    @property
    def output_names(self) -> Sequence[str]:
        """Names of the outputs, in the model's order."""

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the model once and return its outputs by name.

        Raises:
            BackendError: The runtime refused the feeds or failed on them.
        """

    def close(self) -> None:
        """Free what the session holds."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Backend(Protocol):
    """A runtime. Implementations are frozen dataclasses whose fields are their options.

    One whose time says nothing of any other runtime has `timed = False`, which `is_timed` asks for.
    """

    name: ClassVar[str]
    help: ClassVar[str]

    def missing(self) -> BackendError | None:
        """Return the error that says why this backend cannot run here and what to install, or None if it can."""

    def describe(self) -> str:
        """Return a short name for tables, for example ``onnxruntime cpu``."""

    def open(
        self, model: ir.Model | Path, *, threads: int = 0, optimize: bool = True, profile: Path | None = None
    ) -> Session:
        """Open a model.

        Args:
            model: A model in memory, or a file.
            threads: Threads inside an operator; 0 leaves it to the runtime.
            optimize: Whether the runtime's own graph optimizations are fully on, or off.
            profile: File prefix for the runtime's operator profile, or None for no profile.

        Raises:
            BackendError: The runtime is missing or refuses the model.
        """


def is_timed(backend: Backend) -> bool:
    """Return whether how long a runtime takes is worth measuring: so unless it says otherwise."""
    return bool(getattr(backend, "timed", True))


@dataclass(frozen=True)
class Kernel:
    """A node of a model as a runtime has rewritten it for itself.

    Attributes:
        op: Operator it runs, as ``domain::op`` outside the ONNX domain.
        name: Name the runtime gave it, made from that of a node it stands for.
        inputs: Names of what it reads.
        outputs: Names of what it makes.
        reads: Dtypes of its inputs, such as ``uint8``; empty where it did not run.
        milliseconds: Time it takes in a run; 0 where it did not run.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reads: tuple[str, ...]
    milliseconds: float


@runtime_checkable
class Inspectable(Protocol):
    """A backend that can tell what it makes of a model."""

    def kernels(self, model: ir.Model, feeds: Feeds, *, threads: int = 0, runs: int = 5) -> list[Kernel]:
        """Optimize and run a model as ever, and return every kernel of it, those of nested graphs included.

        Args:
            model: The model.
            feeds: What it runs on.
            threads: Threads inside an operator; 0 leaves it to the runtime.
            runs: Runs whose times are averaged, after one that is not counted.

        Raises:
            BackendError: The runtime is missing, or refuses the model or the feeds.
        """
