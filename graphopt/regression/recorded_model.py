"""A model beside a record of it: the assertions that emitted tests are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import registry
from graphopt.backend import Backend
from graphopt.choices import find_backend, find_target
from graphopt.errors import hints_in_tracebacks
from graphopt.explaining import explanation
from graphopt.machine import cpu_name
from graphopt.model_io import load, stored_bytes
from graphopt.regression import recorded_runs
from graphopt.regression.output_bounds import Bound
from graphopt.summary import describe_port
from graphopt.versions import all_versions


class RecordedModel:
    """A model file and what was recorded of it: what the tests that `graphopt optimize --emit-test` writes stand on.

    Args:
        model: The model.
        record: The inputs and outputs kept beside the test.
        target: Name of the target it was made for; this machine's CPU where None.
        backend: Backend text; the target's own where None.
        threads: Threads of the backend. One, so that sums are taken in the same order everywhere.

    Raises:
        DataError: There is no such file, or it is no record.
        ModelError: The model cannot be read.
    """

    def __init__(
        self,
        model: str | Path,
        record: str | Path,
        *,
        target: str | None = None,
        backend: str | None = None,
        threads: int = 1,
    ) -> None:
        self.path = Path(model)
        with hints_in_tracebacks():
            self.model = load(self.path)
            self.runs = recorded_runs.read(record)
        self._target, self._backend, self._threads = target, backend, threads

    def assert_signature(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Assert what the inputs and outputs are, in order, each as ``name: dtype [shape]``.

        Raises:
            AssertionError: They are others.
        """
        __tracebackhide__ = True
        found = signature_of(self.model)
        for kind, wanted, now in zip(("inputs", "outputs"), (inputs, outputs), found, strict=True):
            if list(wanted) != now:
                raise AssertionError(f"other {kind} of `{self.path.name}`:\n{_two_lists(wanted, now)}")

    def assert_outputs(self, side: str, bounds: Mapping[str, Bound], *, repeats_on: str | None = None) -> None:
        """Assert that on the recorded inputs the model gives what a side gave.

        Args:
            side: ``model``, for what this model gave, or ``original``.
            bounds: How far each output may be off.
            repeats_on: Runtime and processor on which runs repeat; there rounding alone is allowed, too.

        Raises:
            AssertionError: One is further off, is not there any more, or has no bound.
            BackendError: The runtime is missing, or refuses the model or the inputs.
        """
        __tracebackhide__ = True
        found = recorded_runs.errors(self.runs, side, self.outputs)
        faults = [f"  `{name}`: not among the recorded outputs" for name in bounds if name not in found]
        faults += [f"  `{name}`: no bound for it" for name in found if name not in bounds]
        faults += [
            f"  `{name}`: {fault}"
            for name, error in found.items()
            if name in bounds and (fault := bounds[name].fault(error)) is not None
        ]
        if not faults and repeats_on == self.place:
            faults += [
                f"  `{name}`: off by {error.max_abs:.3g} of {error.peak:.3g}, which is no rounding, and runs repeat"
                for name, error in found.items()
                if not error.within()
            ]
        if faults:
            what = "what it gave when recorded" if side == "model" else "what the original gave"
            raise AssertionError("\n".join([f"outputs of `{self.path.name}` are not {what}:", *faults]))

    @cached_property
    def outputs(self) -> list[dict[str, Any]]:
        """What the model gives on the recorded inputs, the runtime's own optimizations on."""
        with hints_in_tracebacks(), self._runtime().open(self.path, threads=self._threads) as session:
            return [session.run(run.feeds) for run in self.runs]

    @property
    def place(self) -> str:
        """The runtime and processor this runs on."""
        return place_of(self._runtime())

    def _runtime(self) -> Backend:
        return find_backend(self._backend, find_target(self._target))

    def assert_integer_operators(self, least: Mapping[str, int]) -> None:
        """Assert how many operators of each kind compute in integers or on integer weights, as `explain` finds it.

        Where the target's runtime is this machine's own, it is asked what it ran; elsewhere its rules are.

        Args:
            least: Operator to how many there must be at least.

        Raises:
            AssertionError: There are fewer; the message says what is in float, and why.
        """
        __tracebackhide__ = True
        feeds = [self.runs[0].feeds] if self.runs else None
        found = explanation.explain(self.path, target=self._target, data=feeds, threads=self._threads, runs=1)
        now = integer_operators(found)
        fewer = {op: count for op, count in least.items() if now.get(op, 0) < count}
        if fewer:
            lines = [f"  {op}: {now.get(op, 0)} in integers, {count} were" for op, count in fewer.items()]
            lines += [
                f"  `{one.node}` ({one.op}) is in float: {one.why}"
                for one in found.findings
                if one.op in fewer and not one.in_integers
            ]
            raise AssertionError("\n".join([f"fewer operators of `{self.path.name}` in integers:", *lines]))

    def assert_size(self, most: int) -> None:
        """Assert how large the model file and its data files are together, in bytes.

        Raises:
            AssertionError: They are larger.
        """
        __tracebackhide__ = True
        size = stored_bytes(self.path)
        if size > most:
            raise AssertionError(f"`{self.path.name}` takes {size:,} bytes; at most {most:,} are allowed")


def signature_of(model: ir.Model) -> tuple[list[str], list[str]]:
    """Return the inputs and the outputs of a model, each as ``name: dtype [shape]``."""

    def described(values: Iterable[ir.Value]) -> list[str]:
        return [f"{name}: {dtype} {shape}" for name, dtype, shape in map(describe_port, values)]

    return described(value for value in model.graph.inputs if not value.is_initializer()), described(
        model.graph.outputs
    )


def versions_of(backend: Backend) -> dict[str, str]:
    """Return the versions of a backend's runtime, by package."""
    words = backend.describe().replace(",", " ").split()
    return {name: text for name, text in all_versions().items() if any(name.startswith(word) for word in words)}


def place_of(backend: Backend) -> str:
    """Return the runtime with its version and the processor, for people and to tell places apart.

    Virtual machines say of many processors that they are the same; kernels are chosen by what these can do.
    """
    versions = [f"{name} {text}" for name, text in versions_of(backend).items()]
    processor = ", ".join(text for text in (cpu_name(), registry.host_reason()) if text)
    return f"{', '.join(versions) or backend.describe()} on {processor}"


def integer_operators(found: explanation.Explanation) -> dict[str, int]:
    """Return how many operators of each kind are in integers, most first."""
    return dict(Counter(one.op for one in found.findings if one.in_integers).most_common())


def _two_lists(wanted: Sequence[str], now: Sequence[str]) -> str:
    lines = [f"  - {text}" for text in wanted if text not in now] + [
        f"  + {text}" for text in now if text not in wanted
    ]
    return "\n".join(lines or ["  in another order"])
