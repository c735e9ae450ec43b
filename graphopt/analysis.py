"""Analyses: pure functions of a model, computed once and dropped when the model changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import onnx_ir as ir

T = TypeVar("T")
Analysis = Callable[[ir.Model], T]


class AnalysisCache:
    """Results of analyses of one model, each valid for one version of it."""

    def __init__(self) -> None:
        self._results: dict[Analysis[Any], tuple[int, Any]] = {}

    def get(self, analysis: Analysis[T], model: ir.Model, version: int) -> T:
        """Return the result of an analysis, computed anew only if the model changed since."""
        cached = self._results.get(analysis)
        if cached is not None and cached[0] == version:
            result: T = cached[1]
            return result
        result = analysis(model)
        self._results[analysis] = (version, result)
        return result

    def keep(self, preserved: Iterable[Analysis[Any]], since: int, version: int) -> None:
        """Carry results that were valid at version ``since`` over to ``version``; a pass vouches for them."""
        for analysis in preserved:
            cached = self._results.get(analysis)
            if cached is not None and cached[0] >= since:
                self._results[analysis] = (version, cached[1])
