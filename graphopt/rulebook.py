"""The rulebook: every rule and kind of edit of the installed passes, with the equation it rests on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt import registry
from graphopt.authoring import Pass, RewritePass
from graphopt.pipeline import Pipeline


@dataclass(frozen=True)
class Entry:
    """One rule, or one kind of edit, of a pass.

    Attributes:
        pass_name: The pass.
        rule: What journals and reports call it.
        equation: What it rests on.
        why: Why that holds, and when; empty where the equation says it all.
        targets: The only targets it works for, or None where it works for all.
    """

    pass_name: str
    rule: str
    equation: str
    why: str = ""
    targets: tuple[str, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        targets = None if self.targets is None else list(self.targets)
        return {
            "pass": self.pass_name,
            "rule": self.rule,
            "equation": self.equation,
            "why": self.why,
            "targets": targets,
        }


def rulebook(passes: str | None = None) -> list[Entry]:
    """Return every rule of the passes of a pipeline, or of all that are installed.

    Args:
        passes: Pipeline text, such as the name of a pass or preset.

    Raises:
        UsageError: There is no such pass.
    """
    if passes is None:
        chosen: Iterable[Pass] = (registry.find("PASSES", name)() for name in sorted(registry.table("PASSES")))
    else:
        chosen = (one for step in Pipeline.parse(passes).steps for one in step.passes)
    found = {one.name: list(entries_of(one)) for one in chosen}
    return [entry for entries in found.values() for entry in entries]


def entries_of(one: Pass) -> Iterator[Entry]:
    """Yield the rules of a pass in their order, or its kinds of edits."""
    if not isinstance(one, RewritePass):
        yield from (Entry(one.name, kind, equation) for kind, equation in one.edits.items())
        return
    names = sorted(registry.table("TARGETS"))
    rules: dict[str, tuple[str, str]] = {}
    used: dict[str, list[str]] = {}
    for name in names:
        for rule in one.rules(registry.find("TARGETS", name)):
            rules[rule.name] = _said(rule)
            used.setdefault(rule.name, []).append(name)
    for rule_name, (equation, why) in rules.items():
        targets = tuple(used[rule_name])
        yield Entry(one.name, rule_name, equation, why, targets if len(targets) < len(names) else None)


def _said(documented: Any) -> tuple[str, str]:
    """Return the first line of a docstring, and the rest of its first paragraph or the one below, as one line."""
    equation, _, rest = inspect.cleandoc(documented.__doc__ or "").partition("\n")
    return equation.strip(), " ".join(rest.strip().partition("\n\n")[0].split())


def as_markdown(passes: Sequence[type[Pass]], entries: Sequence[Entry]) -> str:
    """Return the rulebook as a document, a section a pass."""
    sections = [_INTRODUCTION]
    for cls in passes:
        said: dict[Entry, list[str]] = {}
        for entry in entries:
            if entry.pass_name == cls.name:
                said.setdefault(replace(entry, rule=""), []).append(entry.rule)
        rows = [_row(rules, entry) for entry, rules in said.items()]
        about = _said(cls)[0]
        table = ["| Rule | Equation | Why it holds |", "|---|---|---|", *rows] if rows else ["It states no rules."]
        sections.append("\n".join([f"## {cls.name}", "", f"{about} Guarantee: {cls.guarantee.value}.", "", *table]))
    return "\n\n".join(sections) + "\n"


_INTRODUCTION = """# Rules

Every rule of every pass that comes with graphopt, with the equation it rests on. `graphopt list rules` prints the same,
for installed passes of others too. `pytest tests/test_rules_doc.py --graphopt-update` makes this page of the passes."""


def _row(rules: Sequence[str], entry: Entry) -> str:
    only = "" if entry.targets is None else f"Only for {', '.join(f'`{name}`' for name in entry.targets)}."
    why = " ".join(filter(None, (entry.why, only)))
    return f"| {', '.join(rules)} | {_cell(entry.equation)} | {_cell(why)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*").replace("_", "\\_")
