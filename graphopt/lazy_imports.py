"""Imports put off until first use: for what a dependency imports at once and most runs never touch."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType


def defer(*names: str) -> None:
    """Let the import of each of these modules take effect only when an attribute of it is read.

    This changes how the whole process imports, so it is for programs, not for libraries. A module that does not
    exist is as missing as before.
    """
    sys.meta_path.insert(0, _Deferring(frozenset(names)))


class _Deferring(importlib.abc.MetaPathFinder):
    """Finds modules where Python does, and wraps their loaders."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a deferred module; of any other, None."""
        if name not in self._names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec
