"""The border to runtimes: what graphopt asks of one, and nothing more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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

    One whose time says nothing of any other runtime has `timed = False`, which `is_timed` asks for. One that cannot
    compute a model operator by operator as it stands has `plain = False`, which `is_plain` asks for.
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


def is_plain(backend: Backend) -> bool:
    """Return whether a runtime can leave its own optimizations off entirely: so unless it says otherwise.

    Where it cannot, two models of which one is an exact rewrite of the other need not give equal bits.
    """
    return bool(getattr(backend, "plain", True))


@dataclass(frozen=True)
class Trouble:
    """Something about an installation that will go wrong, or already does.

    Attributes:
        what: One line: what it is.
        fix: One line: what to do about it.
        fatal: Whether results cannot be relied on, or nothing runs.
    """

    what: str
    fix: str
    fatal: bool


@runtime_checkable
class Diagnosable(Protocol):
    """A backend that knows its own installation."""

    def version(self) -> str | None:
        """Return the package and version that would run, such as ``onnxruntime 1.32.0``, or None."""

    def variants(self) -> Sequence[Backend]:
        """Return this backend once for each thing it may run on, whether or not that is here."""

    def troubles(self) -> Sequence[Trouble]:
        """Return what is wrong with the installation; nothing where it is merely not installed."""


@dataclass(frozen=True)
class Kernel:
    """A node of a model as a runtime has rewritten it for itself.

    Attributes:
        op: Operator it runs, as ``domain::op`` outside the ONNX domain.
        name: Name the runtime gave it, made from that of a node it stands for.
        inputs: Names of what it reads.
        outputs: Names of what it makes; none where the runtime does not tell.
        reads: Dtypes of its inputs, such as ``uint8``; empty where it did not run.
        milliseconds: Time it takes in a run; 0 where it did not run.
        provider: What ran it, as the runtime calls it; empty where it has but one place, or it did not run.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reads: tuple[str, ...]
    milliseconds: float
    provider: str = ""


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


@runtime_checkable
class Bindable(Protocol):
    """A session that can keep a feed, and what comes out of it, in the memory it computes in."""

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Return what runs the model once on a feed already in place; it returns when the outputs are there.

        What is timed is the model then, without copies from and to this process. The feed may be changed or freed
        afterwards; the call is valid until the session is closed.

        Raises:
            BackendError: The runtime refuses the feeds; raised by the call, too, where it fails on them.
        """


@dataclass(frozen=True)
class PlacedNode:
    """A node as a runtime divided the model.

    Attributes:
        name: Its name as the runtime knows it: the model's own, or that of a node it made; may be empty.
        op: Its operator, as ``domain::op`` outside the ONNX domain.
        provider: What runs it, as the runtime calls it.
        on_purpose: Whether it is there because it pays there, as arithmetic on shapes does beside a GPU.
    """

    name: str
    op: str
    provider: str
    on_purpose: bool = False


@dataclass(frozen=True)
class Placement:
    """Which part of a runtime runs which node.

    Attributes:
        wanted: What the user asked for, as the runtime calls it.
        nodes: Every node, those of nested graphs included, in no order to rely on.
    """

    wanted: str
    nodes: tuple[PlacedNode, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many nodes each provider runs, most first."""
        return dict(Counter(node.provider for node in self.nodes).most_common())

    @property
    def elsewhere(self) -> tuple[PlacedNode, ...]:
        """What is not where it was wanted, and not on purpose."""
        return tuple(n for n in self.nodes if n.provider != self.wanted and not n.on_purpose)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values: the counts, and what is elsewhere by provider and operator."""
        ops: dict[str, Counter[str]] = {}
        for node in self.elsewhere:
            ops.setdefault(node.provider, Counter())[node.op] += 1
        return {
            "wanted": self.wanted,
            "nodes": self.counts,
            "elsewhere": {provider: dict(counted.most_common()) for provider, counted in ops.items()},
        }


@runtime_checkable
class Placing(Protocol):
    """A session that can tell which part of its runtime took which node."""

    def placement(self) -> Placement | None:
        """Return how the runtime divided the model, or None where this version of it cannot tell."""


@runtime_checkable
class Differentiable(Protocol):
    """A backend that can hand out a model as something to train."""

    def lower(
        self, model: ir.Model, *, observe: Sequence[str] = (), differentiable: bool = True, shared: bool = True
    ) -> Any:
        """Return a model as a `torch.fx.GraphModule`, with its weights as parameters that do not train yet.

        It takes the inputs of `graphopt.data.input_specs` by position and returns a tuple: the model's outputs in their
        order, then what is observed. Its ``meta["graphopt"]`` says which parameter is which initializer
        (``parameters``: name to path), and which node computes which value (``values``: name to node); each node of the
        graph has ``meta["onnx"]``, the name of the model's node, and ``meta["origins"]``. Weights are the model's own
        memory, or their file's, so what trains gets a copy of its own first.

        Args:
            model: The model.
            observe: Names of values of the main graph to return behind the outputs.
            differentiable: Whether gradients go through QuantizeLinear (straight through its rounding), which then
                gives its codes as floats.
            shared: Whether weights that the model holds in memory are that memory, or copies of it.

        Raises:
            BackendError: The backend is missing, or there is an operator it cannot compute.
        """
