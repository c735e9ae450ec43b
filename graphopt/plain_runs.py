"""A runtime that always optimizes, with another beside it for the runs that are to leave a model as it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from graphopt import registry
from graphopt.backend import Backend, Feeds, Inspectable, Kernel, Session, is_plain, is_timed
from graphopt.errors import BackendError


@dataclass(frozen=True)
class PlainRuns:
    """A backend whose plain runs another one makes: the checks of steps, and the folding of constants.

    Attributes:
        deployed: Runs models optimized: what is scored, timed and compared in the end.
        plain_one: Runs them as they stand.
    """

    deployed: Backend
    plain_one: Backend

    name: ClassVar[str] = "plain-runs"
    help: ClassVar[str] = "one runtime for models optimized, another for models as they stand"

    @property
    def timed(self) -> bool:
        """Whether its times say something."""
        return is_timed(self.deployed)

    def missing(self) -> BackendError | None:
        """Return why the one that was asked for cannot run here, or None."""
        return self.deployed.missing()

    def describe(self) -> str:
        """Return the name tables show: both."""
        return f"{self.deployed.describe()}, steps checked by {self.plain_one.describe()}"

    def open(
        self, model: ir.Model | Path, *, threads: int = 0, optimize: bool = True, profile: Path | None = None
    ) -> Session:
        """Open a model in one or the other; see `graphopt.backend.Backend.open`."""
        runtime = self.deployed if optimize else self.plain_one
        return runtime.open(model, threads=threads, optimize=optimize, profile=profile)


@dataclass(frozen=True)
class InspectablePlainRuns(PlainRuns):
    """The same where the runtime tells what it makes of a model."""

    def kernels(self, model: ir.Model, feeds: Feeds, *, threads: int = 0, runs: int = 5) -> list[Kernel]:
        """Return its kernels; see `graphopt.backend.Inspectable.kernels`."""
        assert isinstance(self.deployed, Inspectable), "made of one that tells"
        return self.deployed.kernels(model, feeds, threads=threads, runs=runs)


def with_plain_runs(backend: Backend) -> Backend:
    """Return a backend that can run models as they stand: itself, or with the first that can here beside it.

    This machine's own comes first; the rest follow by name, those whose times say something before the others.
    """
    if is_plain(backend):
        return backend
    found = next((one for one in _installed() if is_plain(one) and one.missing() is None), None)
    if found is None:
        return backend
    return InspectablePlainRuns(backend, found) if isinstance(backend, Inspectable) else PlainRuns(backend, found)


def _installed() -> Iterator[Backend]:
    own = registry.find("TARGETS", registry.host_target()).backend
    names = [own, *sorted(name for name in registry.table("BACKENDS") if name != own)]
    yield from sorted((registry.backend(name) for name in names), key=lambda one: not is_timed(one))
