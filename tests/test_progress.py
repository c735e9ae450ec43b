"""What a person at a terminal sees while work goes on."""

from __future__ import annotations

import pytest

from graphopt.progress import Display


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> Display:
    """A display that takes stderr for a terminal, and is drawn by hand."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    shown = Display(True)
    shown._progress.live.auto_refresh = False
    return shown


def drawn(display: Display, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    display._progress.refresh()
    return capsys.readouterr().err


def test_items_are_counted_and_the_time_left_is_told(display: Display, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for item in display.track(["a", "b", "c"], "rounding", "layers"):
        seen.append(drawn(display, capsys))
        assert item == "abc"[len(seen) - 1]
    assert all("rounding" in text for text in seen)
    assert ["0 of 3 layers" in seen[0], "1 of 3 layers" in seen[1], "2 of 3 layers" in seen[2]] == [True] * 3
    assert "left" not in seen[0], "nothing is known of the time before the first is done"
    assert " left" in seen[2]


def test_stages_are_nested_and_gone_when_done(display: Display, capsys: pytest.CaptureFixture[str]) -> None:
    with display.stage("2/3 quant"):
        with display.stage("observing 5 values", 64):
            display.advance(32)
            text = drawn(display, capsys)
            assert "2/3 quant" in text
            assert "32 of 64 samples" in text
        assert "observing" not in drawn(display, capsys)
    assert not display._progress.tasks


def test_samples_are_counted_for_no_stage_that_counts_something_else(
    display: Display, capsys: pytest.CaptureFixture[str]
) -> None:
    with display.stage("rounding", 3, "layers"):
        display.advance(2)
        assert "0 of 3 layers" in drawn(display, capsys)
        display.advance(2, "layers")
        assert "2 of 3 layers" in drawn(display, capsys)


def test_an_error_within_closes_no_other_stage(display: Display) -> None:
    with display.stage("outer"):
        items = display.track([1, 2], "inner", "layers")
        next(items)
        with display.stage("innermost"):
            items.close()
            assert [task.description for task in display._progress.tasks] == ["outer", "innermost"]


def test_nothing_is_shown_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (Display(True), Display(False)):  # stderr is no terminal here
        with shown.stage("reading", 3):
            shown.advance(1)
    assert capsys.readouterr().err == ""
