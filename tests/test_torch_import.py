"""Modules of PyTorch as ONNX models: what they compute, what they are called, and what is said where that fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import graphopt
from graphopt import layers, provenance, walk
from graphopt.errors import GraphoptError, ModelError, UsageError, VerificationError

torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from graphopt.importing import import_module  # noqa: E402
from graphopt.torch_factory import Given, all_inputs, parse_arguments, parse_axes  # noqa: E402

WIDTH = 8


class Feed(nn.Module):
    """A gated feed-forward network, as language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, 12)
        self.gate_proj = nn.Linear(WIDTH, 12, bias=False)
        self.down_proj = nn.Linear(12, WIDTH, bias=False)

    def forward(self, x: Any) -> Any:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Language(nn.Module):
    """Two layers between an embedding and the same matrix again, with a buffer of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(Feed() for _ in range(2))
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.randn(32, WIDTH))

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Image(nn.Module):
    """Convolutions without biases, each with a BatchNorm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Linear(4, 5)

    def forward(self, image: Any) -> Any:
        return self.classifier(self.stem(image).mean((2, 3)))


class Choice(nn.Module):
    """One of two branches, by what the input holds."""

    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        return torch.cond(x.sum() > 0, lambda x: self.yes(x) * 2, lambda x: self.no(x) - 1, (x,))


class InPython(nn.Module):
    def forward(self, x: Any) -> Any:
        return x + 1 if x.sum() > 0 else x - 1


class Unknown(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.special.bessel_j0(x)


class Fixed(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.reshape(2, WIDTH)


class Pair(nn.Module):
    """Two inputs by name, a nested output."""

    def forward(self, a: Any, *, b: Any) -> Any:
        return a - b, {"product": a * b}


ROWS = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
IDS = torch.arange(10).reshape(2, 5)


@pytest.fixture(scope="module")
def language() -> tuple[Any, graphopt.ir.Model]:
    torch.manual_seed(0)
    module = Language().eval()
    model = graphopt.from_torch(
        module, (IDS,), dynamic_shapes={"ids": {0: "batch", 1: "tokens"}}, output_names=["logits"]
    )
    return module, model


def run(model: graphopt.ir.Model, path: Path, *inputs: Any) -> list[np.ndarray]:
    graphopt.save(model, path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    found: list[np.ndarray] = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    return found


def operators(model: graphopt.ir.Model) -> list[str]:
    return [node.op_type for node in walk.every_node(model)]


THREE = torch.ones(3, WIDTH)


class Scaled(nn.Module):
    """A number among the inputs."""

    def forward(self, x: Any, *, scale: float, more: Any) -> Any:
        return torch.cat((x * scale, more))


class Nested(nn.Module):
    """Inputs in a list and a dict."""

    def forward(self, rows: Any, more: Any) -> Any:
        return rows[0] + rows[1] * more["scale"]


class Silent(nn.Module):
    """Nothing comes out."""

    def forward(self, x: Any) -> None:
        return None


def test_other_sizes_than_the_example_give_what_the_module_gives(language: Any, tmp_path: Path) -> None:
    module, model = language
    ids = torch.arange(21).reshape(3, 7) % 16
    (found,) = run(model, tmp_path / "m.onnx", ids)
    np.testing.assert_allclose(found, module(ids).detach().numpy(), atol=1e-5)


def test_names_are_those_of_the_modules(language: Any) -> None:
    _, model = language
    names = {node.name for node in model.graph}
    assert {"embed", "head", "layers.0.up_proj", "layers.1.down_proj", "layers.1/Mul"} <= names
    assert "/Add" in names, "what no inner module does is the outermost one's"
    assert model.graph.name == "Language"
    stored = set(model.graph.initializers)
    assert {"layers.0.up_proj.weight", "layers.0.up_proj.bias", "layers.1.gate_proj.weight", "positions"} <= stored
    assert [value.name for value in model.graph.outputs] == ["logits"]
    assert "layers.0.gate_proj" in {layer.name for layer in layers.layers_of(model)}


def test_every_value_and_node_has_a_name_of_its_own(language: Any) -> None:
    _, model = language
    nodes = [node.name for node in walk.every_node(model)]
    values = [value.name for node in walk.every_node(model) for value in node.outputs]
    assert len(set(nodes)) == len(nodes)
    assert len(set(values)) == len(values)
    assert not {str(name) for name in values} & set(model.graph.initializers)


def test_tied_weights_stay_one(language: Any) -> None:
    _, model = language
    tables = [name for name, value in model.graph.initializers.items() if sorted(value.shape or ()) == [WIDTH, 16]]
    assert len(tables) == 1


def test_weights_are_shared_with_the_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 4)).eval()
    model = graphopt.from_torch(module, ROWS)
    with torch.no_grad():
        module[0].weight.fill_(0.5)
    (found,) = run(model, tmp_path / "m.onnx", ROWS)
    np.testing.assert_allclose(found, module(ROWS).detach().numpy(), atol=1e-6)


def test_nothing_of_this_machine_is_kept(language: Any, tmp_path: Path) -> None:
    graphopt.save(language[1], tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    assert b"stack_trace" not in content
    assert Path(__file__).name.encode() not in content


def test_simplify_leaves_what_was_meant(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Image().eval()
    image = torch.randn(2, 3, 6, 6)
    model = graphopt.from_torch(module, (image,), dynamic_shapes={"image": {0: "batch"}})
    result = graphopt.optimize(model, "simplify", timed=False)
    assert sorted(operators(result.model)) == ["Conv", "Gemm", "ReduceMean", "Relu"]
    assert set(result.model.graph.initializers) >= {"stem.0.weight", "stem.0.bias", "classifier.weight"}
    (conv,) = (node for node in result.model.graph if node.op_type == "Conv")
    assert any(origin.startswith("stem.0") for origin in provenance.origins(conv))
    (found,) = run(result.model, tmp_path / "m.onnx", image)
    np.testing.assert_allclose(found, module(image).detach().numpy(), atol=1e-5)


def test_branches_become_if(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Choice().eval()
    model = graphopt.from_torch(module, (ROWS,))
    assert "If" in operators(model)
    for rows in (ROWS + 1, ROWS - 1):
        (found,) = run(model, tmp_path / "m.onnx", rows)
        np.testing.assert_allclose(found, module(rows).detach().numpy(), atol=1e-5)


def test_exported_programs_and_graph_modules_are_taken(tmp_path: Path) -> None:
    module = Feed().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (ROWS,), dynamic_shapes=({0: batch},))
    traced = torch.fx.symbolic_trace(module).eval()
    for model in (graphopt.from_torch(program), graphopt.from_torch(traced, (ROWS,))):
        (found,) = run(model, tmp_path / "m.onnx", ROWS)
        np.testing.assert_allclose(found, module(ROWS).detach().numpy(), atol=1e-5)
        assert {"up_proj", "down_proj"} <= {node.name for node in model.graph}


def test_named_inputs_and_nested_outputs(tmp_path: Path) -> None:
    model = graphopt.from_torch(Pair().eval(), (ROWS,), {"b": ROWS + 1}, output_names=["less", "times"])
    assert [value.name for value in model.graph.inputs] == ["a", "b"]
    less, times = run(model, tmp_path / "m.onnx", ROWS, ROWS + 1)
    np.testing.assert_allclose(less, -np.ones((2, WIDTH)), atol=1e-6)
    np.testing.assert_allclose(times, (ROWS * (ROWS + 1)).numpy(), atol=1e-6)


class Named(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        twice = x * 2
        return {"scores": twice, "past": [x + 1, x + 2], "again": twice, "given": x, "x": -x}


def test_outputs_have_the_keys_of_a_dict_and_each_is_a_value_of_its_own(tmp_path: Path) -> None:
    model = graphopt.optimize(graphopt.from_torch(Named().eval(), (ROWS,)), "simplify", timed=False).model
    names = [value.name for value in model.graph.outputs]
    assert names[:5] == ["scores", "past.0", "past.1", "again", "given"]
    assert len(set(names)) == len(names), "`x` is the input's name, so that output keeps another"
    assert "x" not in names
    for found, wanted in zip(run(model, tmp_path / "m.onnx", ROWS), (2, None, None, 2, 1, -1), strict=True):
        if wanted is not None:
            np.testing.assert_array_equal(found, wanted * ROWS.numpy())


def test_an_input_keeps_its_name_where_it_is_an_output_of_another() -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    model = graphopt.from_torch(Named().eval(), (ROWS,), output_names=names)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert [value.name for value in model.graph.outputs] == names


class Crossed(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x * 2, "mul": x + 1}


def test_a_file_that_is_none_of_torch_is_one_error_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "junk.pt2").write_text("junk")
    line = [sys.executable, "-m", "graphopt", "import", "junk.pt2", "-o", "m.onnx"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read `junk.pt2`")


def test_an_output_name_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`x` is that of an input"):
        graphopt.from_torch(Crossed().eval(), (ROWS,), output_names=["x", "y"])
    doubled, raised = run(graphopt.from_torch(Crossed().eval(), (ROWS,)), tmp_path / "m.onnx", ROWS)
    np.testing.assert_array_equal(doubled, 2 * ROWS.numpy())
    np.testing.assert_array_equal(raised, 1 + ROWS.numpy())


def test_axes_have_their_names_beside_an_input_that_is_no_tensor() -> None:
    axes = {"x": {0: "rows"}, "scale": None, "more": ("lines", None)}
    model = graphopt.from_torch(
        Scaled().eval(), (ROWS,), {"scale": 2.0, "more": THREE}, dynamic_shapes=axes, input_names=["first", "second"]
    )
    shapes = {value.name: [str(dim) for dim in value.shape or ()] for value in model.graph.inputs}
    assert shapes == {"first": ["rows", str(WIDTH)], "second": ["lines", str(WIDTH)]}
    (joined,) = model.graph.outputs
    assert joined.shape is not None
    assert {"rows", "lines"} <= set(re.findall(r"\w+", str(joined.shape[0])))


def test_examples_of_one_size_are_taken_for_one_axis() -> None:
    """So does torch; the hint says so."""
    axes = {"x": {0: "rows"}, "more": {0: "lines"}, "scale": None}
    with pytest.raises(ModelError, match="`lines` free") as caught:
        graphopt.from_torch(Scaled().eval(), (ROWS,), {"more": ROWS, "scale": 2.0}, dynamic_shapes=axes)
    assert "examples of different sizes" in (caught.value.hint or "")


def test_a_dict_may_come_last() -> None:
    model = graphopt.from_torch(Nested().eval(), ([ROWS, ROWS], {"scale": ROWS}))
    assert len(model.graph.inputs) == 3
    assert len(model.graph.outputs) == 1


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (Silent(), {}, "returns no tensor"),
        (InPython(), {}, r"in Python by what tensors hold \(test_torch_import\.py, line \d+\)"),
        (Unknown(), {}, "`prims::bessel_j0` has no counterpart in ONNX"),
        (Fixed(), {"dynamic_shapes": {"x": {0: torch.export.Dim("batch")}}}, "dimension `batch`"),
        (Fixed(), {"dynamic_shapes": {"x": {0: "batch"}}}, "does not fit the module"),
        (nn.Linear(3, 3), {}, "torch cannot export the module"),
    ],
)
def test_what_cannot_be_exported_is_said_in_words(module: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        graphopt.from_torch(module.eval(), (ROWS,), **options)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (nn.Linear(WIDTH, 3).train(), {}, "training mode"),
        (lambda x: x, {}, "is no model of PyTorch"),
        (nn.Linear(WIDTH, 3).eval(), {"opset": 11}, "opset 11"),
        (nn.Linear(WIDTH, 3).eval(), {"opset": True}, "opset True"),
        (nn.Linear(WIDTH, 3).eval(), {"output_names": ["a", "b"]}, "2 names for 1 outputs"),
    ],
)
def test_mistakes_are_found_first(module: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        graphopt.from_torch(module, (ROWS,), **options)
    assert caught.value.hint


def test_without_torch_the_error_says_what_to_install() -> None:
    program = """
import sys
sys.modules["torch"] = None
import graphopt
try:
    graphopt.from_torch(None)
except graphopt.GraphoptError as error:
    print(error.hint)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "pip install 'graphopt[torch]'", done.stderr


# The command line


FACTORY = """
import torch
from torch import nn

def classifier(width=8, kind="plain"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 4), nn.ReLU()).eval(), (torch.ones(2, width),)

def alone():
    return nn.Linear(2, 2).eval()

def training():
    return nn.Linear(2, 2), (torch.ones(2, 2),)

def broken():
    raise RuntimeError("no weights")

def narrow():
    return nn.Linear(8, 4).to(torch.bfloat16).eval(), (torch.ones(2, 8, dtype=torch.bfloat16),)

def unfit():
    return nn.Linear(2, 2).eval(), (torch.ones(2, 3),)
"""


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("factory") / "made.py"
    path.write_text(FACTORY)
    return path


def command(*words: object) -> Any:
    from graphopt.cli import app

    return CliRunner().invoke(app, ["import", *map(str, words)])


def test_command_writes_what_the_module_computes(factory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done = command(f"{factory}:classifier", "-o", out, "--arg", "width=6", "--dynamic", "input=batch", "--outputs", "y")
    assert done.exit_code == 0, done.output
    assert "within tolerance" in done.output or "equal" in done.output
    assert f"wrote {out}" in done.output
    model = graphopt.load(out)
    assert [str(dim) for dim in model.graph.inputs[0].shape or ()] == ["batch", "6"]
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_exported_file_is_taken(tmp_path: Path) -> None:
    file, out = tmp_path / "m.pt2", tmp_path / "out.onnx"
    torch.export.save(torch.export.export(Feed().eval(), (ROWS,)), file)
    found = import_module(str(file), out, raw=True)
    assert found.files == (out,)
    assert found.nodes == found.exported_nodes
    assert found.as_dict()["inputs"] == {"x": [2, WIDTH]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["classifier", "--arg", "height=3"], "unexpected keyword argument"),
        (["classifier", "--arg", "3"], "gives no argument a value"),
        (["classifier", "--dynamic", "x=batch"], "names input `x`"),
        (["classifier", "--dynamic", "input=batch,-,more"], "names 3 axes of `input`"),
        (["classifier", "--dynamic", "input"], "names no axes"),
        (["classifier", "--outputs", "a,a"], "or one twice"),
        (["alone"], "a module without example inputs"),
        (["training"], "in training mode"),
        (["broken"], "RuntimeError: no weights"),
        (["unfit"], "fails on its example inputs"),
        (["clasifier"], "has no function"),
    ],
)
def test_mistakes_at_the_command_line(words: list[str], said: str, factory: Path, tmp_path: Path) -> None:
    done = command(f"{factory}:{words[0]}", "-o", tmp_path / "out.onnx", *words[1:])
    assert isinstance(done.exception, GraphoptError), done.output
    assert said in done.exception.message
    assert done.exception.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["classifier", "no.such.module:f", "missing.py:f", "missing.pt2"])
def test_sources_that_are_none(source: str, tmp_path: Path) -> None:
    with pytest.raises(GraphoptError) as caught:
        import_module(source, tmp_path / "out.onnx")
    assert caught.value.hint


def test_folder_of_the_output_is_looked_at_before_any_work(factory: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        import_module(f"{factory}:broken", tmp_path / "none" / "out.onnx")


def test_backend_that_lacks_a_type_is_one_to_choose_another_for(factory: Path, tmp_path: Path) -> None:
    refused = command(f"{factory}:narrow", "-o", tmp_path / "out.onnx")
    assert refused.exit_code != 0
    assert "--backend torch" in getattr(refused.exception, "hint", "") + refused.output
    assert not list(tmp_path.iterdir())
    imported = import_module(f"{factory}:narrow", tmp_path / "out.onnx", backend="torch")
    assert imported.files


def test_model_that_computes_something_else_is_not_written(
    factory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any, **__: Any) -> graphopt.ir.Model:
        with torch.no_grad():
            other = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU()).eval()
            other[0].bias.fill_(3.0)
        return graphopt.from_torch(other, (torch.ones(2, WIDTH),))

    monkeypatch.setattr("graphopt.importing.from_torch", wrong)
    with pytest.raises(VerificationError, match="differs from the module"):
        import_module(f"{factory}:classifier", tmp_path / "out.onnx", raw=True)
    assert not list(tmp_path.iterdir())


def test_arguments_and_axes_are_read() -> None:
    assert parse_arguments(["width=64", "kind=plain", "sizes=(1,2)"]) == {"width": 64, "kind": "plain", "sizes": (1, 2)}
    assert parse_axes(["ids=batch,tokens", "image=batch,-,h"]) == {
        "ids": {0: "batch", 1: "tokens"},
        "image": {0: "batch", 2: "h"},
    }
    given = Given(Pair().eval(), (ROWS,), {"b": ROWS})
    assert all_inputs(given, {"b": {0: "batch"}}) == {"a": None, "b": {0: "batch"}}
    assert all_inputs(given, {}) is None
    for inputs, said in ((([ROWS, ROWS], {}), "`rows`, which is no tensor"), ((ROWS, {}), "names 3 axes of `rows`")):
        with pytest.raises(UsageError, match=said):
            all_inputs(Given(Nested().eval(), inputs), {"rows": {2: "batch"}})
