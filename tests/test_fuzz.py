"""The fuzzer of `benchmarks/`: it notices a wrong rule, blames it, and shrinks the graph to what the rule needs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from .graph_generator import Recipe, build

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# Both a Transpose that does nothing for a wrong rule to see, and much that has nothing to do with it.
RECIPE = Recipe(21, 8, (("conv_bn", 3), ("odd_attributes", 0), ("matmul", 4), ("if_dynamic", 5), ("gelu", 6)), True)
LARGEST_SHRUNK = 4


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return importlib.import_module("fuzz")


@pytest.fixture
def wrong_rule(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("graphopt.passes.exact.no_op_layouts.NoOpTranspose.applies", lambda *_: True)
    return "identities/no-op-transpose"


def test_a_sound_pass_is_compared_on_usual_and_on_empty_inputs(fuzz: ModuleType) -> None:
    verdict = fuzz.check(fuzz.Original(build(RECIPE)), "identities,dead-code,fold-constants")
    assert not verdict.kind
    assert verdict.edits
    assert verdict.compared > 1


def test_a_wrong_rule_is_found_blamed_and_shrunk(fuzz: ModuleType, wrong_rule: str, tmp_path: Path) -> None:
    original = fuzz.Original(build(RECIPE))
    found = fuzz.blamed(original, "identities", fuzz.check(original, "identities"))
    assert found.kind in ("outputs", "structure", "refused")
    assert found.rule == wrong_rule
    small = fuzz.shrink(RECIPE, "identities", found)
    assert len(small.graph.node) <= LARGEST_SHRUNK < len(original.proto.graph.node)
    assert fuzz.check(fuzz.Original(small), "identities").kind == found.kind
    path = fuzz.write_finding(tmp_path, 0, "identities", found, small)
    about, header, *_ = path.read_text("utf-8").splitlines()
    assert wrong_rule in about
    assert header == "fires: no-op-transpose"
    onnx.checker.check_model(onnx.load(path.with_suffix(".onnx")))
    assert wrong_rule in (tmp_path / "SUMMARY.md").read_text("utf-8")


def test_dead_code_goes_when_a_graph_is_cut(fuzz: ModuleType) -> None:
    shrink: Any = importlib.import_module("shrink")
    proto = build(RECIPE)
    for candidate in shrink.cuts(proto):
        assert len(candidate.graph.node) < len(proto.graph.node) or len(candidate.graph.output) < len(
            proto.graph.output
        )
        assert json.loads({e.key: e.value for e in candidate.metadata_props}["overridable_inputs"]) == []
    plain = shrink.with_plain_names(proto)
    assert onnx.parser.parse_model(onnx.printer.to_text(plain)).graph.node
