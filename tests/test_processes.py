"""How several processes end alike: what the main one says is heard once, and nobody waits for one that is gone."""

from __future__ import annotations

import pytest

from graphopt import processes
from graphopt.errors import EXIT_FAULT, BackendError, FailedElsewhere, UsageError
from graphopt.processes import Company

GONE = -1


class Line:
    """What all processes hear, in their turn: the main one's exit codes; `GONE` once the other one is."""

    def __init__(self, heard: list[int]) -> None:
        self.heard, self.said = heard, list[int]()

    def __call__(self, code: int) -> int:
        self.said.append(code)
        heard = self.heard.pop(0)
        if heard == GONE:
            raise RuntimeError("Connection closed by peer")
        return heard


def line(monkeypatch: pytest.MonkeyPatch, rank: int, *heard: int) -> Line:
    made = Line(list(heard))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "_said", made)
    return made


def run(error: BaseException | None = None, *, training: bool = False) -> None:
    company = Company(trains=True)
    with company.one_outcome():
        company.begin_training()
        if not training:
            company.end_training()
        if error is not None:
            raise error


def test_the_others_end_as_the_main_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    met = line(monkeypatch, 1, 0, 1)
    with pytest.raises(FailedElsewhere) as failed:
        run()
    assert (failed.value.exit_code, met.heard) == (1, [])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("last", [0, GONE, UsageError.exit_code])
def test_a_mistake_is_heard_before_anybody_leaves(monkeypatch: pytest.MonkeyPatch, rank: int, last: int) -> None:
    met = line(monkeypatch, rank, 0, last)
    with pytest.raises(UsageError, match="no such layer"):
        run(UsageError("no such layer", hint="another one"))
    assert met.said == [0, UsageError.exit_code]


def test_who_is_interrupted_says_so_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, said in ((0, [0, EXIT_FAULT]), (1, [0])):
        met = line(monkeypatch, rank, 0, GONE)
        with pytest.raises(KeyboardInterrupt):
            run(KeyboardInterrupt())
        assert met.said == said


def test_what_fails_in_a_training_fails_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):
        met = line(monkeypatch, rank, 0)
        with pytest.raises(UsageError):
            run(UsageError("diverged", hint="a lower rate"), training=True)
        assert met.said == [0]


def test_who_has_heard_of_a_failure_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    met = line(monkeypatch, 1, 2)
    with pytest.raises(FailedElsewhere):
        run()
    assert met.said == [0]


def test_who_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, who in ((0, "a process that trains beside this one is gone"), (1, "the main process is gone")):
        line(monkeypatch, rank, GONE, GONE)
        with pytest.raises(BackendError, match=who):
            run()


def test_the_main_process_is_done_whoever_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    line(monkeypatch, 0, 0, GONE)
    run()
    line(monkeypatch, 1, 0, GONE)
    with pytest.raises(BackendError, match="gone"):
        run()
