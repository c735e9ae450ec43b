"""What a comparison by layers found: the error of every value that two models share, and what differs unrun."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from graphopt.comparison import SQNR_CEILING_DB, Comparison, OutputError

# How many layers `LayerComparison.worst` names where nothing else is asked for.
WORST_SHOWN = 10
# A value lies about where two judges of the original lie apart: its error is theirs, where it is at most so many times.
JUDGES_MARGIN = 2.0


@dataclass(frozen=True)
class Difference:
    """Something that two models differ in, or that is wrong with one, seen without running them.

    Attributes:
        kind: ``output`` (lost, new, or off where no operator computes it), ``input``, ``order`` (of inputs or
            outputs), ``dtype``, ``shape``, ``malformed``, ``random``, ``unsteady`` (one model's outputs differ from run
            to run), ``left`` (as it was, unlike all others like it) or ``judges`` (could not be asked).
        where: The node or value it is about.
        what: One sentence.
        is_fault: Whether a right pass would not have left it so.
        origin: Origin of the node, where there is one.
    """

    kind: str
    where: str
    what: str
    is_fault: bool = True
    origin: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class LayerError:
    """How far a value of one model is from its counterpart in another, over all samples.

    Attributes:
        origin: Id of the node of the first model that makes it.
        name: The value's name in the first model.
        other: Its counterpart's name in the second: the codes it is stored as, where these are quantized.
        op_type: Operator that makes it in the first model.
        other_op_type: Operator that makes the counterpart.
        depth: How many operators lie between it and an input at most; 0 where it reads inputs and constants only.
        error: All figures of it.
        inputs_sqnr_db: Lowest SQNR among the compared values it hangs on, 200 where it hangs on none.
        nodes: What lies between those and it in the first model, in order, the last of which makes it.
        other_nodes: The same in the second model.
        changes: What differs between the two, in words: an operator, an attribute, a constant, what is read.
        samples: How many samples it was compared on.
        suspect: Origin of the node that the changes point at; where there are none, its own.
        judges_error: Largest error at this value between two ways to run the *first* model; None where not asked.
        is_output: Whether it is an output of the model.
        on_the_way: Whether an output that differs hangs on it by way of values that differ, too. One that only hands an
            error on, small beside its own peak, counts as such.
        begins: Whether it is on the way, and nothing that it hangs on is: here a difference begins.
        tolerance: Largest absolute error that is no difference; rounding of the dtype where None.
    """

    origin: str
    name: str
    other: str
    op_type: str
    other_op_type: str
    depth: int
    error: OutputError
    inputs_sqnr_db: float
    nodes: tuple[str, ...]
    other_nodes: tuple[str, ...]
    changes: tuple[str, ...] = ()
    samples: int = 0
    suspect: str = ""
    judges_error: float | None = None
    is_output: bool = False
    on_the_way: bool = False
    begins: bool = False
    tolerance: float | None = None

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio in dB, at most 200; minus infinity where they cannot be compared."""
        return self.error.sqnr_db

    @property
    def max_abs_error(self) -> float:
        """Largest absolute error."""
        return self.error.max_abs

    @property
    def relative_error(self) -> float:
        """Largest absolute error as a share of the largest absolute value."""
        return self.error.max_rel

    @property
    def own_sqnr_db(self) -> float:
        """SQNR of the noise that comes in here, in dB: that of the value less that of the values it hangs on.

        An estimate, which takes noise to pass an operator as its signal does; 200 where no noise comes in.
        """
        if self.sqnr_db == float("-inf"):
            return SQNR_CEILING_DB if self.inputs_sqnr_db == float("-inf") else float("-inf")
        added = float(10 ** (-self.sqnr_db / 10) - 10 ** (-self.inputs_sqnr_db / 10))
        return min(SQNR_CEILING_DB, -10 * math.log10(added)) if added > 0 else SQNR_CEILING_DB

    @property
    def differs(self) -> bool:
        """Whether the error is more than rounding, or than the tolerance asked for."""
        return not self.error.within(self.tolerance)

    @property
    def judges_disagree(self) -> bool:
        """Whether the first model by itself differs so much here, run in two ways: then no pass is to blame."""
        if self.judges_error is None or not self.judges_error or not self.differs:
            return False
        return self.error.mismatch is None and self.max_abs_error <= JUDGES_MARGIN * self.judges_error

    @property
    def has_other_shape(self) -> bool:
        """Whether the two are of other shapes or dtypes, so that elements cannot be compared."""
        return self.error.mismatch is not None and " against " in self.error.mismatch

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            "origin": self.origin,
            "name": self.name,
            "other": self.other,
            "op_type": self.op_type,
            "other_op_type": self.other_op_type,
            "depth": self.depth,
            "sqnr_db": self.sqnr_db,
            "max_abs_error": self.max_abs_error,
            "relative_error": self.relative_error,
            "own_sqnr_db": self.own_sqnr_db,
            "differs": self.differs,
            "on_the_way": self.on_the_way,
            "begins": self.begins,
            "mismatch": self.error.mismatch,
            "judges_error": self.judges_error,
            "samples": self.samples,
            "is_output": self.is_output,
            "nodes": list(self.nodes),
            "other_nodes": list(self.other_nodes),
            "changes": list(self.changes),
            "suspect": self.suspect,
        }


class Depth(NamedTuple):
    """The layers of one depth: how many, their lowest SQNR and the one in the middle, in dB."""

    depth: int
    layers: int
    lowest_db: float
    median_db: float


@dataclass(frozen=True)
class Left:
    """Values that were not compared, counted.

    Attributes:
        values: Values of the first model that operators of its main graph compute from inputs.
        unmatched: How many of them have no counterpart.
        added: How many of the second model have none in the first.
        inside_kernels: How many would have kept the second model's runtime from its integer kernels.
        nested: How many lie inside nested graphs, or functions, of the first model.
        no_numbers: How many hold no numbers.
    """

    values: int = 0
    unmatched: int = 0
    added: int = 0
    inside_kernels: int = 0
    nested: int = 0
    no_numbers: int = 0

    def __str__(self) -> str:
        """Say the counts that are not 0; empty where all are."""
        counts = {
            f"{self.unmatched} of {self.values} without a counterpart": self.unmatched,
            f"{self.added} new in the second": self.added,
            f"{self.inside_kernels} inside integer kernels": self.inside_kernels,
            f"{self.nested} inside nested graphs or functions": self.nested,
            f"{self.no_numbers} without numbers": self.no_numbers,
        }
        return ", ".join(text for text, count in counts.items() if count)

    def as_dict(self) -> dict[str, int]:
        """Return the counts for JSON."""
        return dict(vars(self))


@dataclass
class LayerComparison:
    """Two models compared value by value.

    Attributes:
        layers: One entry a value that both have, in the order of the first model.
        outputs: The outputs of both, where they have the same.
        differences: What differs, or is wrong, without a run.
        left: What was not compared.
        samples: How many samples were run.
        source: Where they came from; None where they were made up.
        judges: The two ways in which the first model was run to see whether its judges agree; None where it was not.
        identical: Whether the models are the same, node by node and bit by bit.
        cannot_run: Why nothing was run, or None.
    """

    layers: list[LayerError] = field(default_factory=list)
    outputs: Comparison = field(default_factory=Comparison)
    differences: list[Difference] = field(default_factory=list)
    left: Left = field(default_factory=Left)
    samples: int = 0
    source: str | None = None
    judges: tuple[str, str] | None = None
    identical: bool = False
    cannot_run: str | None = None

    @property
    def first_diverging(self) -> LayerError | None:
        """The first value that differs on the way to an output that does; None where no output differs.

        Values that differ and are made up for further down, as where scales move from one layer to the next, are none;
        nor are those in which the judges of the first model disagree, if there are others.
        """
        begins = [one for one in self.layers if one.begins]
        return next((one for one in begins if not one.judges_disagree), begins[0] if begins else None)

    @property
    def made_up_for(self) -> list[LayerError]:
        """Values that differ, and on which no output that differs hangs by way of them."""
        return [one for one in self.layers if one.differs and not one.on_the_way]

    @property
    def judges_disagree(self) -> bool:
        """Whether no difference begins but where the first model by itself differs as much, run in two ways."""
        begins = [one for one in self.layers if one.begins]
        return bool(begins) and all(one.judges_disagree for one in begins)

    @property
    def faults(self) -> list[Difference]:
        """What a right pass would not have left."""
        return [one for one in self.differences if one.is_fault]

    @property
    def suspect(self) -> str | None:
        """Origin of the node that all of this points at, None where nothing does.

        What is wrong without a run comes first, then the first value that differs, then what was left as it was.
        """
        if self.judges_disagree:
            return None
        named = next((one.origin for one in self.faults if one.origin), None)
        if named is not None:
            return named
        if self.first_diverging is not None:
            return self.first_diverging.suspect
        return next((one.origin for one in self.differences if one.kind == "left"), None)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: no fault, and no output that differs, whoever is to blame."""
        return not self.faults and self.cannot_run is None and self.first_diverging is None

    def worst(self, n: int = WORST_SHOWN) -> list[LayerError]:
        """Return the ``n`` layers in which most noise comes in, whatever they read; see `LayerError.own_sqnr_db`.

        What is of another shape is not among them, as where channels were removed.
        """
        noisy = [one for one in self.layers if not one.error.equal and not one.has_other_shape]
        return sorted(noisy, key=lambda one: (one.own_sqnr_db, one.sqnr_db))[:n]

    def by_depth(self) -> list[Depth]:
        """Return SQNR by depth, from the inputs to the outputs.

        Left out is what could not be compared, and integers that are equal, as sizes are.
        """
        levels: dict[int, list[float]] = {}
        for one in self.layers:
            if one.error.mismatch is None and not (
                one.error.equal and one.error.dtype.startswith(("int", "uint", "bool"))
            ):
                levels.setdefault(one.depth, []).append(one.sqnr_db)
        return [Depth(depth, len(db), min(db), statistics.median(db)) for depth, db in sorted(levels.items())]

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        first = self.first_diverging
        return {
            "ok": self.ok,
            "identical": self.identical,
            "cannot_run": self.cannot_run,
            "samples": self.samples,
            "source": self.source,
            "judges": list(self.judges) if self.judges is not None else None,
            "judges_disagree": self.judges_disagree,
            "suspect": self.suspect,
            "first_diverging": first.as_dict() if first is not None else None,
            "differences": [one.as_dict() for one in self.differences],
            "left": self.left.as_dict(),
            "outputs": {name: error.as_dict() for name, error in self.outputs.outputs.items()},
            "layers": [one.as_dict() for one in self.layers],
        }
