"""The report as a file: every form from the same facts, what is not there named, and the page in a browser."""

from __future__ import annotations

import errno
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt import measurement, registry, walk
from graphopt.choices import find_backend, find_target, open_model
from graphopt.comparing.layer_errors import LayerComparison, LayerError
from graphopt.comparison import OutputError
from graphopt.reporting import file as report_file
from graphopt.reporting import findings as report_findings
from graphopt.reporting.charts import LIGHT, layers_chart, losses_chart
from graphopt.reporting.findings import operator_shares
from graphopt.reporting.page import SECTIONS, TRAINING
from graphopt.reporting.rows import SideRow
from graphopt.reporting.weight_histograms import MOST_LAYERS, weight_histograms
from graphopt.reporting.words import headline, layers_message, worst_rows

from .browser import BrowserPage, new_page, start_browser  # noqa: F401
from .command_line import Outcome, classifier, contents, fill, run

pytest.importorskip("bokeh", reason="pages need `pip install graphopt[report]`")
pytest.importorskip("jinja2", reason="pages need `pip install graphopt[report]`")

PASSES = "prune,quant:mode=static"
STYLE = Path(graphopt.__file__).parent / "reporting" / "page.css"
# What a model may be called, and its nodes, to get out of where a page, a script or a table cell puts them.
HOSTILE = '</script><img src=x onerror="window.hacked=1"> | `a`'


def report_of(folder: Path, name: str, *args: Any, passes: str = PASSES) -> tuple[Outcome, Path]:
    """Optimize the small classifier with a report of some name."""
    model, file = fill(folder), folder / name
    options = ("--data", folder / "data.npz", "--threads", 1, *args)
    return run("optimize", model, "--passes", passes, "--report", file, *options), file


@pytest.fixture(scope="module", autouse=True)
def _timed_briefly() -> Iterator[None]:
    """No test here looks at a latency."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "LATENCY_SECONDS", 0.05)
        yield


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outcome, file = report_of(tmp_path_factory.mktemp("report"), "out.html")
    assert outcome.code == 0, outcome.err
    assert f"report: {file}" in outcome.out
    return file


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome, file = report_of(tmp_path_factory.mktemp("report"), "out.json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(file.read_text())["findings"]
    return found


# The facts


def test_json_holds_what_was_found(findings: dict[str, Any]) -> None:
    assert findings.keys() == {
        *("operators", "kernels", "layers", "sensitivity", "weights", "coverage", "repetition", "not_measured"),
    }
    assert findings["not_measured"] == {}
    assert {one["pass_name"] for one in findings["sensitivity"]} == {"prune", "quant"}
    assert all(0 <= one["predicted"] <= 1 for one in findings["sensitivity"])
    assert {one["kernel"] for one in findings["kernels"] if one["ms_after"]} >= {"QGemm"}
    assert all(one["ms_before"] or one["ms_after"] for one in findings["kernels"])
    assert {layer["origin"] for layer in findings["layers"]["layers"]} & {"first", "relu", "second"}
    assert [layer["layer"] for layer in findings["weights"]["layers"]] == ["first", "second"]
    assert all(one["in_integers"] if "in_integers" in one else one["state"] for one in findings["coverage"]["findings"])


def test_repetition_names_the_command_and_every_file(findings: dict[str, Any]) -> None:
    again = findings["repetition"]
    assert again["command"].startswith("graphopt optimize ")
    assert f"--passes {PASSES}" in again["command"]
    assert [one["role"] for one in again["files"]] == ["model", "data", "result"]
    for one in again["files"]:
        assert one["bytes"] == Path(one["path"]).stat().st_size
        assert re.fullmatch("[0-9a-f]{64}", one["sha256"])
    assert again["versions"].keys() >= {"graphopt", "python", "onnxruntime"}


def test_command_of_a_report_repeats_it(tmp_path: Path) -> None:
    outcome, file = report_of(tmp_path, "out.json", "--seed", 3)
    assert outcome.code == 0
    first = json.loads(file.read_text())
    result = (tmp_path / "net.opt.onnx").read_bytes()
    (tmp_path / "net.opt.onnx").unlink()
    assert run(*first["findings"]["repetition"]["command"].split()[1:]).code == 0
    assert (tmp_path / "net.opt.onnx").read_bytes() == result
    assert json.loads(file.read_text())["after"]["bytes"] == first["after"]["bytes"]


def test_a_report_changes_nothing_of_the_result(tmp_path: Path) -> None:
    outcome, _ = report_of(tmp_path, "out.json")
    assert outcome.code == 0
    reported = (tmp_path / "net.opt.onnx").read_bytes()
    assert run("optimize", tmp_path / "net.onnx", "--passes", PASSES, "--data", tmp_path / "data.npz").code == 0
    assert (tmp_path / "net.opt.onnx").read_bytes() == reported


def test_forecasts_are_figures_and_no_remarks(tmp_path: Path) -> None:
    outcome, file = report_of(tmp_path, "out.md", "-v")
    assert ": forecast" not in outcome.out
    assert ": forecast" not in file.read_text()


def test_operators_account_for_every_byte() -> None:
    before = open_model(ir.from_proto(classifier()))
    after = graphopt.optimize(before, "quant:mode=dynamic").model
    shares = operator_shares(before, after)
    for model, name in ((before, "before"), (after, "after")):
        assert sum(getattr(one, f"bytes_{name}") for one in shares) == sum(t.nbytes for t in walk.stored_tensors(model))
        assert sum(getattr(one, f"count_{name}") for one in shares) == len(list(walk.every_node(model)))


def test_who_asks_for_the_shape_of_a_weight_is_not_its_reader() -> None:
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    nodes = [helper.make_node("Shape", ["w"], ["size"]), helper.make_node("MatMul", ["x", "w"], ["y"])]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [weight])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert {one.operator: one.bytes_before for one in operator_shares(model, model)} == {"MatMul": 64, "Shape": 0}


@pytest.mark.parametrize(
    ("passes", "stored", "bits"),
    [
        ("quant:mode=static", "int8", 7),
        ("quant:mode=dynamic", "int8", 7),
        ("quant:mode=weights", "int8", 7),
        ("quant:mode=weights:weights=int4", "4-bit codes", 3),
        ("cast", "float16", 10),
    ],
)
def test_histograms_show_the_numbers_that_codes_stand_for(passes: str, stored: str, bits: int) -> None:
    model = wide()
    data = {"x": np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)}
    result = graphopt.optimize(ir.from_proto(model), passes, data=data)
    found = weight_histograms(open_model(ir.from_proto(model)), result.model, find_backend(None, find_target(None)))
    assert found.undecoded == ()
    (one,) = found.layers
    assert (one.layer, one.origins, one.stored) == ("layer", ("layer",), stored)
    middle = [(left + right) / 2 for left, right in zip(one.edges, one.edges[1:], strict=False)]
    spread = [float(np.sqrt(np.average(np.square(middle), weights=side))) for side in (one.before, one.after)]
    assert spread[1] == pytest.approx(spread[0], rel=2.0**-bits + 0.02), "other numbers, or another scale"
    assert 0.97 < sum(one.before) <= 1


def test_zeros_are_counted_apart() -> None:
    model = wide()
    pruned = graphopt.optimize(ir.from_proto(model), "prune:sparsity=0.75:method=magnitude").model
    found = weight_histograms(open_model(ir.from_proto(model)), pruned, find_backend(None, find_target(None)))
    (one,) = found.layers
    assert one.zeros_before == 0
    assert one.zeros_after == pytest.approx(0.75, abs=0.01)
    assert sum(one.after) <= 0.26


def test_only_the_largest_layers_are_shown() -> None:
    count = MOST_LAYERS + 3
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), f"w{n}") for n in range(count)]
    nodes = [helper.make_node("MatMul", [f"v{n}", f"w{n}"], [f"v{n + 1}"], f"layer{n}") for n in range(count)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("v0", f"v{count}")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], weights)
    model = open_model(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])))
    found = weight_histograms(model, model.clone(), find_backend(None, find_target(None)))
    assert (len(found.layers), found.left) == (MOST_LAYERS, 3)


def wide() -> onnx.ModelProto:
    """One product with a weight wide enough for every way to store it."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in ("x", "y")]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "layer")
    graph = helper.make_graph([node], "wide", ports[:1], ports[1:], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


# What is not there


def test_what_was_not_run_is_said_in_every_form(tmp_path: Path) -> None:
    for suffix in ("json", "md", "html"):
        model = fill(tmp_path)
        file = tmp_path / f"out.{suffix}"
        assert run("optimize", model, "--passes", "simplify", "--verify", "off", "--report", file).code == 0
        text = file.read_text()
        if suffix == "json":
            found = json.loads(text)["findings"]
            assert found["not_measured"]["layers"] == found["not_measured"]["kernels"] == "no model was run"
            assert (found["layers"], found["kernels"]) == (None, [])
        else:
            assert text.count("Not measured: no model was run.") == 2
            assert re.search("nothing was checked, for no model was run", text, re.IGNORECASE)
            assert "on not run" not in text, "that is no sentence"


def test_a_finding_that_fails_fails_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("of all things")

    monkeypatch.setattr(report_findings, "explain", fail)
    monkeypatch.setattr(report_findings, "compare_layers", fail)
    outcome, file = report_of(tmp_path, "out.json", passes="simplify")
    assert outcome.code == 0
    missing = json.loads(file.read_text())["findings"]["not_measured"]
    assert missing["coverage"] == missing["layers"] == "a fault of graphopt: RuntimeError: of all things"


def test_figures_on_made_up_inputs_are_said_to_be(tmp_path: Path) -> None:
    model, file = fill(tmp_path), tmp_path / "out.json"
    assert run("optimize", model, "--passes", "simplify,quant:mode=weights", "--report", file).code == 0
    found = json.loads(file.read_text())["findings"]
    assert (found["layers"]["source"], found["coverage"]["inputs"]) == (None, "made-up inputs")


def test_what_was_not_timed_is_not_called_as_fast() -> None:
    report = graphopt.optimize(ir.from_proto(classifier()), "prune", timed=False).report
    size = SideRow("size", "1 kB", "1 kB", "the same")
    assert headline(report, [size]).startswith("As large as before, after ")
    assert headline(report, [size, SideRow("latency", "1 ms", "1 ms", "the same")]).startswith("As large and as fast")


def test_a_report_that_cannot_be_written_hides_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report_file, "write_text", fill_up)
    outcome, _ = report_of(tmp_path, "out.md", "--budget", "top1=0%", passes="prune:sparsity=0.97:method=magnitude")
    assert (outcome.code, "over budget" in outcome.error) == (1, True)
    assert "there is no report: cannot write" in outcome.hint


def test_missing_libraries_are_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bokeh" else found(name, *a))
    model = fill(tmp_path)
    before = contents(tmp_path)
    outcome = run("optimize", model, "--passes", "prune", "--report", tmp_path / "out.html")
    assert outcome.code == 2
    assert "`bokeh`, which is not installed" in outcome.error
    assert "graphopt[report]" in outcome.hint
    assert contents(tmp_path) == before
    assert run("optimize", model, "--passes", "prune", "--report", tmp_path / "out.md").code == 0


def test_report_may_not_replace_what_is_read(tmp_path: Path) -> None:
    model = fill(tmp_path)
    (tmp_path / "data.json").write_bytes((tmp_path / "data.npz").read_bytes())
    file = tmp_path / "data.json"
    before = contents(tmp_path)
    with pytest.raises(graphopt.GraphoptError, match="it is the data"):
        graphopt.optimize(model, "prune", data=file, report=file)
    assert contents(tmp_path) == before


def test_over_budget_leaves_a_report_that_says_so(tmp_path: Path) -> None:
    outcome, file = report_of(
        tmp_path, "out.html", "--budget", "top1=0%", passes="prune:sparsity=0.97:method=magnitude"
    )
    assert outcome.code == 1
    text = file.read_text()
    assert "<h1>Over budget</h1>" in text
    assert "over budget after pass" in text
    assert not (tmp_path / "net.opt.onnx").exists()


def test_models_in_memory_have_reports_without_a_command(tmp_path: Path) -> None:
    model = ir.from_proto(classifier())
    graphopt.optimize(model, "simplify", report=tmp_path / "out.md")
    text = (tmp_path / "out.md").read_text()
    assert text.startswith("# a model in memory: ")
    assert "There is no command: the model was given in memory, from Python." in text


# Sentences and charts


def layer(name: str, error: OutputError, *, is_output: bool = False) -> LayerError:
    return LayerError(name, name, name, "MatMul", "MatMul", 1, error, 200.0, (name,), (name,), is_output=is_output)


def compared(name: str, a: list[float], b: list[float]) -> OutputError:
    error = OutputError(name)
    error.update(np.array(a, np.float32), np.array(b, np.float32))
    return error


def test_values_without_any_signal_leave_the_others_their_room() -> None:
    layers = LayerComparison(
        layers=[
            layer("good", compared("good", [1, 2], [1, 2.01])),
            layer("silent", compared("silent", [0, 0], [1e5, 1e5])),
            layer("lost", compared("lost", [1, 2], [np.nan, 2]), is_output=True),
        ],
        samples=1,
    )
    plot = layers_chart(layers)
    heights = [height for one in plot.renderers for height in one.data_source.data.get("db", ())]
    assert sorted(heights)[:2] == [-20, -20]
    assert -40 < plot.y_range.start < -20 < plot.y_range.end < 100
    assert "Output `lost` cannot be compared: " in layers_message(layers)
    assert {row[0]: row[2] for row in worst_rows(layers, 3)}["lost"] == layers.layers[-1].error.mismatch


def test_every_bar_stands_at_a_name_of_the_axis_that_tells_it_apart() -> None:
    names = [f"/encoder/layer.{number}/attention/self/query/MatMul" for number in (1, 12)]
    plot = losses_chart([layer(name, compared(name, [1, 2], [1, 2.5])) for name in names])
    shown = plot.renderers[0].data_source.data["name"]
    assert set(shown) == set(plot.y_range.factors)
    assert ["12/" in name for name in shown] == [False, True]


# Markdown


def test_a_pass_no_command_line_can_name_is_in_no_command(tmp_path: Path) -> None:
    class Prune(registry.find("PASSES", "prune")):  # type: ignore[misc]
        """As another of the same name, which a command would run."""

    graphopt.optimize(fill(tmp_path), Prune(), report=tmp_path / "out.md", timed=False)
    assert "There is no command: pass `prune` was given in memory, from Python." in (tmp_path / "out.md").read_text()


def test_markdown_has_every_section_and_whole_tables(tmp_path: Path) -> None:
    outcome, file = report_of(tmp_path, "out.md")
    assert outcome.code == 0
    text = file.read_text()
    for heading in ("Before and after", "Step by step", "Error by layer", "In integers", "Weights", "How to repeat it"):
        assert f"\n## {heading}\n" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) >= 7
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert "| size |" in text


# The page


def test_page_has_every_section_and_loads_nothing(html: Path) -> None:
    text = html.read_text()
    for name, _ in SECTIONS:
        shown = name != TRAINING  # nothing was trained
        assert (f'<section id="{name}"' in text) is shown
        assert (f'href="#{name}"' in text) is shown
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=\"(?!data:)", text)


def test_both_themes_know_every_colour_of_the_charts() -> None:
    light, dark = re.findall(r":root[^{]*\{(.*?)\}", STYLE.read_text(), re.DOTALL)[:2]
    for token, colour in LIGHT.items():
        assert f"--{token}: {colour};" in light
        assert re.search(rf"--{token}: #[0-9a-f]{{6}};", dark)


def test_charts_are_drawn_in_the_colours_of_the_theme(html: Path, page: BrowserPage) -> None:
    page.open(html)
    page.tab.wait_for_function("window.Bokeh && Bokeh.documents.length > 0 && Bokeh.index.roots.length > 5")
    colours = """() => {
        const found = new Set()
        for (const one of Bokeh.documents[0]._all_models.values())
            for (const tag of one.tags ?? [])
                if (tag == "fill_color=after") found.add(one.fill_color.value)
        return [...found]
    }"""
    light = page.evaluate(colours)
    page.tab.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    dark = page.evaluate(colours)
    assert len(light) == len(dark) == 1
    assert light == [LIGHT["after"]] != dark
    page.tab.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(colours) == light
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(colours) == dark


def test_page_fits_a_phone(html: Path, page: BrowserPage) -> None:
    page.tab.set_viewport_size({"width": 360, "height": 740})
    page.open(html)
    page.tab.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_layer_of_a_table_is_shown_in_the_graph(html: Path, page: BrowserPage) -> None:
    page.open(html)
    page.evaluate("document.addEventListener('graphopt-select', e => { window.chosen = e.detail.origin })")
    link = page.tab.locator("#weights .link").first
    link.click()
    assert page.evaluate("window.chosen") == link.get_attribute("data-origin") == "first"


def test_what_can_be_seen_can_be_heard(html: Path, page: BrowserPage) -> None:
    page.open(html)
    assert page.evaluate("[...document.querySelectorAll('.chart [role=img]')].every(one => one.ariaLabel.length > 10)")
    assert page.evaluate(
        "[...document.querySelectorAll('button')].every(one => (one.ariaLabel || one.textContent).trim())"
    )
    assert page.evaluate(
        "[...document.querySelectorAll('table')].every(one => one.caption && one.querySelector('th[scope]'))"
    )
    assert page.evaluate("document.querySelectorAll('h1').length") == 1


def test_names_of_a_model_are_no_code(tmp_path: Path, page: BrowserPage) -> None:
    model = classifier()
    for node in model.graph.node:
        node.name += HOSTILE
    path = tmp_path / "a<b>&.onnx"
    onnx.save(model, path)
    graphopt.optimize(path, "quant:mode=weights", report=tmp_path / "out.html", data=None)
    page.open(tmp_path / "out.html")
    page.tab.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert page.tab.locator(".file").text_content() == str(path)


def test_one_run_writes_every_form_asked_for(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("out.json", "out.md", "page.html")]
    words = [word for file in files for word in ("--report", file)]
    outcome = run("optimize", fill(tmp_path), "--passes", "simplify", "-o", tmp_path / "small.onnx", *words)
    assert outcome.code == 0, outcome.err
    assert all(f"report: {file}" in outcome.out for file in files)
    found = json.loads(files[0].read_text())
    assert found["findings"]["repetition"]["command"].count("--report") == len(files)
    for file in files[1:]:
        assert "small.onnx" in file.read_text(encoding="utf-8")
    bad = run("optimize", tmp_path / "model.onnx", "--passes", "simplify", *words, "--report", tmp_path / "out.pdf")
    assert "is of unknown kind" in bad.error
