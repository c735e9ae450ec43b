"""The command line: options in, one call of the library, a table out."""

from __future__ import annotations

import contextlib
import enum
import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.commands import (
    bench_command,
    compare_command,
    debug_command,
    doctor_command,
    explain_command,
    import_command,
    inspect_command,
    recover_command,
    sensitivity_command,
)
from graphopt.commands.cli_options import (
    BackendOption,
    BudgetOption,
    CalibrationCacheOption,
    DataOption,
    EmitTestOption,
    EvaluationOption,
    JsonOption,
    LabelsOption,
    MetricOption,
    PassesOption,
    RecipeOption,
    SeedOption,
    SetDimOption,
    SetShapeOption,
    TargetOption,
    TeacherOption,
    ThreadsOption,
    VerboseOption,
    open_pipeline,
)
from graphopt.errors import (
    EXIT_FAULT,
    EXIT_USAGE,
    DataError,
    FailedElsewhere,
    GraphoptError,
    ModelError,
    UsageError,
    VerificationError,
    did_you_mean,
)
from graphopt.lazy_imports import defer
from graphopt.processes import is_main_process, process_count, process_number

if TYPE_CHECKING:
    from graphopt.report import Report

# Everything heavy is imported inside the commands, so that `graphopt --help` answers at once.

# What a shell reports of a process that the signal ended.
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE, EXIT_TERMINATED = 130, 141, 143

# Allocations before a collection of the young, and how many of these before one of the older.
GC_THRESHOLDS = (200_000, 20, 100)

app = typer.Typer(
    name="graphopt",
    help="Make trained neural networks smaller and faster on a given runtime, and prove the result.",
    rich_markup_mode=None,  # help texts hold brackets
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class VerifyMode(enum.StrEnum):
    """When to check."""

    off = "off"
    structure = "structure"
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
    rules = "rules"


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from graphopt.versions import installed_version

        typer.echo(f"graphopt {installed_version()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_USAGE)


@app.command(short_help="Run passes over a model and write the result.")
def optimize(
    model: Annotated[Path, typer.Argument(help="ONNX model; never changed.", show_default=False, metavar="MODEL")],
    passes: PassesOption = None,
    recipe: RecipeOption = None,
    set_dim: SetDimOption = None,
    set_shape: SetShapeOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Output [default: MODEL.opt.onnx].", metavar="OUT")
    ] = None,
    data: DataOption = None,
    evaluation: EvaluationOption = None,
    teacher: TeacherOption = None,
    labels: LabelsOption = None,
    metric: MetricOption = None,
    budget: BudgetOption = None,
    target: TargetOption = None,
    backend: BackendOption = None,
    verify: Annotated[VerifyMode, typer.Option(help="When to check the model.")] = VerifyMode.each,
    report: Annotated[
        list[Path] | None,
        typer.Option(help="Write the report here, as .html, .md or .json; may be repeated.", metavar="FILE"),
    ] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Write the model even if a check or the budget failed.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Stop at a wrong rewrite instead of leaving it out, and at a step that cannot be checked."
        ),
    ] = False,
    stop_after_edits: Annotated[
        int | None, typer.Option(min=0, help="End the run after this many edits.", metavar="N")
    ] = None,
    reproducers: Annotated[
        Path | None, typer.Option(help="Where failures leave a folder [default: beside OUT].", metavar="DIR")
    ] = None,
    no_reproducers: Annotated[bool, typer.Option("--no-reproducers", help="Failures leave nothing.")] = False,
    calibration_cache: CalibrationCacheOption = None,
    emit_test: EmitTestOption = None,
    verbose: VerboseOption = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Run passes over a model, check and measure the result, and write it."""
    from graphopt.driver import optimize as run
    from graphopt.specialise import parse_dims, parse_shapes

    out = output if output is not None else model.with_name(f"{model.stem}.opt.onnx")
    quiet = quiet or not is_main_process()
    try:
        result = run(
            model,
            open_pipeline(passes, recipe),
            output=out,
            data=data,
            evaluation=evaluation,
            teacher=teacher,
            labels=labels,
            metric=metric,
            set_dims=parse_dims(set_dim or ()),
            set_shapes=parse_shapes(set_shape or ()),
            budget=budget or (),
            target=target,
            backend=backend,
            verify=verify.value,
            seed=seed,
            threads=threads,
            keep_failed=keep_failed,
            strict=strict,
            stop_after_edits=stop_after_edits,
            reproducers=None if no_reproducers else reproducers or (out.parent if out.parent.is_dir() else None),
            calibration_cache=calibration_cache,
            emit_test=emit_test,
            report=report,
            advise=not quiet,
            progress=not quiet,
        )
    except VerificationError as error:
        if error.report is not None:
            _show_report(error.report, quiet, verbose)
            _say_written(error.output, report, quiet, emit_test, failed=True)
        raise
    _show_report(result.report, quiet, verbose)
    _say_warnings(result.report)
    _say_written(result.output, report, quiet, emit_test)


def _say_warnings(report: Report) -> None:
    """Say on stderr, whatever is shown on stdout, that rewrites were left out because they are wrong, and the like."""
    refused = sum(len(step.refused) for step in report.steps)
    if refused:
        what = "1 rewrite was" if refused == 1 else f"{refused} rewrites were"
        typer.echo(f"warning: {what} refused for changing the outputs, and left out; `--strict` stops there", err=True)
    recover_command.say_warnings(report)


def _say_written(
    output: Path | None, reports: list[Path] | None, quiet: bool, test: Path | None, *, failed: bool = False
) -> None:
    if quiet:
        return
    said = [f"wrote {output}" if output is not None else "no model written"]
    said += [f"report: {report}" for report in reports or ()]
    said += [f"test: {'none, the run failed' if failed else test}"] if test is not None else []
    typer.echo("   ".join(said))


def _show_report(report: Report, quiet: bool, verbose: bool) -> None:
    """Print the tables."""
    from graphopt.commands import tables

    if not quiet:
        tables.print_report(report, verbose=verbose)


app.command(name="compare", short_help="Compare two models: their outputs, or what is inside.")(compare_command.compare)
app.command(name="bench", short_help="Time models side by side.")(bench_command.bench)
app.command(name="doctor", short_help="Look at this machine and what is installed on it.")(doctor_command.doctor)
app.command(name="inspect", short_help="Show what a model is made of, or which channels go together.")(
    inspect_command.inspect
)
app.command(name="explain", short_help="Show what a target runs in integers, and why not the rest.")(
    explain_command.explain
)
app.command(name="import", short_help="Make an ONNX model of a PyTorch module.")(import_command.import_)
app.add_typer(debug_command.app, name="debug", short_help="Find what breaks a model, and make it small.")
app.command(
    name="recover", short_help="Train a model until it does again what it did.", cls=recover_command.WithPassOptions
)(recover_command.recover)
app.command(name="sensitivity", short_help="Show which layers a lossy pass hurts.")(sensitivity_command.sensitivity)


@app.command(name="list", short_help="List passes, presets, backends, targets, metrics and rules.")
def list_(
    kind: Annotated[
        ListKind | None, typer.Argument(help="What to list; everything but rules by default.", metavar="KIND")
    ] = None,
    passes: Annotated[
        str | None, typer.Argument(help="Whose rules: a pass, a preset or a pipeline.", metavar="SPEC")
    ] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also say why each rule holds.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List passes, presets, backends, targets and metrics with their options, or the rules of passes."""
    from graphopt.commands import tables

    if kind is ListKind.rules:
        from graphopt.rulebook import rulebook

        entries = rulebook(passes)
        if as_json:
            _print_json([entry.as_dict() for entry in entries])
        else:
            tables.print_rules(entries, verbose=verbose)
        return
    if kind is ListKind.backends and as_json and passes is None and not verbose:
        from graphopt.backend_survey import survey_backends

        _print_json([one.as_dict() for one in survey_backends()])
        return
    if passes is not None or verbose or as_json:
        hint = "`graphopt list rules [SPEC]`, or `graphopt list backends --json`"
        raise UsageError("only rules are listed by pass or with `-v`, and rules and backends as JSON", hint=hint)
    for one in [kind] if kind is not None else [kind for kind in ListKind if kind is not ListKind.rules]:
        tables.print_list(one.value)


def _print_json(value: Any) -> None:
    from graphopt.report import finite

    typer.echo(json.dumps(finite(value), indent=2))


def main() -> None:
    """Run the command line; whatever goes wrong becomes one line, a hint and an exit code."""
    # The IR imports it for arithmetic on symbolic dimensions that graphopt does not use: a third of a second.
    defer("sympy", "onnx_ir._symbolic_shapes")
    # A graph is a great many small objects that live to the end; collecting among them took a third of large runs.
    gc.set_threshold(*GC_THRESHOLDS)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows no `→` gets a `?`.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    with _cleanup_on_termination():
        code = _run()
    if code == EXIT_INTERRUPTED:
        _explain("interrupted", "run it again; a file is written whole or not at all")
    if code:
        sys.exit(code)


def _run() -> int:
    try:
        # Outside of standalone mode an exit code is returned, and the mistakes of users are raised.
        code = app(prog_name="graphopt", standalone_mode=False)
        sys.stdout.flush()
    except GraphoptError as error:
        # What a user got wrong is the same in every process of a run, and the main one says it.
        if is_main_process() or not isinstance(error, (UsageError, ModelError, DataError, FailedElsewhere)):
            _explain(error.message, error.hint, error.__cause__)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`graphopt list | head`); nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        where = f": `{error.filename}`" if error.filename else ""
        _explain(f"{error.strerror or error}{where}", "check the path, the disk and your permissions", error)
        return EXIT_USAGE
    except MemoryError as error:
        _explain("out of memory", "close other programs, or use a machine with more memory", error)
        return EXIT_USAGE
    except Exception as error:
        _explain(*_mistake(error), error)
        return EXIT_USAGE if hasattr(error, "format_message") else EXIT_FAULT
    return code if isinstance(code, int) else 0


def _explain(message: str, hint: str | None, cause: BaseException | None = None) -> None:
    """Say what went wrong on stderr; with ``-v`` also where."""
    who = "" if is_main_process() else f"process {process_number()} of {process_count()}: "
    typer.echo(f"error: {who}{' '.join(message.split())}", err=True)
    if hint:
        typer.echo(f"hint: {' '.join(hint.split())}", err=True)
    if cause is not None and {"-v", "--verbose"} & set(sys.argv):
        traceback.print_exception(cause)


def _mistake(error: Exception) -> tuple[str, str]:
    """Return message and hint for what is no `GraphoptError`: a wrong command line, or a fault of ours."""
    describe = getattr(error, "format_message", None)
    if describe is None:
        text = f"graphopt failed: {type(error).__name__}: {error}"
        if isinstance(error, ImportError):
            return (
                text,
                "`graphopt doctor` says which package is missing or broken; where it finds none, please report it",
            )
        return text, "this is a fault of graphopt; `-v` shows where; please report it"
    message = describe().replace("Value error, ", "").rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "graphopt"
    if message.startswith("No such command"):
        unknown, known = message.split("'")[1], _commands(command)
        moved = [name for name in known if name.endswith(f" {unknown}")]
        return f"unknown command `{unknown}`", did_you_mean(unknown, moved or known)
    message, _, close = message.partition(" (Possible options: ")
    option = message.rpartition(": ")[2]
    hint = did_you_mean(option, close.rstrip(")").split(", ")) if close else f"see `{command} --help`"
    return message[:1].lower() + message[1:], hint


def _commands(within: str) -> list[str]:
    """Return what may be written behind `graphopt`, or behind a group of commands."""
    own = [str(one.name or getattr(one.callback, "__name__", "")) for one in app.registered_commands]
    groups = {
        str(group.name): [
            str(one.callback.__name__) for one in group.typer_instance.registered_commands if one.callback
        ]
        for group in app.registered_groups
        if group.typer_instance is not None
    }
    name = within.rpartition(" ")[2]
    return groups.get(name) or [*own, *groups, *(f"{group} {one}" for group, names in groups.items() for one in names)]


@contextlib.contextmanager
def _cleanup_on_termination() -> Iterator[None]:
    """Let a request to end the process clean up as an interrupt does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    raise SystemExit(EXIT_TERMINATED)
