"""The command that asks for the same run again, in the words of the command line."""

from __future__ import annotations

import shlex
from pathlib import Path

import onnx_ir as ir

from graphopt import options, registry
from graphopt.pipeline import Pipeline
from graphopt.reproducer import as_arguments
from graphopt.request import Request


def command_of(request: Request, pipeline: Pipeline) -> tuple[str | None, str]:
    """Return the command that asks for a run and all it writes, or None and why there is none."""
    if isinstance(request.model, ir.Model):
        return None, "the model was given in memory, from Python"
    named = (("the data", request.data), ("the evaluation data", request.evaluation), ("the teacher", request.teacher))
    for what, given in named:
        if given is not None and not isinstance(given, (str, Path)):
            return None, f"{what} was given in memory, from Python"
    for one in (one for step in pipeline.steps for one in step.passes):
        if one.name not in registry.table("PASSES") or registry.find("PASSES", one.name) is not type(one):
            return None, f"pass `{one.name}` was given in memory, from Python"
        for name, value in options.changed(one).items():
            if isinstance(value, options.FunctionText) and not value.is_found:
                return None, f"option `{name}` of pass `{one.name}` was given in memory, from Python"
    words = [str(request.model), "--passes", str(pipeline), *as_arguments(request.plain_options)]
    words += ["--verify", request.verify] if request.verify != "each" else []
    words += ["--strict"] if request.strict else []
    words += ["--keep-failed"] if request.keep_failed else []
    words += ["--stop-after-edits", str(request.stop_after_edits)] if request.stop_after_edits is not None else []
    reports = [("--report", one) for one in request.reports]
    places = [("-o", request.output), *reports, ("--emit-test", request.emit_test)]
    words += [word for option, place in places if place is not None for word in (option, str(place))]
    return shlex.join(["graphopt", "optimize", *words]), ""
