"""What is installed: passes, presets, backends, targets and metrics, found by entry point and imported on use."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import MappingProxyType, ModuleType
from typing import Any

from graphopt import options
from graphopt.errors import UsageError, did_you_mean

GROUP = "graphopt.plugins"
# A plug-in is a module with any of these tables.
TABLES = ("PASSES", "PRESETS", "BACKENDS", "TARGETS", "METRICS")


@dataclass(frozen=True)
class Preset:
    """A named list of passes that run as one step.

    Attributes:
        passes: Pipeline text.
        help: One line for people.
    """

    passes: str
    help: str


@functools.cache
def _plugins() -> tuple[tuple[str, ModuleType], ...]:
    found = sorted(entry_points(group=GROUP), key=lambda point: (point.value.split(".")[0] != "graphopt", point.name))
    modules = []
    for point in found:
        try:
            modules.append((point.value, point.load()))
        except Exception as error:
            raise UsageError(
                f"plug-in `{point.value}` fails to load: {type(error).__name__}: {error}",
                hint="repair or uninstall the package that brings it",
            ) from error
    return tuple(modules)


@functools.cache
def table(kind: str) -> Mapping[str, Any]:
    """Return everything of one kind, by name.

    Args:
        kind: One of `TABLES`.

    Raises:
        UsageError: Two plug-ins claim the same name, or one fails to load.
    """
    merged: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for plugin, module in _plugins():
        for name, entry in getattr(module, kind, {}).items():
            if name in merged:
                raise UsageError(
                    f"`{name}` is claimed by plug-in `{owner[name]}` and by `{plugin}`", hint="uninstall one of them"
                )
            merged[name], owner[name] = entry, plugin
    return MappingProxyType(merged)


def resolve(reference: str) -> Any:
    """Import what ``module:attribute`` names."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def find(kind: str, name: str) -> Any:
    """Return one entry, imported.

    Raises:
        UsageError: No such entry; hints at the closest.
    """
    entries = table(kind)
    if name not in entries:
        noun = kind.lower().removesuffix("s") if kind != "PASSES" else "pass"
        known = [*entries, *table("PRESETS")] if kind == "PASSES" else list(entries)
        raise UsageError(f"unknown {noun} `{name}`", hint=did_you_mean(name, known))
    entry = entries[name]
    return resolve(entry) if isinstance(entry, str) else entry


def backend(text: str, **overrides: Any) -> Any:
    """Return a backend from ``name:option=value:...``.

    Raises:
        UsageError: Unknown backend or option.
    """
    name, *rest = options.split(text, ":")
    where = f"backend `{name}`"
    cls = find("BACKENDS", name)
    return options.build(cls, {**overrides, **options.from_text(":".join(rest), where=where)}, where=where)


def host_target() -> str:
    """Return the name of the target that is this machine's CPU, as the first plug-in that can tell says."""
    for _, module in _plugins():
        if hasattr(module, "HOST_TARGET"):
            return str(resolve(module.HOST_TARGET)())
    raise UsageError("no plug-in knows this machine", hint="name a target with `--target`")
