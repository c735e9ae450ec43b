"""The request: everything the user asked of a run, before anything was opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir

from graphopt.authoring import Pass
from graphopt.choices import ModelLike
from graphopt.errors import UsageError, did_you_mean
from graphopt.pipeline import Pipeline
from graphopt.specialise import check_sizes

Verify = Literal["off", "structure", "final", "each", "rewrites"]
# These run no model unless something asks for figures.
QUIET = ("off", "structure")


@dataclass(frozen=True)
class Request:
    """Everything the user asked for, before anything was opened; see `optimize` for the meanings.

    Attributes:
        helps: Whether another process writes and tells what this one does beside it.
    """

    model: ModelLike
    passes: str | Pipeline | Pass | Sequence[str | Pass]
    output: Path | None = None
    data: Any = None
    evaluation: Any = None
    teacher: ModelLike | None = None
    labels: str | None = None
    metric: str | None = None
    set_dims: Mapping[str, int] = field(default_factory=dict)
    set_shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    budget: Sequence[str] = ()
    target: str | None = None
    backend: str | None = None
    verify: Verify = "each"
    seed: int = 0
    threads: int = 0
    keep_failed: bool = False
    strict: bool = False
    stop_after_edits: int | None = None
    reproducers: Path | None = None
    calibration_cache: Path | None = None
    emit_test: Path | None = None
    timed: bool = True
    reports: Sequence[Path] = ()
    detailed: bool = False
    advise: bool = False
    progress: bool = False
    helps: bool = False

    @property
    def runs_nothing(self) -> bool:
        """Whether no model needs to be run for what was asked."""
        asked = (self.data, self.evaluation, self.metric, self.emit_test)
        return self.verify in QUIET and not self.budget and all(one is None for one in asked)

    @property
    def plain_options(self) -> dict[str, Any]:
        """Those options that can be said again in words, except where results go."""
        said = (
            "model",
            "passes",
            "output",
            "stop_after_edits",
            "reproducers",
            "calibration_cache",
            "emit_test",
            "timed",
            "reports",
            "detailed",
            "advise",
            "progress",
            "helps",
        )
        options: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            value = str(value) if isinstance(value, Path) else value
            plain = isinstance(value, (str, int)) or (isinstance(value, list) and value)
            if one.name not in said and plain and value != one.default:
                options[one.name] = value
        if not isinstance(self.model, ir.Model):  # one in memory is kept with the sizes it was given
            options.update(self._sizes)
        return options

    @property
    def _sizes(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.set_shapes.items()}
        return {name: one for name, one in (("set_dims", dict(self.set_dims)), ("set_shapes", shapes)) if one}


def without_output(request: Request) -> Request:
    """Return a request of the same work that writes no file and shows nothing: of one process among several.

    Where they train together it scores and checks nothing either, for that changes no weight; what is checked rewrite
    by rewrite does.
    """
    return replace(
        request,
        output=None,
        emit_test=None,
        reproducers=None,
        reports=(),
        timed=False,
        advise=False,
        progress=False,
        helps=True,
    )


def check_request(request: Request) -> None:
    """Raise a UsageError for a setting that is none: from Python nothing else would notice."""
    if request.verify not in get_args(Verify):
        raise UsageError(
            f"verify cannot be `{request.verify}`", hint=did_you_mean(str(request.verify), get_args(Verify))
        )
    for name in ("seed", "threads", "stop_after_edits"):
        value = getattr(request, name)
        if not (name == "stop_after_edits" and value is None) and (not isinstance(value, int) or value < 0):
            raise UsageError(f"{name} cannot be `{value}`", hint="a whole number, 0 or more")
    check_sizes(request.set_dims, request.set_shapes)
    if any(not isinstance(text, str) for text in request.budget):
        raise UsageError(f"budget cannot be `{request.budget}`", hint='for example "top1=1%", or a list of such')
    if request.reproducers is not None and request.reproducers.exists() and not request.reproducers.is_dir():
        raise UsageError(f"reproducers cannot go to `{request.reproducers}`: it is no folder", hint="name a folder")
