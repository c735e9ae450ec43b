"""The backends that are installed: what each can run on here, in which version, and why not the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graphopt import options, registry
from graphopt.backend import Backend, Diagnosable, Trouble
from graphopt.errors import in_words


@dataclass(frozen=True)
class Place:
    """Something a backend may run on.

    Attributes:
        text: What tables call it.
        option: What `--backend` calls it.
        why: Why it cannot run here, or nothing.
        hint: What to do about that, or nothing.
    """

    text: str
    option: str
    why: str = ""
    hint: str = ""

    @property
    def runs(self) -> bool:
        """Whether it can run here."""
        return not self.why


@dataclass(frozen=True)
class Surveyed:
    """A backend as this machine has it.

    Attributes:
        name: Its name.
        help: What it is.
        version: Package and version, or None where it is not installed or does not say.
        places: What it may run on.
        troubles: What is wrong with its installation.
    """

    name: str
    help: str
    version: str | None
    places: tuple[Place, ...]
    troubles: tuple[Trouble, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        places = [asdict(place) | {"runs": place.runs} for place in self.places]
        return {**asdict(self), "places": places}


def survey_backends() -> list[Surveyed]:
    """Return every backend; one that fails while it is asked is none that runs, and says why."""
    return [_surveyed(name) for name in sorted(registry.table("BACKENDS"))]


def backends_here(wanted: Callable[[Backend], bool] = lambda backend: True) -> list[Backend]:
    """Return every backend that can run here, once for each thing it can run on; one that fails when asked is none.

    Args:
        wanted: Tells which are of interest: no other is asked whether it can run, which may take long to find out.
    """
    found: list[Backend] = []
    for name in sorted(registry.table("BACKENDS")):
        with contextlib.suppress(Exception):  # `doctor` and `list backends` say what is wrong with it
            backend = registry.backend(name)
            if wanted(backend):
                found += [one for one in _variants(backend) if one.missing() is None]
    return found


def option_of(backend: Backend) -> str:
    """Return what `--backend` takes for a backend."""
    text = options.to_text(backend)
    return f"{backend.name}:{text}" if text else backend.name


def _surveyed(name: str) -> Surveyed:
    help = ""
    try:
        backend = registry.backend(name)
        help = backend.help
        places = tuple(_place(one) for one in _variants(backend))
        troubles: Sequence[Trouble] = backend.troubles() if isinstance(backend, Diagnosable) else ()
        version = backend.version() if isinstance(backend, Diagnosable) else None
    except Exception as error:  # whatever a stranger's backend does, the others are still shown
        places, troubles, version = (Place(name, name, in_words(error), "repair its package"),), (), None
    return Surveyed(name, help, version, places, tuple(troubles))


def _variants(backend: Backend) -> Sequence[Backend]:
    return backend.variants() if isinstance(backend, Diagnosable) else [backend]


def _place(backend: Backend) -> Place:
    why = backend.missing()
    if why is None:
        return Place(backend.describe(), option_of(backend))
    name = backend.describe()
    return Place(
        name, option_of(backend), why.message.removeprefix(f"backend `{name}` cannot run here: "), why.hint or ""
    )
