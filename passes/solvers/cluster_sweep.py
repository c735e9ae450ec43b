"""Codes of learned tables that make up for each other's errors: a sweep over the inputs, then one code at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

from .cluster_fit import Fit, zero_codes
from .gptq import upper_factor
from .objective import DAMPING

# Inputs after which errors so far are carried over to all others, by one matrix product.
_COLUMNS = 64
# Share of the mean of H's diagonal added to it where one code is chosen at a time: inputs always zero say nothing.
_FLOOR = 1e-6


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be come near to, filled up to whole vectors.

    Attributes:
        weight: W, float32 [groups, outputs of a group, inputs].
        moments: H, float32 [groups, inputs, inputs].
        free: Which weights are kept apart and may be anything, bool like W; None for none.
    """

    weight: Array
    moments: Array
    free: Array | None

    @property
    def groups(self) -> int:
        """Groups of outputs that read inputs of their own."""
        return len(self.moments)

    def times_moments(self, matrix: Array) -> Array:
        """Return a matrix [outputs, inputs], or in groups, times H, in the same shape."""
        return np.asarray((matrix.reshape(self.weight.shape) @ self.moments).reshape(matrix.shape))


class _Chooser:
    """Gives entries to one code of every output at a time.

    Args:
        fit: The tables and scales.
        groups: Groups of outputs.
    """

    def __init__(self, fit: Fit, groups: int) -> None:
        self._entries, self._vector = fit.tables.shape[1], fit.tables.shape[2]
        self._single = len(fit.tables) == 1
        self._flat = fit.tables.reshape(-1, self._vector)
        outputs = len(fit.codes)
        tables = np.arange(outputs) // fit.rows
        self._offsets = (tables * self._entries).reshape(groups, -1)
        self._borders = None
        if self._vector == 1:
            borders = (fit.tables[:, 1:, 0] + fit.tables[:, :-1, 0]) / 2
            self._borders = borders[0] if self._single else borders[tables].reshape(*self._offsets.shape, -1)

    def choose(self, wanted: Array, metric: Array) -> Array:
        """Return the codes of the entries nearest to vectors over their scales.

        Args:
            wanted: float32 [groups, outputs, vector].
            metric: [groups, vector, vector]; distances are those of vectors times it.
        """
        if self._borders is not None:
            numbers = wanted[:, :, 0]
            if self._single:
                return np.searchsorted(self._borders, numbers).astype(np.uint8)
            return np.asarray((numbers[:, :, None] > self._borders).sum(axis=2), np.uint8)
        turned = wanted @ metric
        if self._single:
            entries = self._flat @ metric
            products = turned @ entries.transpose(0, 2, 1)
            distances = np.square(entries).sum(axis=2)[:, None] - 2 * products
        else:
            own = self._flat.reshape(-1, self._entries, self._vector)[self._offsets // self._entries]
            entries = own @ metric[:, None]
            distances = np.square(entries).sum(axis=3) - 2 * np.einsum("gov,gokv->gok", turned, entries)
        return np.asarray(distances.argmin(axis=2), np.uint8)

    def values(self, codes: Array) -> Array:
        """Return the entries of codes [groups, outputs], as [groups, outputs, vector]."""
        return np.asarray(self._flat[codes if self._single else codes + self._offsets])


@dataclass(frozen=True, eq=False)
class _Columns:
    """What steps over codes need, inputs first: what a step touches lies together.

    Attributes:
        scales: [groups, inputs, outputs], or ones that broadcast.
        zeros: Which codes stay zero, [groups, codes, outputs], or None.
        zero_codes: The code of each output that says so, [groups, outputs].
        free: Which weights may be anything, [groups, inputs, outputs], or None.
    """

    scales: Array
    zeros: Array | None
    zero_codes: Array
    free: Array | None

    @classmethod
    def of(cls, problem: Problem, fit: Fit) -> _Columns:
        """Return those of a fit, in the order of inputs."""
        groups, outputs, inputs = problem.weight.shape
        scales = np.ones((1, 1, 1), np.float32)
        if fit.scales is not None:
            scales = fit.spread_scales(inputs).reshape(groups, outputs, inputs).transpose(0, 2, 1)
        zeros = None if fit.zeros is None else fit.zeros.reshape(groups, outputs, -1).transpose(0, 2, 1)
        free = None if problem.free is None else problem.free.reshape(problem.weight.shape).transpose(0, 2, 1)
        return cls(scales, zeros, zero_codes(fit).reshape(groups, outputs), free)

    def ordered(self, order: Array, expanded: Array) -> _Columns:
        """Return the same in another order of codes [groups, codes], and of inputs."""
        scales = self.scales if self.scales.shape[1] == 1 else _taken(self.scales, expanded)
        zeros = None if self.zeros is None else _taken(self.zeros, order)
        return _Columns(scales, zeros, self.zero_codes, None if self.free is None else _taken(self.free, expanded))

    def settle(self, chooser: _Chooser, wanted: Array, place: int, metric: Array) -> tuple[Array, Array]:
        """Return the codes and values [groups, outputs], [groups, vector, outputs] of one code of every output."""
        vector = wanted.shape[1]
        part = slice(place * vector, (place + 1) * vector)
        scales = self.scales if self.scales.shape[1] == 1 else self.scales[:, part]
        # All inputs of a code have one scale.
        codes = chooser.choose((wanted / scales).transpose(0, 2, 1), metric)
        if self.zeros is not None:
            codes = np.where(self.zeros[:, place], self.zero_codes, codes)
        values = chooser.values(codes).transpose(0, 2, 1) * scales
        if self.free is not None:
            values = np.where(self.free[:, part], wanted, values)
        return codes, values


def swept(problem: Problem, fit: Fit) -> tuple[Array, Array]:
    """Return codes [outputs, codes] given one after the other, and what they stand for, [outputs, inputs].

    GPTQ (Frantar et al., 2023) with tables in place of a grid, and vectors as van Baalen et al. have them (GPTVQ: The
    Blessing of Dimensionality for LLM Quantization, 2024): each code is the nearest one to what the errors before it
    leave to be made up for, measured by what is then still to be made up for itself. Inputs with the largest E[x²] come
    first. Weights kept apart take what is left as it is.

    Args:
        problem: What is to be come near to.
        fit: Tables and scales.
    """
    groups, outputs, inputs = problem.weight.shape
    vector = fit.tables.shape[2]
    power = np.diagonal(problem.moments, axis1=1, axis2=2).reshape(groups, -1, vector).sum(axis=2)
    order = np.argsort(-power, axis=1, kind="stable")
    expanded = (order[:, :, None] * vector + np.arange(vector)).reshape(groups, -1)
    factors = np.stack(
        [upper_factor(h[np.ix_(at, at)], DAMPING) for h, at in zip(problem.moments, expanded, strict=True)]
    )
    metrics = np.stack([factors[:, at : at + vector, at : at + vector] for at in range(0, inputs, vector)], axis=1)
    # How much of an earlier input's error each code makes up for.
    feedback = _over(factors, metrics)
    columns = _Columns.of(problem, fit).ordered(order, expanded)
    chooser = _Chooser(fit, groups)
    wanted = _taken(problem.weight.transpose(0, 2, 1), expanded)
    left, codes = wanted.copy(), np.empty((groups, inputs // vector, outputs), np.uint8)
    for start in range(0, inputs, _COLUMNS):
        end = min(start + _COLUMNS, inputs)
        errors = np.empty((groups, end - start, outputs), np.float32)
        for at in range(start, end, vector):
            own, before = slice(at, at + vector), at - start
            target = left[:, own] + feedback[:, start:at, own].transpose(0, 2, 1) @ errors[:, :before]
            codes[:, at // vector], values = columns.settle(chooser, target, at // vector, metrics[:, at // vector])
            np.subtract(wanted[:, own], values, out=errors[:, before : before + vector])
            wanted[:, own] = values
        if end < inputs:
            left[:, end:] += feedback[:, start:end, end:].transpose(0, 2, 1) @ errors
    back = np.argsort(order, axis=1), np.argsort(expanded, axis=1)
    found = _taken(codes, back[0]).transpose(0, 2, 1).reshape(groups * outputs, -1)
    return found, _taken(wanted, back[1]).transpose(0, 2, 1).reshape(groups * outputs, -1)


def descended(problem: Problem, fit: Fit, values: Array) -> tuple[Array, Array]:
    """Return codes, and what they stand for, after each code was moved once to the best there is while others stay.

    Coordinate descent on tr(Δ H Δᵀ), as in Behdin et al., QuantEase, 2023; with vectors, a block of coordinates.

    Args:
        problem: What is to be come near to.
        fit: Tables, scales and codes.
        values: What the codes stand for, [outputs, inputs], weights kept apart included.
    """
    groups, outputs, inputs = problem.weight.shape
    vector = fit.tables.shape[2]
    now = values.reshape(problem.weight.shape).transpose(0, 2, 1).copy()
    # What moving each weight would gain, up to what that itself costs.
    pull = (problem.times_moments(problem.weight - values.reshape(problem.weight.shape))).transpose(0, 2, 1).copy()
    own = np.stack([problem.moments[:, at : at + vector, at : at + vector] for at in range(0, inputs, vector)], axis=1)
    floor = _FLOOR * np.diagonal(problem.moments, axis1=1, axis2=2).mean(axis=1)[:, None, None, None]
    own = own + np.maximum(floor, np.finfo(np.float32).tiny) * np.eye(vector)
    metrics, inverses = np.linalg.cholesky(own).astype(np.float32), np.linalg.inv(own).astype(np.float32)
    columns, chooser = _Columns.of(problem, fit), _Chooser(fit, groups)
    codes = np.empty((groups, inputs // vector, outputs), np.uint8)
    for start in range(0, inputs, _COLUMNS):
        end = min(start + _COLUMNS, inputs)
        moved = np.zeros((groups, end - start, outputs), np.float32)
        for at in range(start, end, vector):
            part, before = slice(at, at + vector), at - start
            slope = pull[:, part] - problem.moments[:, part, start:at] @ moved[:, :before]
            target = now[:, part] + inverses[:, at // vector] @ slope
            codes[:, at // vector], new = columns.settle(chooser, target, at // vector, metrics[:, at // vector])
            np.subtract(new, now[:, part], out=moved[:, before : before + vector])
            now[:, part] = new
        pull -= problem.moments[:, :, start:end] @ moved
    flat = groups * outputs
    return codes.transpose(0, 2, 1).reshape(flat, -1), now.transpose(0, 2, 1).reshape(flat, -1)


def _taken(array: Array, order: Array) -> Array:
    """Return an array [groups, rows, …] with the rows of each group in an order of its own."""
    return np.take_along_axis(array, order[:, :, None], axis=1)


def _over(factors: Array, metrics: Array) -> Array:
    """Return the columns of each code times the inverse of its block on the diagonal."""
    groups, inputs, _ = factors.shape
    codes, vector = metrics.shape[1:3]
    blocks = factors.reshape(groups, inputs, codes, vector).transpose(0, 2, 1, 3)
    found = blocks @ np.linalg.inv(metrics)
    return np.ascontiguousarray(found.transpose(0, 2, 1, 3).reshape(groups, inputs, inputs))
