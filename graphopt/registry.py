"""What is installed: passes, presets, backends, targets, metrics, inspections, by entry point and imported on use."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import MappingProxyType, ModuleType
from typing import Any

from graphopt import options
from graphopt.errors import UsageError, did_you_mean, in_words

GROUP = "graphopt.plugins"
# A plug-in is a module with any of these tables. `INSPECTIONS` names what the options of `graphopt inspect` show.
TABLES = ("PASSES", "PRESETS", "BACKENDS", "TARGETS", "METRICS", "INSPECTIONS")


@dataclass(frozen=True)
class Preset:
    """A named list of passes that run as one step.

    Attributes:
        passes: Pipeline text.
        help: One line for people.
    """

    passes: str
    help: str


@dataclass(frozen=True)
class _Plugin:
    """A plug-in: its entry point, the package that brings it, and its module."""

    value: str
    package: str
    module: ModuleType

    @property
    def label(self) -> str:
        """How errors call it."""
        return f"`{self.value}` of package `{self.package}`"

    def table(self, kind: str) -> Mapping[str, Any]:
        """Return one of its tables; empty where it has none."""
        found = getattr(self.module, kind, {})
        if not isinstance(found, Mapping):
            raise UsageError(
                f"plug-in {self.label}: `{kind}` is no table of names", hint=f"repair or uninstall `{self.package}`"
            )
        return found


@functools.cache
def _plugins() -> tuple[_Plugin, ...]:
    found = sorted(entry_points(group=GROUP), key=lambda point: (point.value.split(".")[0] != "graphopt", point.name))
    plugins = []
    for point in found:
        package = point.dist.name if point.dist is not None else point.value
        try:
            plugins.append(_Plugin(point.value, package, point.load()))
        except Exception as error:
            raise UsageError(
                f"plug-in `{point.value}` of package `{package}` fails to load: {in_words(error)}",
                hint=f"repair or uninstall `{package}`",
            ) from error
    return tuple(plugins)


@functools.cache
def table(kind: str) -> Mapping[str, Any]:
    """Return everything of one kind, by name.

    Args:
        kind: One of `TABLES`.

    Raises:
        UsageError: Two plug-ins claim the same name, or one fails to load.
    """
    # A pipeline names passes and presets alike, so that no name may stand for one of each.
    kinds = ("PASSES", "PRESETS") if kind in ("PASSES", "PRESETS") else (kind,)
    merged: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for plugin in _plugins():
        for one in kinds:
            for name, entry in plugin.table(one).items():
                if name in owner:
                    raise UsageError(
                        f"`{name}` is claimed by plug-in {owner[name]} and by {plugin.label}",
                        hint="rename one of them, or uninstall its package",
                    )
                owner[name] = plugin.label
                if one == kind:
                    merged[name] = entry
    return MappingProxyType(merged)


def resolve(reference: str) -> Any:
    """Import what ``module:attribute`` names."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def find(kind: str, name: str) -> Any:
    """Return one entry, imported.

    Raises:
        UsageError: No such entry, with a hint at the closest; or it cannot be imported.
    """
    entries = table(kind)
    noun = kind.lower().removesuffix("s") if kind != "PASSES" else "pass"
    if name not in entries:
        known = [*entries, *table("PRESETS")] if kind == "PASSES" else list(entries)
        raise UsageError(f"unknown {noun} `{name}`", hint=did_you_mean(name, known))
    entry = entries[name]
    if not isinstance(entry, str):
        return entry
    try:
        return resolve(entry)
    except Exception as error:
        raise UsageError(
            f"{noun} `{name}` cannot be imported from `{entry}`: {in_words(error)}",
            hint="repair or uninstall the package that brings it",
        ) from error


def backend(text: str, **overrides: Any) -> Any:
    """Return a backend from ``name:option=value:...``.

    Raises:
        UsageError: Unknown backend or option.
    """
    name, *rest = options.split(text, ":") or [""]
    where = f"backend `{name}`"
    cls = find("BACKENDS", name)
    return options.build(cls, {**overrides, **options.from_text(":".join(rest), where=where)}, where=where)


def host_target() -> str:
    """Return the name of the target that is this machine's CPU, as the first plug-in that can tell says."""
    for plugin in _plugins():
        if hasattr(plugin.module, "HOST_TARGET"):
            return str(resolve(plugin.module.HOST_TARGET)())
    raise UsageError("no plug-in knows this machine", hint="name a target with `--target`")


def host_reason() -> str:
    """Return in a few words why that target is this machine's, or nothing where the plug-in does not say."""
    for plugin in _plugins():
        if hasattr(plugin.module, "HOST_TARGET"):
            why = getattr(plugin.module, "HOST_REASON", None)
            return str(resolve(why)()) if why is not None else ""
    return ""
