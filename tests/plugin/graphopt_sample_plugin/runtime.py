"""A backend with no options: onnx's evaluator under another name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from graphopt import registry
from graphopt.backend import Session


@dataclass(frozen=True)
class SampleRuntime:
    """Runs models on whatever graphopt calls `reference`."""

    name: ClassVar[str] = "sample-runtime"
    help: ClassVar[str] = "a third party's runtime"

    def missing(self) -> None:
        """Return None: it runs everywhere."""
        return None

    def describe(self) -> str:
        """Return the name tables show."""
        return "sample runtime"

    def open(
        self, model: ir.Model | Path, *, threads: int = 0, optimize: bool = True, profile: Path | None = None
    ) -> Session:
        """Open a model."""
        session: Session = registry.backend("reference").open(model, threads=threads, optimize=optimize)
        return session
