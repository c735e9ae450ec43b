"""A browser for tests of pages: Debian's or any other Chromium without a window and without network, by playwright.

A test module that wants the fixtures ``browser`` and ``page`` imports ``new_page`` and ``start_browser``; its tests are
skipped, with the reason, where playwright or a Chromium is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
# Without a sandbox, because tests may run as root; what would ask the network for something is off.
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def find_chromium() -> str | None:
    """Return the path of a Chromium: what ``GRAPHOPT_CHROMIUM`` says, else the first on the path."""
    named = os.environ.get("GRAPHOPT_CHROMIUM")
    return named or next((found for name in _NAMES if (found := shutil.which(name))), None)


@pytest.fixture(name="browser", scope="module")
def start_browser() -> Iterator[Any]:
    """A browser, one for all tests of a module."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `pip install graphopt[test]`")
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium on this machine; set GRAPHOPT_CHROMIUM to one")
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=list(OPTIONS))
        yield started
        started.close()


@pytest.fixture(name="page")
def new_page(browser: Any) -> Iterator[BrowserPage]:
    """A page of its own for a test, which fails if the page reports an error or asks for anything but its file."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    opened = BrowserPage(context.new_page())
    yield opened
    context.close()
    assert opened.errors == []
    assert opened.requests == []


class BrowserPage:
    """A page and what went wrong on it; all else is playwright's ``Page``, as ``page.tab``."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.errors: list[str] = []
        self.requests: list[str] = []
        tab.on("pageerror", lambda error: self.errors.append(str(error)))
        tab.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        tab.on("request", self._note)

    def _note(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:", "about:")):
            self.requests.append(request.url)

    def open(self, file: Path) -> None:
        """Load a file."""
        self.tab.goto(file.resolve().as_uri())

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """Return what a JavaScript expression, or function of the argument, gives."""
        return self.tab.evaluate(script, argument)
