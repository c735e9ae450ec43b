"""The graph view as a page, looked at in a browser."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

import graphopt
from graphopt.graph_view.view import graph_page, graph_view
from graphopt.model_io import load

from .browser import BrowserPage, new_page, start_browser  # noqa: F401
from .command_line import run
from .edited_models import MODEL, NESTED, edited, named, parsed


def test_the_same_models_give_the_same_view() -> None:
    before, after = edited()
    assert graph_view(before, after) == graph_view(before, after)


def test_models_are_not_changed() -> None:
    before, after = edited()
    states = [ir.to_proto(model).SerializeToString() for model in (before, after)]
    graph_view(before, after)
    assert [ir.to_proto(model).SerializeToString() for model in (before, after)] == states


# The stripe of a node is this far from its middle.
STRIPE = -74.5
RED = 150
PLACE_OF = """([side, name, dx]) => {
  const node = view.scene.sides[side].nodes.find((one) => one.facts.name === name);
  const { width, height } = view.painters[side], { x, y, scale } = view.view;
  return [(node.x + dx - x) * scale + width / 2, (node.y - y) * scale + height / 2];
}"""
COLOUR_AT = """([side, x, y]) => {
  view.draw();
  const { context, ratio } = view.painters[side];
  return [...context.getImageData(Math.round(x * ratio), Math.round(y * ratio), 1, 1).data].slice(0, 3);
}"""
SIDES_OF_EVERY_GRAPH = """() => view.graphs.map((graph, index) => {
  view.open(index);
  view.draw();
  return Object.keys(view.scene.sides).length;
})"""
# How many labels and framed nodes are drawn at a scale.
DRAWN_AT = """(scale) => {
  const painter = view.painters.after, { drawLabel, drawNode } = painter;
  let labels = 0, frames = 0;
  painter.drawLabel = () => { labels += 1; };
  painter.drawNode = (...given) => { frames += 1; drawNode.apply(painter, given); };
  view.move(0, view.scene.bottom / 2, scale);
  view.draw();
  Object.assign(painter, { drawLabel, drawNode });
  return [labels, frames];
}"""


def write(tmp_path: Path, before: ir.Model, after: ir.Model | None = None, title: str = "a model") -> Path:
    file = tmp_path / "graph.html"
    file.write_text(graph_page(graph_view(before, after), title), encoding="utf-8")
    return file


def opened(page: BrowserPage, file: Path) -> BrowserPage:
    page.open(file)
    page.tab.wait_for_selector(".gv-ready")
    page.evaluate("() => { window.view = document.querySelector('.graph-view').graphView; }")
    return page


def shown(page: BrowserPage, side: str) -> str:
    return str(page.tab.inner_text(f".gv-details [data-side={side}]"))


def place_of(page: BrowserPage, side: str, name: str, dx: float = 0) -> tuple[float, float]:
    """Where a node is on its canvas, in pixels; `dx` units of the drawing to the right of its middle."""
    x, y = page.evaluate(PLACE_OF, [side, name, dx])
    return x, y


def colour_at(page: BrowserPage, side: str, name: str) -> list[int]:
    """The colour of the stripe of a node, as drawn."""
    colour: list[int] = page.evaluate(COLOUR_AT, [side, *place_of(page, side, name, STRIPE)])
    return colour


def test_a_page_shows_both_sides(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    assert page.tab.inner_text(".gv-pane[data-side=before] .gv-count") == "5 nodes"
    chips = {
        status: page.tab.inner_text(f".gv-chip[data-status={status}] .gv-number")
        for status in ("kept", "changed", "removed", "added")
    }
    assert chips == {"kept": "2", "changed": "2", "removed": "1", "added": "1"}
    # Red where it is gone, amber where it changed.
    red, amber = colour_at(page, "before", "same"), colour_at(page, "after", "bias")
    assert red[0] > RED > max(red[1:])
    assert amber[0] > amber[1] > amber[2]


def test_a_click_selects_both_partners(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    x, y = place_of(page, "after", "bias")
    page.tab.click(".gv-pane[data-side=after] canvas", position={"x": x, "y": y})
    for side in ("before", "after"):
        assert "bias" in shown(page, side)
        assert "float[4] → float[4], other numbers" in shown(page, side)
    page.tab.keyboard.press("Escape")
    assert not page.tab.is_visible(".gv-details")


def test_what_was_removed_says_so_and_leads_on(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    page.tab.click(".gv-chip[data-status=removed]")
    assert "removed" in shown(page, "before")
    assert shown(page, "after").strip() == "Not there after."
    page.tab.click(".gv-details [data-side=before] .gv-link >> text=product")
    assert "MatMul" in shown(page, "after")


def test_search_finds_by_name_operator_and_value(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    for text, first in (("PRODUCT", "MatMul product"), ("identity", "Identity same"), ("mul scale", "Mul scale")):
        page.tab.fill(".gv-search input", text)
        page.tab.wait_for_function("text => document.querySelector('.gv-results').innerText.includes(text)", arg=first)
    page.tab.press(".gv-search input", "Enter")
    assert "scale" in shown(page, "after")
    page.tab.fill(".gv-search input", "no such thing")
    page.tab.wait_for_function("() => document.querySelector('.gv-results').innerText === 'nothing found'")


def test_both_sides_move_together_by_wheel_keys_and_dragging(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    canvas = ".gv-pane[data-side=before] canvas"
    start = page.evaluate("() => ({...view.view})")
    page.tab.hover(canvas)
    page.tab.mouse.down()
    page.tab.mouse.move(300, 400, steps=4)
    page.tab.mouse.up()
    dragged = page.evaluate("() => ({...view.view})")
    assert (dragged["x"], dragged["y"]) != (start["x"], start["y"])
    page.tab.mouse.wheel(0, -400)
    page.tab.wait_for_function("scale => view.view.scale > scale", arg=dragged["scale"])
    page.tab.focus(canvas)
    page.tab.keyboard.press("0")
    fitted = page.evaluate("() => view.view.scale")
    page.tab.keyboard.press("+")
    assert page.evaluate("() => view.view.scale") > fitted
    # No distance leads out of the graph.
    page.evaluate("() => view.move(1e9, -1e9, 1e9)")
    end = page.evaluate("() => ({...view.view, right: view.scene.right, top: view.scene.top})")
    assert (end["x"], end["y"]) == (end["right"], end["top"])


def test_nested_graphs_open_and_lead_back(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, parsed(NESTED), parsed(NESTED.replace("Abs", "Floor"))))
    page.evaluate("() => view.selectNamed({node: 'choice'})")
    page.tab.click(".gv-details [data-side=after] .gv-open >> nth=1")
    assert page.tab.inner_text(".gv-trail") == "model › choice · else_branch"
    assert page.tab.inner_text(".gv-chip[data-status=changed] .gv-number") == "1"
    page.tab.click(".gv-trail .gv-link")
    assert not page.tab.is_visible(".gv-trail")
    # A search leads into a nested graph.
    page.tab.fill(".gv-search input", "neg")
    page.tab.press(".gv-search input", "Enter")
    assert "then_branch" in page.tab.inner_text(".gv-trail")


def test_other_parts_of_a_page_can_select(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    page.evaluate("() => document.dispatchEvent(new CustomEvent('graphopt-select', {detail: {origin: 'same'}}))")
    page.tab.wait_for_function("() => document.querySelector('.gv-details').innerText.includes('removed')")
    assert "Identity" in shown(page, "before")


def test_names_from_a_model_are_never_markup(page: BrowserPage, tmp_path: Path) -> None:
    before = parsed(MODEL)
    evil = "</script><img src=x onerror=alert(1)>"
    named(before, "product").name = evil
    opened(page, write(tmp_path, before, before.clone(), title=evil))
    page.tab.fill(".gv-search input", "matmul")
    page.tab.press(".gv-search input", "Enter")
    assert evil in shown(page, "after")
    assert page.evaluate("() => document.images.length") == 0


def test_one_model_is_shown_alone(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, parsed(NESTED)))
    assert page.evaluate("() => document.querySelectorAll('.gv-pane').length") == 1
    assert page.evaluate("() => document.querySelectorAll('.gv-chip').length") == 0
    page.evaluate("() => view.selectNamed({node: 'sum'})")
    assert "float [3]" in shown(page, "after")


def test_colours_follow_the_page(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    light = page.evaluate("() => view.colours.panel")
    page.evaluate("() => document.documentElement.style.setProperty('--panel', 'rgb(1, 2, 3)')")
    page.evaluate("() => document.dispatchEvent(new Event('graphopt-theme'))")
    page.tab.wait_for_function("() => view.colours.panel === 'rgb(1, 2, 3)'")
    assert light != "rgb(1, 2, 3)"


def test_a_narrow_page_stacks_the_sides(page: BrowserPage, tmp_path: Path) -> None:
    page.tab.set_viewport_size({"width": 390, "height": 800})
    opened(page, write(tmp_path, *edited()))
    boxes = [page.tab.locator(f".gv-pane[data-side={side}]").bounding_box() for side in ("before", "after")]
    assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_a_real_model_with_nested_graphs(page: BrowserPage, shared: Path, tmp_path: Path) -> None:
    file = shared / "assets" / "models" / "silero_vad.onnx"
    after = graphopt.optimize(file, "simplify", verify="off").model
    opened(page, write(tmp_path, load(file), after))
    counts = page.evaluate(SIDES_OF_EVERY_GRAPH)
    assert len(counts) > 4
    assert set(counts) <= {1, 2}


def test_thousands_of_nodes_are_drawn_by_what_is_seen(page: BrowserPage, tmp_path: Path) -> None:
    count = 5000
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    nodes: list[ir.Node] = []
    for index in range(count):
        nodes.append(
            ir.node("Relu" if index % 3 else "Add", [value] if index % 3 else [value, value], name=f"n{index}")
        )
        value = nodes[-1].outputs[0]
        value.name, value.type, value.shape = f"v{index}", ir.TensorType(ir.DataType.FLOAT), ir.Shape([4])
    first = nodes[0].inputs[0]
    assert first is not None
    model = ir.Model(ir.Graph([first], [value], nodes=nodes, opset_imports={"": 17}, name="deep"), ir_version=8)
    opened(page, write(tmp_path, model))
    assert page.evaluate(DRAWN_AT, 0.01) == [0, 0]
    labels, frames = page.evaluate(DRAWN_AT, 0.25)
    assert labels == 0
    assert 0 < frames < 100
    labels, frames = page.evaluate(DRAWN_AT, 1)
    assert 0 < labels == frames < 30


def test_the_whole_graph_is_printed(page: BrowserPage, tmp_path: Path) -> None:
    opened(page, write(tmp_path, *edited()))
    page.evaluate("() => view.move(1e9, 1e9, 2)")
    page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    x, y = place_of(page, "before", "same")
    assert x > 0
    assert y > 0
    assert colour_at(page, "before", "same")[0] > RED
    page.tab.emulate_media(media="print")
    assert not page.tab.is_visible(".gv-search")
    page.evaluate("() => window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("() => view.view.scale") == 2


def test_inspect_writes_a_page(page: BrowserPage, tmp_path: Path) -> None:
    files = [tmp_path / "before.onnx", tmp_path / "after.onnx"]
    for file, model in zip(files, edited(), strict=True):
        onnx.save(ir.to_proto(model), file)
    html = tmp_path / "graph.html"
    assert run("inspect", files[1], "--html", html).out == f"wrote {html}\n"
    opened(page, html)
    assert page.evaluate("() => document.querySelectorAll('.gv-pane').length") == 1
    assert run("inspect", files[1], "--before", files[0], "--html", html, "--json").code == 0
    opened(page, html)
    assert page.tab.inner_text(".gv-chip[data-status=removed] .gv-number") == "2"


def test_inspect_refuses_what_cannot_be(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(ir.to_proto(parsed(MODEL)), model)
    before = model.read_bytes()
    assert "is the input" in run("inspect", model, "--html", model).error
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes())
    assert "is not named as one" in run("inspect", model, "--html", other).error
    assert other.read_bytes() == model.read_bytes()
    assert "do not go together" in run("inspect", model, "--html", tmp_path / "a.html", "--groups").error
    assert "goes with `--html`" in run("inspect", model, "--before", model).error
    assert "does not exist" in run("inspect", model, "--html", tmp_path / "none" / "a.html").error
    assert model.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [model, other]


def test_a_view_that_was_folded_away_begins_when_it_is_unfolded(page: BrowserPage, tmp_path: Path) -> None:
    file = write(tmp_path, *edited())
    text = file.read_text(encoding="utf-8")
    folded = text.replace("<main>", "<main><details><summary>graph</summary>").replace("</main>", "</details></main>")
    file.write_text(folded, encoding="utf-8")
    page.open(file)
    page.tab.wait_for_selector(".gv-ready", state="attached")
    page.tab.click("summary")
    page.tab.wait_for_function("() => document.querySelector('.graph-view').graphView.view.scale > 0.4")
