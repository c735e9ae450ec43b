"""Tables as a terminal shows them: wide ones, and narrow terminals."""

from __future__ import annotations

import sys

import pytest

from graphopt.commands.tables import print_listing
from graphopt.listing import Listing, Sheet

NAME = "models/a_network_of_a_long_name.onnx"
NUMBERS = ("0.0271 ms", "0.0269–8.11", "0.0268–0.0275 ms", "36,941")


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_numbers_stay_whole_in_a_narrow_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    headers = ("model", "median", "95 %", "p10–p90", "samples/s")
    print_listing(Listing([Sheet(headers, [[NAME, *NUMBERS]], headers[1:])], {}))
    shown = capsys.readouterr().out
    assert all(number in shown for number in NUMBERS)
    assert NAME[:12] in shown, "names are folded, and not to a few characters"
    assert NAME not in shown


def test_nothing_is_folded_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_listing(Listing([Sheet(("model", "size"), [[NAME * 9, "1"]], ("size",))], {}))
    assert NAME * 9 in capsys.readouterr().out
