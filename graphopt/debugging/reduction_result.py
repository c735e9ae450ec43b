"""What a reduction found, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from graphopt.backend import Array
from graphopt.debugging.failures import Failure
from graphopt.model_diff import node_lines

Feed = dict[str, Array]


@dataclass(frozen=True)
class Reduction:
    """What `reduce` found.

    Attributes:
        model: The reduced model.
        feed: What it runs on.
        failure: What is wrong with it, as it was with the original.
        original: What was wrong with the original.
        nodes: Nodes of the original and of the reduced model, nested graphs included.
        bytes: What each takes on disk.
        tried: How many candidates were tried.
        seconds: How long that took.
        complete: Whether nothing is left to try; False where time was up.
        folder: Where it was written, or None.
    """

    model: ir.Model
    feed: Feed
    failure: Failure
    original: Failure
    nodes: tuple[int, int]
    bytes: tuple[int, int]
    tried: int
    seconds: float
    complete: bool
    folder: Path | None = None

    @property
    def lines(self) -> tuple[str, ...]:
        """The nodes of the reduced model as text."""
        return tuple(node_lines(self.model))


@dataclass(frozen=True)
class Progress:
    """Where a reduction stands, told whenever a smaller model was found.

    Attributes:
        stage: What made it smaller.
        nodes: Its nodes.
        bytes: What it takes on disk.
        tried: How many candidates were tried until then.
    """

    stage: str
    nodes: int
    bytes: int
    tried: int
