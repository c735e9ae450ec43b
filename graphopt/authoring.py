"""What a pass author uses: Pass, RewritePass, Guarantee, Need, and the Context a pass runs in."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.analysis import Analysis, AnalysisCache
from graphopt.backend import Array, Backend
from graphopt.calibration_cache import CalibrationCache
from graphopt.content_keys import ContentKeys
from graphopt.data import Dataset
from graphopt.errors import BackendError
from graphopt.fragment import fragment
from graphopt.observation import Observations, Requests, observe
from graphopt.pattern import Rule
from graphopt.progress import Display
from graphopt.ranges import INT8_CODES, Range, RangeMethod, read_range
from graphopt.rewrite_check import Proposal, Refusal, RewriteCheck
from graphopt.rewriter import Journal, Rewriter, let_go
from graphopt.standing import Standing
from graphopt.target import Target
from graphopt.walkthrough import Walkthrough
from graphopt.worklist import apply_rules

T = TypeVar("T")

# Opens what says how models stand against an original, by their outputs on samples, of which memory may allow but some.
Judging = Callable[[ir.Model, Dataset], AbstractContextManager[Callable[[ir.Model], Standing]]]


class Guarantee(enum.Enum):
    """What a pass promises of the model's outputs; it decides how the pass is checked."""

    EXACT = "exact"  # the same bits
    EQUIVALENT = "equivalent"  # the same function, rounding aside
    LOSSY = "lossy"  # another function; measured


class Need(enum.Enum):
    """What a pass must have before it runs."""

    CALIBRATION = "calibration data"
    CALIBRATION_OPTIONAL = "calibration data, if there is any"
    BUDGET = "a budget"
    CANONICAL = "canonical form"


@dataclass(frozen=True)
class Note:
    """A remark of a pass for the report.

    Attributes:
        pass_name: The pass.
        text: What it did or left, and why.
        node: The node it is about, or None for the model.
        left: Whether it is about something left as it was; a later round of a preset knows better.
        facts: Figures for the JSON report.
    """

    pass_name: str
    text: str
    node: str | None = None
    left: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """What a pass would do to a model.

    Attributes:
        model: A copy of the model as it would be; weights are shared with the model.
        edits: How many edits that takes.
        notes: What would be said of it.
    """

    model: ir.Model
    edits: int
    notes: Sequence[Note]


@dataclass(frozen=True)
class Given:
    """What is known of a run before any work: for passes to refuse what they could not do.

    Attributes:
        model: The model as it was given; passes before this one may change it. It is only looked at.
        data: Calibration samples, or None.
        teacher: What the model is to be like: the teacher that was given; else the model itself, where a lossy pass
            comes before; None where there will be nothing to learn from.
    """

    model: ir.Model
    data: Dataset | None
    teacher: ir.Model | None


class Forecasting(Protocol):
    """What expects an error of each layer a pass changes."""

    def weight(self, node: ir.Node, values: Array) -> None:
        """Take note that a linear layer's weight becomes other values, [outputs, inputs]."""


@dataclass
class Context:
    """What a pass works with besides the model; it never opens a file, a session or a loop over data itself.

    Attributes:
        model: The model being changed.
        rewriter: The only way to change it.
        target: What the result will run on.
        backend: Runs fragments and calibration.
        seed: Seed of everything random.
        threads: Threads for the backend; 0 leaves it to the runtime.
        data: Calibration samples, or None.
        reference: The model as it was before the first lossy pass of the run, weights shared with it; None for that
            pass and those before it. A node that an exact pass changed since has no origins there: it may compute
            something else now than the node of its name does.
        teacher: The model that was given for the result to be like, or None. Its nodes may have names of this one's and
            compute something else.
        check_rewrite: Checks each rewrite by itself, or None; passes ask `agrees`.
        weigh: Says how a model stands against the original on calibration samples, by the budgets of the run; None
            where the run has none, which a pass that declares `Need.BUDGET` never meets.
        judge: Opens what says how models stand against a given one, by their outputs on given samples, without a
            budget; None where nothing does.
        predicts: Whether notes shall say which share of each layer's outputs is to be noise, as fact `predicted_error`.
        forecast: Where a pass that is to say so puts the weights it makes, or None.
        is_attempt: Whether the model is a copy that someone tries things on, and judges.
        guarantee: What the pass promises, which decides how its rewrites are compared.
        notes: Remarks so far.
        calibration: What has been observed of values, in this run or, where there is a folder, before.
        checked: How many rewrites were checked by themselves.
        unchecked: (Rule, reason) to number of rewrites that could not be.
        refused: Rewrites that were not applied because they are wrong.
        display: Where progress is shown, if it is.
    """

    model: ir.Model
    rewriter: Rewriter
    target: Target
    backend: Backend
    seed: int = 0
    threads: int = 0
    data: Dataset | None = None
    reference: ir.Model | None = None
    teacher: ir.Model | None = None
    check_rewrite: RewriteCheck | None = None
    weigh: Callable[[ir.Model], Standing] | None = None
    judge: Judging | None = None
    predicts: bool = False
    forecast: Forecasting | None = None
    is_attempt: bool = False
    guarantee: Guarantee = Guarantee.EQUIVALENT
    notes: list[Note] = field(default_factory=list)
    analyses: AnalysisCache = field(default_factory=AnalysisCache)
    calibration: CalibrationCache = field(default_factory=CalibrationCache)
    checked: int = 0
    unchecked: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: list[Refusal] = field(default_factory=list)
    display: Display | None = None

    @property
    def standard(self) -> ir.Model | None:
        """What the result is to be like: the teacher, or else the model before the first lossy pass."""
        return self.teacher if self.teacher is not None else self.reference

    def track(self, items: Collection[T], what: str, noun: str = "layers") -> Iterator[T]:
        """Yield items one by one, and let who waits see how many are done and how long the rest will take.

        Args:
            items: What a pass works through, each of which may take seconds.
            what: What is done to them, such as ``rounding``.
            noun: What they are.
        """
        return iter(items) if self.display is None else self.display.track(items, what, noun)

    def note(self, text: str, node: ir.Node | None = None, **facts: Any) -> None:
        """Say for the report what was done."""
        self._remark(text, node, facts, left=False)

    def left(self, text: str, node: ir.Node | None = None, **facts: Any) -> None:
        """Say for the report what was left as it was, and why."""
        self._remark(text, node, facts, left=True)

    def _remark(self, text: str, node: ir.Node | None, facts: Mapping[str, Any], *, left: bool) -> None:
        name = node.name if node is not None else None
        self.notes.append(Note(self.rewriter.pass_name, text, name, left, facts))

    def agrees(
        self,
        rule: str,
        nodes: Iterable[ir.Node],
        before: Iterable[ir.Value],
        after: Iterable[ir.Value],
        made: Iterable[ir.Node] = (),
    ) -> bool:
        """Return whether values equal those they are to replace, both sides run by themselves; ask before replacing.

        True at once where rewrites are not checked (`--verify rewrites`), and where they cannot be, which is noted.
        Where the answer is no, nodes made are let go of, the report says so, and the pass leaves the model as it is.

        Args:
            rule: The rule or kind of edit.
            nodes: Nodes that compute the values now.
            before: The values, outputs of these nodes.
            after: What is to take their places, in the same order: new values, or existing ones.
            made: Nodes that compute those, new ones or others; what neither computes is taken for given.

        Raises:
            VerificationError: They differ, and the run is strict.
        """
        if self.check_rewrite is None:
            return True
        proposal = Proposal(
            self.model,
            self.rewriter.pass_name,
            rule,
            tuple(nodes),
            tuple(before),
            tuple(after),
            tuple(made),
            exact=self.guarantee is Guarantee.EXACT,
        )
        verdict = self.check_rewrite(proposal)
        if verdict.refusal is not None:
            for node in reversed([node for node in proposal.made if node.graph is None]):
                let_go(node)
            if verdict.refusal not in self.refused:
                self.refused.append(verdict.refusal)
            return False
        if verdict.unchecked is None:
            self.checked += 1
        else:
            self.unchecked[rule, verdict.unchecked] += 1
        return True

    def attempt(self, run: Callable[[ir.Model, Context], None], *, predicts: bool = False) -> Attempt:
        """Return what a pass would do, done to a copy; the model and the report stay as they are.

        Args:
            run: The `run` of a pass, or a function like it.
            predicts: Whether its notes shall say what error is to be expected of each layer.

        Raises:
            PassError: The pass cannot do what was asked.
        """
        model = self.model.clone()
        rewriter = Rewriter(model, Journal(), self.rewriter.pass_name)
        fresh: dict[str, Any] = {"notes": [], "analyses": AnalysisCache(), "unchecked": Counter(), "refused": []}
        fresh.update(check_rewrite=None, predicts=predicts, forecast=None, is_attempt=True)
        context = replace(self, model=model, rewriter=rewriter, **fresh)
        run(model, context)
        return Attempt(model, rewriter.edits, context.notes)

    def analyse(self, analysis: Analysis[T]) -> T:
        """Return the result of an analysis of the model as it is now."""
        return self.analyses.get(analysis, self.model, self.rewriter.version)

    def statistics(self, requests: Requests) -> Observations:
        """Return statistics of values of the main graph over the calibration data, as the model is now.

        All are observed in one run over the data. What was asked for before costs nothing, as long as what computes
        the value has not been changed.

        Args:
            requests: Values, and a statistic or several of each: ``{value: MinMax(), other: (Moments(1), gram)}``.

        Raises:
            DataError: A value became NaN or infinite.
            PassError: A value is not of the main graph, or holds no numbers.
        """
        assert self.data is not None, "the pass did not declare that it needs calibration data"
        try:
            return observe(
                self.model,
                requests,
                self.data,
                self.backend,
                self.calibration,
                keys=self.analyse(ContentKeys),
                threads=self.threads,
                display=self.display,
            )
        finally:
            for remark in self.calibration.take_remarks():
                self.note(remark)

    def ranges(
        self, values: Iterable[ir.Value], method: RangeMethod, *, codes: int = INT8_CODES, symmetric: bool = False
    ) -> dict[str, Range]:
        """Return the range of each value over the calibration data, by value name.

        Only values of the main graph can be observed.

        Args:
            values: The values.
            method: How a range is read off what is observed.
            codes: Number of codes of the grid the ranges are for.
            symmetric: Whether that grid has as many codes below zero as above.
        """
        statistic = method.statistic()
        wanted = [value for value in values if value.name]
        observed = self.statistics(dict.fromkeys(wanted, statistic))
        return {
            value.name or "": read_range(observed[value, statistic], method, codes=codes, symmetric=symmetric)
            for value in wanted
        }

    def walkthrough(self, model: ir.Model | None = None) -> Walkthrough:
        """Return a walkthrough of the calibration samples, through the model as it is being changed, or another one.

        A pass that corrects each layer for the layers changed before it goes through a clone of the model beside it.
        """
        assert self.data is not None, "the pass did not declare that it needs calibration data"
        return Walkthrough(model or self.model, self.data, self.backend, threads=self.threads)

    def evaluate(self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> list[Array]:
        """Compute values that hang on constants alone, by the backend's own kernels, one by one as they stand.

        Args:
            nodes: The nodes that compute them, in order.
            outputs: The values wanted.

        Raises:
            BackendError: The runtime refuses or fails, or gives something else than a tensor of the known dtype.
        """
        model = fragment(nodes, outputs, [], walk.all_imports(self.model))
        with self.backend.open(model, optimize=False) as session:
            results = session.run({})
        return [_as_tensor(results[f"out{index}"], value) for index, value in enumerate(outputs)]


def _as_tensor(result: Any, value: ir.Value) -> Array:
    """Return what a runtime computed for a value, if it is what the value is declared to be."""
    if not isinstance(result, (np.ndarray, np.generic)):
        raise BackendError(f"`{value.name}` is no tensor")
    array = np.asarray(result)
    is_text = array.dtype.kind in "OSU"
    dtype = ir.DataType.STRING if is_text else ir.DataType.from_numpy(array.dtype)
    if value.dtype is not None and value.dtype != dtype:
        raise BackendError(f"the runtime gives {dtype} for `{value.name}`, which is {value.dtype}")
    return array


class Pass:
    """One transformation of a model: a frozen dataclass whose fields are its options.

    Attributes:
        name: What pipelines call it.
        guarantee: What it promises of the outputs.
        needs: What it must have before it runs; a property where that depends on the options.
        preserves: Analyses that stay valid although it edits.
        trains: Whether it learns from samples, so that figures of the same samples flatter what it leaves.
        keeps_canonical: Whether what it leaves is still in canonical form, if it was before.
        simplify_restores: Whether `simplify` brings what it leaves back into canonical form, where that is not kept.
        precedes: Names of passes that must come behind this one where a pipeline has both, each with why: what is the
            case behind that pass, in a few words. Nothing is assumed of the others.
        edits: Kinds of edits it makes, each with the equation it rests on; a `RewritePass` has rules instead.
    """

    # No ClassVar: a Rule, which RewritePass is too, may set its name per instance.
    name: str = ""
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    preserves: ClassVar[Sequence[Callable[[ir.Model], Any]]] = ()
    trains: ClassVar[bool] = False
    keeps_canonical: ClassVar[bool] = True
    simplify_restores: ClassVar[bool] = False
    precedes: ClassVar[Mapping[str, str]] = {}
    edits: ClassVar[Mapping[str, str]] = {}

    @property
    def needs(self) -> frozenset[Need]:
        """What the pass must have before it runs."""
        return frozenset()

    def check_ahead(self, given: Given) -> None:
        """Refuse, before any pass has run, what this one could not do; by default there is nothing to refuse.

        Raises:
            GraphoptError: What is asked cannot be done with what there is.
        """

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Change the model in place, through ``ctx.rewriter`` only.

        Raises:
            PassError: The pass cannot do what was asked on this model.
        """
        raise NotImplementedError


class RewritePass(Pass, Rule):
    """A pass that is one rule, or several: write ``pattern`` and ``rewrite``, or return rules from `rules`."""

    guarantee = Guarantee.EQUIVALENT

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return the rules to drive to a fixpoint; by default the pass itself is the one rule.

        Args:
            target: What the result will run on; a rule that pays on some runtimes only asks it.
        """
        return (self,)

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Apply the rules until none matches, and note what was held back and why."""
        check = ctx.agrees if ctx.check_rewrite is not None else None
        outcome = apply_rules(self.rules(ctx.target), model, ctx.rewriter, check=check)
        for (rule, reason), count in sorted(outcome.held_back.items()):
            ctx.left(f"{rule} held back {count}×: {reason}")
