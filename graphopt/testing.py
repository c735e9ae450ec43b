"""The test kit: what a model must still do, asserted. `graphopt.pytest_plugin` makes fixtures of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.errors import ModelError, UsageError, hints_in_tracebacks
from graphopt.regression.output_bounds import Bound
from graphopt.regression.recorded_model import RecordedModel

if TYPE_CHECKING:
    from graphopt.comparison import Comparison, OutputError
    from graphopt.optimization import Result

__all__ = ["Bound", "RecordedModel", "assert_equivalent", "optimized_into"]

# What a result is called whose original has no file.
_OUTPUT = "model.onnx"


def assert_equivalent(
    a: Any,
    b: Any,
    data: Any = None,
    *,
    tolerance: float | None = None,
    sqnr_db: float | None = None,
    agreement: float | None = None,
    backend: str | None = None,
    seed: int = 0,
    threads: int = 0,
) -> Comparison:
    """Assert that two models give the same outputs on the same inputs, as deployed.

    With no bound given, errors may be what rounding makes of each output's dtype. Each bound that is given is held, and
    only these.

    Args:
        a: The reference: a path, an `onnx_ir.Model`, an `onnx.ModelProto`, or what `graphopt.optimize` returned.
        b: The model to compare with it.
        data: Samples, as for `graphopt.optimize`; made-up inputs where None.
        tolerance: The largest absolute error allowed.
        sqnr_db: The least signal to noise ratio of any output, in dB.
        agreement: The least share of rows whose largest entry is at the same place, of any output that has rows.
        backend: Backend text; this machine's own where None.
        seed: Seed of made-up inputs.
        threads: Threads for the backend; 0 leaves it to the runtime.

    Returns:
        The comparison, for more assertions.

    Raises:
        AssertionError: They differ by more, or have other inputs or outputs; the message names the worst output. Or all
            they give is NaN or infinite, so that nothing can be told.
        GraphoptError: A model cannot be read or run, the data does not fit, or no output has rows that could agree.
    """
    from graphopt import compare
    from graphopt.choices import open_model

    __tracebackhide__ = True
    with hints_in_tracebacks():
        models = [open_model(_as_model(one)) for one in (a, b)]
        try:
            found = compare(*models, data=data, backend=backend, seed=seed, threads=threads)
        except ModelError as error:
            raise AssertionError(f"{error.message}\nhint: {error.hint}") from error
        if agreement is not None and all(one.top1_agreement is None for one in found.outputs.values()):
            raise UsageError("no output has rows that could agree", hint="give `tolerance` or `sqnr_db`")
    if found.says_nothing:
        raise AssertionError(
            "all outputs are NaN or infinite: nothing can be told\nhint: give `data` they are made for"
        )
    faults = [
        fault
        for output in found.outputs.values()
        if (fault := _fault(output, tolerance, sqnr_db, agreement)) is not None
    ]
    if faults:
        on = f"{found.samples} samples of `{found.source}`" if found.source else "made-up inputs"
        raise AssertionError("\n".join([f"{_name(a)} and {_name(b)} are not equivalent on {on}:", *faults, _LOOK]))
    return found


_LOOK = "hint: `graphopt compare A B --layers` shows where they part"


def _fault(output: OutputError, tolerance: float | None, sqnr_db: float | None, agreement: float | None) -> str | None:
    if output.mismatch is not None:
        return f"  `{output.name}`: {output.mismatch}"
    bounds = (tolerance, sqnr_db, agreement)
    if all(bound is None for bound in bounds):
        within = output.within()
    else:
        share = output.top1_agreement
        within = (
            (tolerance is None or output.max_abs <= tolerance)
            and (sqnr_db is None or output.sqnr_db >= sqnr_db)
            and (agreement is None or share is None or share >= agreement)
        )
    if within:
        return None
    rows = f", {output.top1_agreement:.1%} of rows agree" if output.top1_agreement is not None else ""
    return (
        f"  `{output.name}`: off by {output.max_abs:.3g} of {output.peak:.3g}, {output.sqnr_db:.1f} dB{rows}"
        f"; {_said(tolerance, sqnr_db, agreement)} allowed"
    )


def _said(tolerance: float | None, sqnr_db: float | None, agreement: float | None) -> str:
    said = [
        text
        for value, text in (
            (tolerance, f"at most {tolerance}"),
            (sqnr_db, f"at least {sqnr_db} dB"),
            (agreement, f"at least {agreement} of rows"),
        )
        if value is not None
    ]
    return ", ".join(said) or "rounding of its dtype is"


def _as_model(given: Any) -> Any:
    """Return a path or a model of the IR for whatever stands for a model."""
    if hasattr(given, "SerializeToString"):
        return ir.from_proto(given)
    if hasattr(given, "report") and hasattr(given, "model"):  # what `optimize` returns
        return given.output or given.model
    return given


def _name(given: Any) -> str:
    model = _as_model(given)
    return f"`{model}`" if isinstance(model, (str, Path)) else f"the model `{model.graph.name or 'in memory'}`"


def optimized_into(folder: Path, model: Any, passes: Any, **options: Any) -> Result:
    """Optimize a model, write the result into a folder, and return it; errors carry their hint into tracebacks.

    Args:
        folder: Where the result goes.
        model: A path, an `onnx_ir.Model` or an `onnx.ModelProto`.
        passes: Pipeline text, or passes in a list.
        options: Those of `graphopt.optimize`; models are not timed unless `timed` says so.

    Raises:
        GraphoptError: As `graphopt.optimize` raises it.
    """
    from graphopt import optimize

    __tracebackhide__ = True
    given = _as_model(model)
    name = Path(given).name if isinstance(given, (str, Path)) else _OUTPUT
    with hints_in_tracebacks():
        return optimize(given, passes, output=folder / name, **{"timed": False, **options})
