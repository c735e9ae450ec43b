"""The rulebook: each rule says what it rests on, and `docs/rules.md` says what the rules do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt import passes, registry
from graphopt.authoring import Guarantee, RewritePass
from graphopt.regression.golden_files import Golden
from graphopt.rulebook import Entry, as_markdown, entries_of, rulebook

from .command_line import run

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "rules.md"
OURS = sorted(passes.PASSES)
EXACT = [name for name in OURS if registry.find("PASSES", name).guarantee is not Guarantee.LOSSY]


def entries(name: str) -> list[Entry]:
    return list(entries_of(registry.find("PASSES", name)()))


@pytest.mark.parametrize("name", EXACT)
def test_every_rule_states_an_equation(name: str) -> None:
    found = entries(name)
    assert found, "a pass that is proven states its rules"
    assert all(entry.rule and entry.equation for entry in found)
    if issubclass(registry.find("PASSES", name), RewritePass):
        assert [entry.rule for entry in found if "=" not in entry.equation] == []
        assert [entry.rule for entry in found if not entry.equation.endswith(".")] == []


@pytest.mark.parametrize("name", [name for name in OURS if issubclass(registry.find("PASSES", name), RewritePass)])
def test_one_name_is_one_rule(name: str) -> None:
    """A rule of several patterns is several rules of one name, which then say the same."""
    said: dict[str, set[str]] = {}
    for target in registry.table("TARGETS"):
        for rule in registry.find("PASSES", name)().rules(registry.find("TARGETS", target)):
            said.setdefault(rule.name, set()).add(rule.__doc__ or "")
    assert [rule for rule, texts in said.items() if len(texts) > 1] == []


def test_document_is_in_step(golden: Golden) -> None:
    """`pytest tests/test_rules_doc.py --graphopt-update` writes it anew."""
    classes = [registry.find("PASSES", name) for name in OURS]
    golden(as_markdown(classes, [entry for name in OURS for entry in entries(name)]), file=DOCUMENT)


def test_rules_are_listed_by_pass() -> None:
    outcome = run("list", "rules", "identities")
    assert outcome.code == 0, outcome.err
    header, *lines = outcome.out.splitlines()
    assert header.split() == ["pass", "rule", "equation"]
    assert [line.split()[1] for line in lines] == [entry.rule for entry in entries("identities")]
    assert "Identity(x) = x." in outcome.out


def test_why_is_said_on_request() -> None:
    [entry] = [entry for entry in rulebook("identities") if entry.rule == "neutral-add"]
    assert entry.why
    assert entry.why not in run("list", "rules", "identities").out
    assert entry.why in run("list", "rules", "identities", "-v").out


def test_rules_of_a_preset_or_pipeline() -> None:
    found = {entry.pass_name for entry in rulebook("simplify")}
    assert {"identities", "dead-code"} <= found
    assert {entry.pass_name for entry in rulebook("opset:to=20,dead-code")} == {"opset", "dead-code"}


def test_rules_as_json() -> None:
    listed = json.loads(run("list", "rules", "--json").out)
    assert listed == [entry.as_dict() for entry in rulebook()]
    assert {entry["pass"] for entry in listed} >= {*EXACT}
    for entry in listed:
        assert entry.keys() == {"pass", "rule", "equation", "why", "targets"}
        assert entry["targets"] is None or set(entry["targets"]) < set(registry.table("TARGETS"))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("rules", "identitis"), "unknown pass `identitis`"),
        (("passes", "identities"), "only rules are listed by pass"),
        (("--json",), "only rules are listed by pass"),
    ],
)
def test_wrong_words(words: tuple[str, ...], error: str) -> None:
    outcome = run("list", *words)
    assert outcome.code == 2
    assert error in outcome.error
