"""The pytest plugin: fixtures for tests of models and passes, and golden files.

It is loaded in every run of pytest in an environment with graphopt, so it imports nothing until a fixture is used.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from graphopt.optimization import Result
    from graphopt.regression.golden_files import Golden

UPDATE = "--graphopt-update"
# Where golden files lie, beside the file of the test.
GOLDEN_FOLDER = "golden"
# Under this name a test's report tells the process that prints which files it wrote.
_WRITTEN = "graphopt-golden-written"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes golden files."""
    group = parser.getgroup("graphopt")
    group.addoption(UPDATE, action="store_true", help="write golden files anew instead of comparing with them")


def pytest_configure(config: pytest.Config) -> None:
    """Add the fixtures, but for names that another installed plugin uses: a suite that relies on those goes on."""
    import pytest

    installed = (plugin for plugin, _ in config.pluginmanager.list_plugin_distinfo())
    others = [plugin for plugin in installed if plugin is not sys.modules[__name__]]
    fixtures: dict[str, tuple[Callable[..., Any], str]] = {
        "assert_equivalent": (_assert_equivalent, "session"),
        "optimized": (_optimized, "session"),
        "golden": (_golden, "function"),
    }
    holder = types.ModuleType("graphopt_fixtures")
    for name, (function, scope) in fixtures.items():
        if not any(hasattr(other, name) for other in others):
            setattr(holder, name, pytest.fixture(scope=scope, name=name)(function))  # type: ignore[call-overload]
    config.pluginmanager.register(holder, "graphopt-fixtures")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave golden texts alone: pytest takes files called ``test*.txt`` for doctests."""
    folder = collection_path.parent
    if collection_path.suffix != ".txt" or folder.parent.name != GOLDEN_FOLDER:
        return None
    return True if (folder.parent.parent / f"{folder.name}.py").is_file() else None


def _assert_equivalent() -> Callable[..., Any]:
    """Assert that two models give the same outputs: `graphopt.testing.assert_equivalent`."""
    from graphopt.testing import assert_equivalent

    return assert_equivalent


def _optimized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Optimize a model into a temporary file: optimized(model, passes, **options of graphopt.optimize) -> Result."""
    from graphopt.testing import optimized_into

    def optimized(model: Any, passes: Any, **options: Any) -> Result:
        __tracebackhide__ = True
        return optimized_into(tmp_path_factory.mktemp("graphopt"), model, passes, **options)

    return optimized


def _golden(request: pytest.FixtureRequest) -> Any:
    """Compare values with files beside the test: golden(value, name); see `graphopt.regression.golden_files.Golden`."""
    from graphopt.regression.golden_files import Golden

    golden = Golden(
        folder=request.path.parent / GOLDEN_FOLDER / request.path.stem,
        stem=_stem(request.node.nodeid.partition("::")[2]),
        update=bool(request.config.getoption(UPDATE)),
        hint=f"`pytest {UPDATE}` with this test writes it anew; look at the difference before you commit it",
    )
    yield golden
    _tell(request, golden)


def _stem(test: str) -> str:
    """Return a file name for a test: ``TestClass.test_name.parameters``."""
    from graphopt.regression.golden_files import file_stem

    name, _, parameters = test.replace("::", ".").partition("[")
    return file_stem(f"{name}.{parameters.removesuffix(']')}" if parameters else name)


def _tell(request: pytest.FixtureRequest, golden: Golden) -> None:
    """Put the files written where the process that prints finds them, which is another one under xdist."""
    root = request.config.rootpath
    for path in golden.written:
        shown = path.resolve().relative_to(root) if path.resolve().is_relative_to(root) else path
        request.node.user_properties.append((_WRITTEN, Path(shown).as_posix()))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """List the golden files that were written."""
    if not config.getoption(UPDATE):
        return
    reports = [report for group in terminalreporter.stats.values() for report in group]
    written = {
        str(value) for report in reports for key, value in getattr(report, "user_properties", ()) if key == _WRITTEN
    }
    terminalreporter.section("graphopt golden files")
    for path in sorted(written):
        terminalreporter.line(f"wrote {path}")
    after = "look at the differences before you commit them" if written else "none was missing, none differs"
    terminalreporter.line(f"{len(written)} written; {after}")
