"""Operators on strings, which are arrays of objects on the host.

Each function is one operator: inputs by position, attributes by ONNX's names; see `operators.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .operators import Operator, Table


def string_concat(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Strings joined in pairs, with broadcasting."""
    return np.asarray(np.add(first, second), dtype=object)


def string_split(
    texts: np.ndarray, *, delimiter: str | None = None, maxsplit: int | None = None
) -> tuple[np.ndarray, Tensor]:
    """Parts along a new last axis, filled up with empty strings, and the number of parts of each."""
    limit = -1 if maxsplit is None else maxsplit
    parts = [text.split(delimiter or None, limit) for text in texts.reshape(-1).tolist()]
    widest = max(map(len, parts), default=0)
    filled = _strings([part for line in parts for part in [*line, *[""] * (widest - len(line))]])
    counts = torch.tensor([len(line) for line in parts], dtype=torch.int64)
    return filled.reshape((*texts.shape, widest)), counts.reshape(texts.shape)


def string_normalizer(
    texts: np.ndarray,
    *,
    case_change_action: str = "NONE",
    is_case_sensitive: int = 0,
    locale: str | None = None,
    stopwords: Sequence[str] = (),
) -> np.ndarray:
    """Strings without those that are stop words, in upper or lower case; one empty string where none is left.

    Case is changed by Unicode's rules, whatever the locale.
    """
    same: Callable[[str], str] = str if is_case_sensitive else str.lower
    dropped = {same(word) for word in stopwords}
    cases: dict[str, Callable[[str], str]] = {"LOWER": str.lower, "UPPER": str.upper, "NONE": str}
    change = cases[case_change_action]
    kept = [change(text) for text in texts.reshape(-1).tolist() if same(text) not in dropped] or [""]
    return _strings(kept).reshape((1,) * (texts.ndim - 1) + (-1,))


def regex_full_match(texts: np.ndarray, *, pattern: str) -> Tensor:
    """Whether each string matches as a whole; Python's syntax, of which RE2's is nearly all a part."""
    matcher = re.compile(pattern)
    found = [matcher.fullmatch(text) is not None for text in texts.reshape(-1).tolist()]
    return torch.tensor(found, dtype=torch.bool).reshape(texts.shape)


def tf_idf_vectorizer(
    given: Any,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: Sequence[int],
    ngram_indexes: Sequence[int],
    pool_int64s: Sequence[int] = (),
    pool_strings: Sequence[str] = (),
    weights: Sequence[float] = (),
) -> Tensor:
    """How often each n-gram of a pool occurs in each row, its items up to so many places apart; weighted."""
    pool = list(pool_strings or pool_int64s)
    sizes = range(min_gram_length, max_gram_length + 1)
    places = dict(zip(_grams_of(pool, ngram_counts), ngram_indexes, strict=False))
    rows = given.tolist() if given.ndim == 2 else [given.reshape(-1).tolist()]
    found = torch.zeros(len(rows), max(ngram_indexes) + 1)
    for at, row in enumerate(rows):
        for gram in _grams_in(row, sizes, max_skip_count):
            if gram in places:
                found[at, places[gram]] += 1
    if mode == "IDF":
        found = (found > 0).float()
    if weights and mode != "TF":
        found = found * torch.tensor(list(weights))
    found = found.to(given.device) if isinstance(given, Tensor) else found
    return found if given.ndim == 2 else found[0]


def _grams_of(pool: Sequence[Any], counts: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Yield the n-grams of a pool, which holds all of one item first, then those of two, and so on."""
    for at, start in enumerate(counts):
        end = counts[at + 1] if at + 1 < len(counts) else len(pool)
        for first in range(start, end, at + 1):
            yield tuple(pool[first : first + at + 1])


def _grams_in(row: Sequence[Any], sizes: range, max_skip: int) -> Iterator[tuple[Any, ...]]:
    for size in sizes:
        for stride in range(1, max_skip + 2 if size > 1 else 2):  # a single item is met once, skips or not
            for start in range(len(row) - stride * (size - 1)):
                yield tuple(row[start : start + stride * (size - 1) + 1 : stride])


def _strings(texts: Sequence[str]) -> np.ndarray:
    found = np.empty(len(texts), dtype=object)
    found[:] = texts
    return found


OPERATORS: Table = {
    "RegexFullMatch": Operator(regex_full_match, since=20),
    "StringConcat": Operator(string_concat, since=20),
    "StringNormalizer": Operator(string_normalizer, since=10),
    "StringSplit": Operator(string_split, since=20),
    "TfIdfVectorizer": Operator(tf_idf_vectorizer, since=9),
}
