"""Errors a user can act on: what went wrong, where, and a hint what to do."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

EXIT_CHECK_FAILED = 1
LONGEST_CAUSE = 300  # characters of another library's error that are shown
# How many known names a hint lists: all passes and options, not all values of a model.
_NAMES_SHOWN = 80
# What stands where a text was cut.
_CUT = " …"
EXIT_USAGE = 2
EXIT_FAULT = 3


class GraphoptError(Exception):
    """A mistake or a failed check that graphopt explains in one line instead of a traceback.

    Args:
        message: One line: what is wrong and where.
        hint: One line: what to do about it.
    """

    exit_code = EXIT_USAGE
    usual_hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.usual_hint


class FailedElsewhere(GraphoptError):
    """A run that failed in another process, which has told why.

    Args:
        exit_code: The exit code of that process.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("the main process failed", hint="see what it says")
        self.exit_code = exit_code


class UsageError(GraphoptError):
    """A wrong option, pass name, pipeline text or argument."""


class ModelError(GraphoptError):
    """A model file that cannot be read, understood in full, or written."""


class DataError(GraphoptError):
    """Calibration or evaluation data that does not fit the model."""


class BackendError(GraphoptError):
    """A runtime that is missing, or that refuses the model."""

    usual_hint = "another `--backend` may do; see `graphopt list backends`"


class PassError(GraphoptError):
    """A pass that cannot do what it was asked on this model."""


class PassCrash(PassError):
    """A pass that failed by a mistake of its own."""

    exit_code = EXIT_FAULT


class VerificationError(GraphoptError):
    """A model that failed a structural or numeric check, or its budget.

    Attributes:
        report: What the run had done and measured until then, or None.
        output: The file written all the same because that was asked for, or None.
    """

    exit_code = EXIT_CHECK_FAILED
    usual_hint = "this is a mistake of a pass, not yours; `--verify each` finds it"
    report: Any = None
    output: Any = None


class OverBudget(VerificationError):
    """A model that lost more than its budget allows: nobody's mistake."""


@contextlib.contextmanager
def hints_in_tracebacks() -> Iterator[None]:
    """Let errors that pass through show their hint where a traceback is shown, as under pytest."""
    try:
        yield
    except GraphoptError as error:
        if error.hint:
            error.add_note(f"hint: {error.hint}")
        raise


def one_line(error: BaseException) -> str:
    """Return what another library's error says on one line, cut where it goes on and on: some print a whole graph."""
    text = " ".join(str(error).split())
    if len(text) <= LONGEST_CAUSE:
        return text
    head = text[: LONGEST_CAUSE - len(_CUT)]
    return (head.rpartition(" ")[0] or head) + _CUT


def in_words(error: BaseException) -> str:
    """Return an error's type and what it says, on one line."""
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint naming the closest known word, or when none is close all of them, as far as one can read that."""
    names = sorted(known)
    begun = [name for name in names if word and name.startswith(f"{word}-")]
    if len(begun) > 1:
        return f"one of: {', '.join(begun)}"
    close = begun or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean `{close[0]}`?"
    if not names:
        return "none are known"
    more = f", and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return f"known: {', '.join(names[:_NAMES_SHOWN])}{more}"
