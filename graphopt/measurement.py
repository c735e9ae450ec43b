"""Measurements of a model and its file, each paid only by a run that shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import latency, summary, walk
from graphopt.backend import Array, Backend, Placing
from graphopt.model_io import GZIP_LIMIT, gzip_bytes, saved_bytes
from graphopt.report import Side

LATENCY_SECONDS = 2.0


def measure_side(model: ir.Model, files: Sequence[Path], *, content: bool, work: bool) -> Side:
    """Return the figures of one side of a run.

    Args:
        model: The model.
        files: Where it is stored, the model itself first; none where it is not.
        content: Whether to look at what weights hold: the share of zeros, the size after gzip. Reads all of the file.
        work: Whether to count multiply-accumulates, for which shapes are inferred.
    """
    size = sum(file.stat().st_size for file in files) if files else saved_bytes(model)
    return Side(
        nodes=sum(1 for _ in walk.every_node(model)),
        parameters=summary.count_parameters(model),
        nonzero=summary.count_nonzero_parameters(model) if content else None,
        bytes=size,
        bytes_gzip=gzip_bytes(files[0]) if content and files and size <= GZIP_LIMIT else None,
        macs=summary.count_macs(model) if work else None,
    )


@dataclass(frozen=True)
class Deployed:
    """What a runtime made of a file.

    Attributes:
        latency: Run times.
        placement: Which part of the runtime took how many nodes, as `graphopt.backend.Placement.as_dict` says it, or
            None where it does not tell.
    """

    latency: latency.Latency
    placement: dict[str, Any] | None


def time_side_by_side(
    backend: Backend, files: Sequence[Path], feed: dict[str, Array], threads: int
) -> Sequence[Deployed]:
    """Time models as deployed, their runs interleaved."""
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(backend.open(file, threads=threads)) for file in files]
        times = latency.measure(sessions, [feed] * len(files), seconds=LATENCY_SECONDS, min_runs=latency.LEAST_PARTS)
        placed = [session.placement() if isinstance(session, Placing) else None for session in sessions]
    return [Deployed(one, at.as_dict() if at is not None else None) for one, at in zip(times, placed, strict=True)]
