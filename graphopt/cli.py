"""The command line: options in, one call of the library, a table out."""

from __future__ import annotations

import enum
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.errors import EXIT_CHECK_FAILED, EXIT_USAGE, GraphoptError, UsageError, VerificationError

if TYPE_CHECKING:
    from graphopt.report import Report

# Everything heavy is imported inside the commands, so that `graphopt --help` answers at once.

app = typer.Typer(
    name="graphopt",
    help="Make trained neural networks smaller and faster on a given runtime, and prove the result.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DataOption = Annotated[
    str | None, typer.Option("--data", help="Samples: FILE.npz, a folder of them, or file.py:function.", metavar="DATA")
]
LabelsOption = Annotated[str | None, typer.Option(help="Key of the labels in the data [default: labels].")]
MetricOption = Annotated[str | None, typer.Option(help="Metric to score by, or file.py:function.", metavar="NAME")]
BackendOption = Annotated[
    str | None, typer.Option(help="Backend, such as onnxruntime:provider=cuda [default: the target's].")
]
ThreadsOption = Annotated[int, typer.Option(min=0, help="Threads of the backend; 0 leaves it to the runtime.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Also print every remark of the passes.")]


class VerifyMode(enum.StrEnum):
    """When to check."""

    off = "off"
    final = "final"
    each = "each"
    rewrites = "rewrites"


class ListKind(enum.StrEnum):
    """What to list."""

    passes = "passes"
    presets = "presets"
    backends = "backends"
    targets = "targets"
    metrics = "metrics"


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from graphopt.driver import installed_version

        typer.echo(f"graphopt {installed_version()}")
        raise typer.Exit


@app.command()
def optimize(
    model: Annotated[Path, typer.Argument(help="ONNX model; never changed.", show_default=False)],
    passes: Annotated[
        str | None,
        typer.Option(help="Pipeline, such as prune:sparsity=0.5,quant; see `graphopt list`.", metavar="SPEC"),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="Pipeline as TOML, instead of --passes.", metavar="FILE")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Output [default: MODEL.opt.onnx].", metavar="OUT")
    ] = None,
    data: DataOption = None,
    evaluation: Annotated[
        str | None,
        typer.Option("--eval", help="Samples to score; without it a quarter of --data is held back.", metavar="DATA"),
    ] = None,
    labels: LabelsOption = None,
    metric: MetricOption = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="The most a metric may lose, such as top1=1%.", metavar="METRIC=DROP")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="What the result runs on [default: this machine's CPU].", metavar="NAME")
    ] = None,
    backend: BackendOption = None,
    verify: Annotated[VerifyMode, typer.Option(help="When to check the model.")] = VerifyMode.each,
    report: Annotated[Path | None, typer.Option(help="Write the report here, as .json.", metavar="FILE")] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    keep_failed: Annotated[bool, typer.Option(help="Write the model even if a check or the budget failed.")] = False,
    verbose: VerboseOption = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Run passes over a model, check and measure the result, and write it."""
    from graphopt.driver import optimize as run

    out = output if output is not None else model.with_name(f"{model.stem}.opt.onnx")
    _check_report(report, model, out)
    try:
        result = run(
            model,
            _pipeline(passes, recipe),
            output=out,
            data=data,
            evaluation=evaluation,
            labels=labels,
            metric=metric,
            budget=budget or (),
            target=target,
            backend=backend,
            verify=verify.value,
            seed=seed,
            threads=threads,
            keep_failed=keep_failed,
            progress=not quiet,
        )
    except VerificationError as error:
        if error.report is not None:
            _show_report(error.report, report, quiet, verbose)
        raise
    _show_report(result.report, report, quiet, verbose)
    if not quiet:
        typer.echo(f"wrote {result.output}" + (f"   report: {report}" if report is not None else ""))


def _pipeline(passes: str | None, recipe: Path | None) -> Any:
    """Return the pipeline from whichever of the two options was given."""
    from graphopt.pipeline import Pipeline

    if (passes is None) == (recipe is None):
        given = "neither" if passes is None else "both"
        raise UsageError(f"give either `--passes` or `--recipe`; {given} was given", hint="e.g. `--passes prune,quant`")
    if recipe is None:
        return Pipeline.parse(passes or "")
    try:
        return Pipeline.from_toml(recipe.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(
            f"cannot read recipe `{recipe}`: {reason}", hint="write one `[[pass]]` table a pass"
        ) from error


def _check_report(report: Path | None, model: Path, output: Path) -> None:
    """Refuse a report that cannot be written, before any work."""
    if report is None:
        return
    if report.suffix != ".json":
        raise UsageError(f"report `{report}` is of unknown kind", hint="name it `.json`")
    if report in (model, output) or report.is_dir() or not report.parent.is_dir():
        raise UsageError(f"cannot write report `{report}`", hint="name a new file in a folder that exists")


def _show_report(report: Report, file: Path | None, quiet: bool, verbose: bool) -> None:
    """Print the tables and write the report file."""
    from graphopt import tables

    if not quiet:
        tables.print_report(report, verbose=verbose)
    if file is not None:
        try:
            file.write_text(report.to_json())
        except OSError as error:
            raise UsageError(f"cannot write report `{file}`: {error.strerror}", hint="choose another place") from error


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="ONNX model.", show_default=False)], as_json: JsonOption = False
) -> None:
    """Show what a model is made of: operators, parameters, bytes, MACs, inputs, outputs, largest layers."""
    from graphopt import tables
    from graphopt.model_io import load, stored_bytes
    from graphopt.summary import summarize

    summary, size = summarize(load(model)), stored_bytes(model)
    if as_json:
        _print_json({"model": str(model), "bytes": size, **tables.as_values(summary)})
    else:
        tables.print_summary(str(model), summary, size)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Reference model.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="Model to compare with it.", show_default=False)],
    data: DataOption = None,
    labels: LabelsOption = None,
    metric: MetricOption = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest absolute error allowed [default: rounding of the dtype].")
    ] = None,
    backend: BackendOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare the outputs of two models, matched by name; exit with 1 where they differ beyond the tolerance."""
    from graphopt import tables
    from graphopt.side_by_side import compare as run

    result = run(a, b, data=data, labels=labels, metric=metric, backend=backend, seed=seed, threads=threads)
    if as_json:
        outputs = {name: error.as_dict() for name, error in result.outputs.items()}
        _print_json({"within": result.within(tolerance), "outputs": outputs, "metrics": result.metrics})
    else:
        tables.print_comparison(result, tolerance)
    if not result.within(tolerance):
        raise typer.Exit(EXIT_CHECK_FAILED)


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="Models with the same inputs.", show_default=False)],
    data: DataOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per run.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to spend in all.")] = 5.0,
    backend: BackendOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Time models side by side, their runs interleaved."""
    from graphopt import tables
    from graphopt.side_by_side import bench as run

    times = run(models, data=data, batch=batch, backend=backend, threads=threads, seconds=seconds, seed=seed)
    if as_json:
        _print_json([{"model": str(m), **tables.as_values(t)} for m, t in zip(models, times, strict=True)])
    else:
        tables.print_latencies([str(model) for model in models], times, batch, threads)


@app.command(name="list")
def list_(
    kind: Annotated[ListKind | None, typer.Argument(help="What to list; everything by default.")] = None,
) -> None:
    """List passes, presets, backends, targets and metrics, with their options."""
    from graphopt import tables

    for one in [kind] if kind is not None else list(ListKind):
        tables.print_list(one.value)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def main() -> None:
    """Run the command line; every `GraphoptError` becomes one line, a hint and an exit code."""
    try:
        app()
    except GraphoptError as error:
        typer.echo(f"error: {error.message}", err=True)
        if error.hint:
            typer.echo(f"hint: {error.hint}", err=True)
        if error.__cause__ is not None and {"-v", "--verbose"} & set(sys.argv):
            traceback.print_exception(error.__cause__)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output has gone (`graphopt list | head`); nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_CHECK_FAILED)
    except OSError as error:
        typer.echo(f"error: {error.strerror or error}: {error.filename or ''}", err=True)
        sys.exit(EXIT_USAGE)
