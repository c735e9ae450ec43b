"""The command `recover`."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from graphopt.commands.cli_options import (
    BackendOption,
    BudgetOption,
    DataOption,
    EvaluationOption,
    LabelsOption,
    MetricOption,
    SeedOption,
    TargetOption,
    TeacherOption,
    ThreadsOption,
    VerboseOption,
)
from graphopt.errors import UsageError, VerificationError, did_you_mean
from graphopt.processes import is_main_process

if TYPE_CHECKING:
    from graphopt.report import Report

# Where the options of the pass wait for the command, in the context of its call.
_GIVEN = "graphopt.recover"
_NOT = "--no-"
_OWN = "Where it is trained"
# What help texts call the value of an option, by its type; anything else is text.
_METAVARS: Mapping[Any, str] = {int: "N", int | None: "N", float: "X", float | None: "X"}


class WithPassOptions(TyperCommand):
    """A command that takes every option of the pass `recover` as one of its own: ``--epochs 5`` is ``epochs=5``.

    The pass is imported only when the command runs, or its help is asked for.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take out the options of the pass, and parse the rest."""
        every = [name for one in self.get_params(ctx) for name in (*one.opts, *one.secondary_opts)]
        own = [name for name in every if name.startswith("--")]
        rest, given = split_arguments(args, own)
        ctx.meta[_GIVEN] = given
        parsed: list[str] = super().parse_args(ctx, rest)
        return parsed

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the options, those of the pass by groups."""
        super().format_options(ctx, formatter)
        for title, rows in option_groups():
            with formatter.section(title):
                formatter.write_dl(rows)


def split_arguments(args: Sequence[str], own: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments of the command itself, and the options of the pass by name.

    Args:
        args: What was written behind the command.
        own: Options the command has itself, with their dashes.

    Raises:
        UsageError: An option neither of them has, one without its value, or one given twice.
    """
    kinds = _kinds()
    rest: list[str] = []
    given: dict[str, str] = {}
    waiting = list(args)
    while waiting:
        word = waiting.pop(0)
        option, equals, value = word.partition("=")
        if word == "--" or not word.startswith("--") or option in own:
            rest += [word, *(waiting if word == "--" else [])]
            waiting = [] if word == "--" else waiting
            continue
        name, negated = _name_of(option, kinds)
        if name is None:
            known = [*own, *(f"--{one.replace('_', '-')}" for one in kinds)]
            raise UsageError(f"no such option: {option}", hint=did_you_mean(option, known))
        if name in given:
            raise UsageError(f"option `{option}` is given twice", hint="keep one of them")
        if kinds[name] is bool and not equals:
            value = "false" if negated else "true"
        elif not equals:
            if not waiting:
                raise UsageError(f"option `{option}` requires an argument", hint="see `graphopt recover --help`")
            value = waiting.pop(0)
        given[name] = value
    return rest, given


def _name_of(option: str, kinds: Mapping[str, type]) -> tuple[str | None, bool]:
    """Return which option of the pass a word names, if any, and whether it is turned off by it."""
    name = option.removeprefix("--").replace("-", "_")
    if name in kinds:
        return name, False
    name = option.removeprefix(_NOT).replace("-", "_")
    return (name, True) if option.startswith(_NOT) and kinds.get(name) is bool else (None, False)


def _kinds() -> dict[str, type]:
    """Return every option of the pass, and the type of its default."""
    from graphopt import options

    return {name: type(field.default) for name, field in options.fields(_pass()).items()}


def _pass() -> type:
    from graphopt import registry
    from graphopt.recovering import PASS

    found: type = registry.find("PASSES", PASS)
    return found


def option_groups() -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the options of the pass as rows of a help text, by the classes that declare them."""
    from graphopt import options
    from graphopt.authoring import Pass

    cls = _pass()
    hints = typing.get_type_hints(cls)
    texts = {name: (default, text) for name, default, text in options.describe(cls)}
    groups = []
    for owner in (*cls.__bases__, cls):
        declared = [name for name in vars(owner).get("__annotations__", {}) if name in texts]
        rows = []
        for name in declared:
            default, text = texts.pop(name)
            accepted = options.accepted(cls, name)
            word = f"--{name.replace('_', '-')} {accepted if '|' in accepted else _METAVARS.get(hints[name], 'TEXT')}"
            rows.append((word, f"{text}  [default: {default or 'none'}]"))
        if rows:
            groups.append((_OWN if issubclass(owner, Pass) else _title(owner), rows))
    return groups


def _title(owner: type) -> str:
    """Return what a group of options is for: the first line of the docstring of the class that declares them."""
    return (owner.__doc__ or owner.__name__).strip().splitlines()[0].split(":")[0].rstrip(".")


def recover(
    context: typer.Context,
    student: Annotated[
        Path, typer.Argument(help="ONNX model to train; never changed.", show_default=False, metavar="STUDENT")
    ],
    teacher: TeacherOption = None,
    data: DataOption = None,
    evaluation: EvaluationOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Output [default: STUDENT.recovered.onnx].", metavar="OUT")
    ] = None,
    labels: LabelsOption = None,
    metric: MetricOption = None,
    budget: BudgetOption = None,
    target: TargetOption = None,
    backend: BackendOption = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(help="Write the report here, as .html, .md or .json; may be repeated.", metavar="FILE"),
    ] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Write the model even if a check or the budget failed.")
    ] = False,
    verbose: VerboseOption = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Train a model until it does again what its teacher does, or what labels say, and write it.

    What earlier passes fixed stays fixed: zeros, shared weights, codes and their tables. Started by `torchrun -m
    graphopt recover …` or `accelerate launch -m graphopt recover …`, several processes train it together.
    """
    from graphopt.recovering import recover as run

    out = output if output is not None else student.with_name(f"{student.stem}.recovered.onnx")
    quiet = quiet or not is_main_process()
    try:
        result = run(
            student,
            teacher,
            data=data,
            options=context.meta[_GIVEN],
            output=out,
            evaluation=evaluation,
            labels=labels,
            metric=metric,
            budget=budget or (),
            target=target,
            backend=backend,
            seed=seed,
            threads=threads,
            keep_failed=keep_failed,
            report=report,
            progress=not quiet,
        )
    except VerificationError as error:
        if error.report is not None and not quiet:
            _show(error.report, error.output, report, verbose)
        raise
    if not quiet:
        _show(result.report, result.output, report, verbose)
    say_warnings(result.report)


def say_warnings(report: Report) -> None:
    """Say on stderr, whatever is shown on stdout, why figures say less than they seem to."""
    for text in report.warnings if is_main_process() else ():
        typer.echo(f"warning: {text}", err=True)


def _show(report: Report, output: Path | None, files: Sequence[Path] | None, verbose: bool) -> None:
    from graphopt.commands import tables

    tables.print_report(report, verbose=verbose)
    said = [f"wrote {output}" if output is not None else "no model written", *(f"report: {one}" for one in files or ())]
    typer.echo("   ".join(said))
