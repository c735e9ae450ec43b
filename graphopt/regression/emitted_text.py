"""The text of an emitted test: Python that people read and edit."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.regression.output_bounds import ORIGINAL_MARGIN, RUN_MARGIN, RUN_NUDGE, Bound, Noise, bound, lossy_bound

# By its first line a file is known to be ours to write anew.
MARK = "# Written by `graphopt optimize --emit-test`"
# A model made anew by another version may be a little larger: names and layouts change.
SIZE_MARGIN = 1.05
_COLUMNS = 88  # what formatters of Python keep to by default


@dataclass(frozen=True)
class About:
    """What a test is about.

    Attributes:
        model: The model's path from the folder of the test.
        record: Name of the file beside the test.
        original: What the original is called.
        inputs: What was run on, for people.
        target: Name of the target.
        backend: The backend, where the user named it.
        command: What makes model and test again, or None where no command does.
        versions: Package to version.
    """

    model: str
    record: str
    original: str
    inputs: str
    target: str
    backend: str | None
    command: str | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Facts:
    """What was measured.

    Attributes:
        inputs: Each input as ``name: dtype [shape]``.
        outputs: Each output.
        noise: Output to how far runs that should agree are apart.
        repeats_on: Runtime and processor on which the model gives the same bits again; None where rounding is all that
            is allowed anyway.
        loss: Output to how far it is off the original's, or None where these should agree, too.
        operators: Operator to how many are in integers.
        bytes: Of the model and its data files.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    noise: Mapping[str, Noise]
    repeats_on: str | None
    loss: Mapping[str, Noise] | None
    operators: Mapping[str, int]
    bytes: int


@dataclass(frozen=True)
class _Check:
    """One test: what is said above its figures, the figures, and the test."""

    comment: str
    figures: str
    name: str
    call: str


def as_python(about: About, facts: Facts) -> str:
    """Return the test file."""
    checks = _checks(facts)
    head = [MARK, *_comment(_origin(about))]
    if about.command is not None:
        head += ["#", "#     " + about.command.replace("\n", "\\n")]
    called = about.model.rpartition("/")[2].replace("\\", "\\\\").replace('"', '\\"')
    title = f'"""`{called}` does what it did when graphopt wrote it."""'
    settings = [f"RECORD = FOLDER / {_text(about.record)}", f"TARGET = {_text(about.target)}"]
    arguments = "MODEL, RECORD, target=TARGET"
    if about.backend is not None:
        settings.append(f"BACKEND = {_text(about.backend)}")
        arguments += ", backend=BACKEND"
    names = "Bound, RecordedModel" if facts.noise else "RecordedModel"
    imports = f"from pathlib import Path\n\nimport pytest\n\nfrom graphopt.testing import {names}"
    places = ["FOLDER = Path(__file__).resolve().parent", f"MODEL = FOLDER / {_text(about.model)}", *settings]
    figures = ["\n".join([*_comment(check.comment), check.figures]) for check in checks]
    fixture = f'@pytest.fixture(scope="module")\ndef model() -> RecordedModel:\n    return RecordedModel({arguments})'
    tests = [f"def test_{check.name}(model: RecordedModel) -> None:\n    {check.call}" for check in checks]
    top = "\n\n".join(["\n".join(head), title, imports, "\n".join(places), *figures])
    return "\n\n\n".join([top, fixture, *tests]) + "\n"


def _origin(about: About) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in about.versions.items())
    again = " The run that made the model writes the test anew:" if about.command is not None else ""
    return (
        f"of `{about.original}`, with {versions}, for target `{about.target}`. `{about.record}` beside it keeps "
        f"inputs ({about.inputs}) and what came out. Figures may be edited.{again}"
    )


def _checks(facts: Facts) -> list[_Check]:
    steady = {name: bound(noise) for name, noise in facts.noise.items()}
    checks = [_signature(facts)]
    if facts.noise and facts.loss is None:
        checks.append(_agreement(steady, facts, "original"))
    elif facts.noise and facts.loss is not None:
        checks.append(_agreement(steady, facts, "model"))
        checks.append(_quality({name: lossy_bound(one, steady[name]) for name, one in facts.loss.items()}, facts.loss))
    if facts.operators:
        checks.append(_operators(facts.operators))
    return [*checks, _size(facts.bytes)]


def _signature(facts: Facts) -> _Check:
    return _Check(
        comment="What callers rely on.",
        figures=f"{_list('INPUTS', facts.inputs)}\n{_list('OUTPUTS', facts.outputs)}",
        name="inputs_and_outputs",
        call="model.assert_signature(INPUTS, OUTPUTS)",
    )


def _agreement(bounds: Mapping[str, Bound], facts: Facts, side: str) -> _Check:
    what = "what the original gave" if side == "original" else "what the model gave"
    said = (
        f"How far outputs may be off {what}: rounding of their dtype, or {RUN_MARGIN:g} times what runs differed by "
        f"that should agree (the runtime's own optimizations on and off, weights off by {RUN_NUDGE:g} of themselves): "
        f"{_measured(facts.noise)}."
    )
    if Bound() in bounds.values():
        said += " What has no bound holds NaN or infinity, at places that vary."
    name = "OFF_THE_ORIGINAL" if side == "original" else "OFF_THE_RECORD"
    figures, more = _bounds(name, bounds), ""
    if side == "model" and facts.repeats_on is not None:
        said += " Where it was recorded, runs repeat to the bit: there rounding alone is allowed."
        figures, more = f"{figures}\nREPEATS_ON = {_text(facts.repeats_on)}", ", repeats_on=REPEATS_ON"
    return _Check(
        comment=said,
        figures=figures,
        name="outputs_are_the_originals" if side == "original" else "outputs_are_as_recorded",
        call=f'model.assert_outputs("{side}", {name}{more})',
    )


def _quality(bounds: Mapping[str, Bound], loss: Mapping[str, Noise]) -> _Check:
    return _Check(
        comment=f"How far they may be off what the original gave: {ORIGINAL_MARGIN:g} times what they were, "
        f"{_measured(loss)}, or that and what runs may differ by.",
        figures=_bounds("OFF_THE_ORIGINAL", bounds),
        name="outputs_are_near_the_originals",
        call='model.assert_outputs("original", OFF_THE_ORIGINAL)',
    )


def _operators(operators: Mapping[str, int]) -> _Check:
    pairs = [f"{_text(op)}: {count}" for op, count in operators.items()]
    return _Check(
        comment="Operators that compute in integers or on integer weights, at least, as `graphopt explain` finds them.",
        figures=_bracketed("IN_INTEGERS = {", pairs, "}"),
        name="operators_in_integers",
        call="model.assert_integer_operators(IN_INTEGERS)",
    )


def _size(size: int) -> _Check:
    return _Check(
        comment=f"Bytes of the model and its data files: {size:,} as written, and {SIZE_MARGIN - 1:.0%} more.",
        figures=f"MOST_BYTES = {int(size * SIZE_MARGIN):_}",
        name="size",
        call="model.assert_size(MOST_BYTES)",
    )


def _measured(noise: Mapping[str, Noise]) -> str:
    said = [one for one in noise.values() if math.isfinite(one.max_abs)]
    if not said:
        return "nothing that could be measured"
    each = " at most" if len(noise) > 1 else ""
    return f"{max(one.max_abs for one in said):.3g}{each}, {min(one.sqnr_db for one in said):.1f} dB"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, _COLUMNS, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _text(text: str) -> str:
    """Return a string as Python writes it, in double quotes: JSON and Python agree on these."""
    return json.dumps(text, ensure_ascii=False)


def _list(name: str, items: Sequence[str]) -> str:
    return _bracketed(f"{name} = [", [_text(item) for item in items], "]")


def _bounds(name: str, bounds: Mapping[str, Bound]) -> str:
    pairs = [f"{_text(output)}: {_call(one)}" for output, one in bounds.items()]
    return _bracketed(f"{name} = {{", pairs, "}")


def _call(one: Bound) -> str:
    fields = {"max_abs_error": one.max_abs_error, "sqnr_db": one.sqnr_db}
    return f"Bound({', '.join(f'{name}={value}' for name, value in fields.items() if value is not None)})"


def _bracketed(opening: str, items: Sequence[str], closing: str) -> str:
    line = f"{opening}{', '.join(items)}{closing}"
    if len(line) <= _COLUMNS:
        return line
    return "\n".join([opening, *(f"    {item}," for item in items), closing])
