"""What each exact pass makes of small graphs, as ONNX text: cases where a rule fires, and where it must not.

A case is a file `golden/<pass>/<case>.txt`: one sentence, the rules that fire or hold back, the model before, the model
after, and what the pass said. `pytest tests/test_golden.py --graphopt-update` writes the last two anew; the rest is
written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from graphopt import provenance, registry, walk
from graphopt.authoring import Guarantee, RewritePass
from graphopt.choices import find_target
from graphopt.comparison import Comparison
from graphopt.generated import generated_feeds
from graphopt.regression.golden_files import Golden

from .pass_runs import TARGET, PassRun, loaded, outputs_of, run_passes

GOLDEN = Path(__file__).parent / "golden"
SECTION = re.compile(r"^=== (before|after|remarks)\n", re.MULTILINE)
HEADERS = {"fires", "holds back", "options", "not run"}


@dataclass(frozen=True)
class Case:
    """A golden file.

    Attributes:
        path: The file.
        about: Its first line, and the headers as written.
        fires: Rules that must fire, and no others.
        holds_back: Rules whose case it is that they do not fire.
        options: Options of the pass, as text.
        not_run: Why the two models are not run, or None.
        before: Model text.
    """

    path: Path
    about: str
    fires: frozenset[str]
    holds_back: frozenset[str]
    options: str
    not_run: str | None
    before: str

    @property
    def spec(self) -> str:
        name = self.path.parent.name
        return f"{name}:{self.options}" if self.options else name


def read_case(path: Path) -> Case:
    about, *rest = SECTION.split(path.read_text(encoding="utf-8"))
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    first, *lines = about.strip().splitlines()
    headers = dict(line.split(": ", 1) for line in lines)
    assert first.startswith("# "), f"{path}: the first line says what the case is about"
    assert headers.keys() <= HEADERS, f"{path}: {headers.keys() - HEADERS}"
    return Case(
        path=path,
        about=about,
        fires=frozenset(filter(None, headers.get("fires", "").split(", "))),
        holds_back=frozenset(filter(None, headers.get("holds back", "").split(", "))),
        options=headers.get("options", ""),
        not_run=headers.get("not run"),
        before=sections["before"],
    )


CASES = [read_case(path) for path in sorted(GOLDEN.glob("*/*.txt"))]


def text_of(model: ir.Model) -> str:
    """Return a model as ONNX text that parses to the same model."""
    proto = ir.to_proto(model)
    for graph in _graphs(proto.graph):
        # onnx_ir writes the type of an initializer again, which the text says already.
        initialized = {tensor.name for tensor in graph.initializer}
        kept = [info for info in graph.value_info if info.name not in initialized]
        del graph.value_info[:]
        graph.value_info.extend(kept)
    text = str(onnx.printer.to_text(proto)).strip() + "\n"
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path.parent.name}/{case.path.stem}")
def test_pass_makes_of_a_graph_what_the_golden_file_says(case: Case, golden: Golden) -> None:
    before = onnx.parser.parse_model(case.before)
    onnx.checker.check_model(before)
    run = run_passes(loaded(before), case.spec)
    after, remarks = text_of(run.model), "".join(f"{text}\n" for text in run.remarks)
    sections = f"=== before\n{case.before.strip()}\n\n=== after\n{after}"
    golden(f"{case.about}{sections}" + (f"\n=== remarks\n{remarks}" if remarks else ""), file=case.path)
    assert {edit.rule for edit in run.edits} == case.fires
    if not case.fires:
        assert after == text_of(loaded(before))
    onnx.checker.check_model(onnx.parser.parse_model(after), full_check=case.not_run is None)
    assert_outputs_agree(case, before, run)


def assert_outputs_agree(case: Case, before: onnx.ModelProto, run: PassRun) -> None:
    if case.not_run is not None:
        return
    is_random = any(walk.is_random(node) for node in walk.every_node(run.model))
    comparison = Comparison()
    for feed in generated_feeds(run.model, seed=0):
        first, second = outputs_of(before, feed), outputs_of(run.model, feed)
        if is_random:
            assert first.keys() == second.keys()
        else:
            comparison.update(first, second)
    exact = registry.find("PASSES", case.path.parent.name).guarantee is Guarantee.EXACT
    assert comparison.equal if exact else comparison.within(), f"{comparison.worst}"


def test_new_constant_of_an_old_model_in_memory_is_a_node() -> None:
    """Loading brings old models into a newer form; one never in a file has no pure initializers."""
    [case] = [case for case in CASES if case.path.stem == "ir_version_3"]
    model = ir.from_proto(onnx.parser.parse_model(case.before))
    provenance.stamp(model)
    assert run_passes(model, "fold-constants").edits
    assert not model.graph.initializers
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def rules_of(name: str) -> set[str]:
    cls = registry.find("PASSES", name)
    if issubclass(cls, RewritePass):
        return {rule.name for rule in cls().rules(find_target(TARGET))}
    return set(cls.edits)


EXACT_PASSES = [
    name for name in sorted(registry.table("PASSES")) if registry.find("PASSES", name).guarantee is not Guarantee.LOSSY
]


@pytest.mark.parametrize("name", EXACT_PASSES)
def test_every_rule_has_a_case_where_it_fires_and_one_where_it_holds_back(name: str) -> None:
    cases = [case for case in CASES if case.path.parent.name == name]
    assert rules_of(name) == frozenset().union(*(case.fires for case in cases))
    assert rules_of(name) == frozenset().union(*(case.holds_back for case in cases))


def test_every_case_is_about_a_registered_pass() -> None:
    assert {case.path.parent.name for case in CASES} <= set(EXACT_PASSES)
    assert all(bool(case.fires) != bool(case.holds_back) for case in CASES)
