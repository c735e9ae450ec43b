"""Clean-up passes beyond their golden files: what cannot be a golden file, and random Loops and Scans."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt import provenance
from graphopt.comparison import Comparison
from graphopt.model_io import load
from graphopt.passes.analyses.tensor_content import equal_tensors
from graphopt.passes.exact import inline_functions
from graphopt.verify import Signature, verify

from .pass_runs import PassRun, loaded, outputs_of, run_passes

CLEAN_UP = "inline-functions,control-flow,hoist,common-subexpressions,merge-initializers,dead-code"
RANDOM_MODELS = 25
DEEP = 3000


def run_text(text: str, passes: str) -> PassRun:
    return run_verified(onnx.parser.parse_model(text), passes)


def run_verified(proto: onnx.ModelProto, passes: str) -> PassRun:
    """Run passes and check the structure of what they made."""
    model = loaded(proto)
    signature = Signature.of(model)
    run = run_passes(model, passes)
    verify(run.model, signature, provenance_too=True)
    return run


def operators(run: PassRun) -> list[str]:
    return [node.op_type for node in run.model.graph]


# Functions

CALL = """
<ir_version: 8, opset_import: ["" : 18, "f" : 1]>
g (float[2,3] x) => (float[2,3] y) { y = f.F(x) }
"""


def test_a_function_of_another_opset_is_kept_where_an_operator_differs() -> None:
    body = '<domain: "f", opset_import: ["" : 12]> F (x) => (y) { y = Softmax(x) }'
    run = run_text(CALL + body, "inline-functions")
    assert not run.edits
    assert run.remarks == ["`F` is not inlined: `Softmax` is that of opset 12, in the model that of 18"]


def test_functions_that_call_each_other_are_kept() -> None:
    bodies = """
    <domain: "f", opset_import: ["" : 18, "f" : 1]> F (x) => (y) { y = f.G(x) }
    <domain: "f", opset_import: ["" : 18, "f" : 1]> G (x) => (y) { y = f.F(x) }
    """
    run = run_text(CALL + bodies, "inline-functions")
    assert not run.edits
    assert all("calls itself, or a function that does" in remark for remark in run.remarks)


def test_functions_that_would_become_too_many_nodes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline_functions, "LARGEST_RESULT", 1000)
    doubled = "".join(
        f'<domain: "f", opset_import: ["" : 18, "f" : 1]> F{i} (x) => (y) {{ a = f.F{i + 1}(x) y = f.F{i + 1}(a) }}\n'
        for i in range(10)
    )
    last = '<domain: "f", opset_import: ["" : 18]> F10 (x) => (y) { y = Neg(x) }'
    run = run_text(CALL.replace("F(x)", "F0(x)") + doubled + last, "inline-functions")
    assert not run.edits
    assert run.remarks == [f"functions are not inlined: they would make {2**10} nodes"]


def test_a_large_constant_of_a_function_is_stored_once() -> None:
    numbers = ", ".join(str(n) for n in range(2000))
    text = CALL.replace("[2,3]", "[2000]").replace("y = f.F(x)", "a = f.F(x) y = f.F(a)")
    constant = f"k = Constant <value_floats = [{numbers}]> ()"
    body = f'<domain: "f", opset_import: ["" : 18]> F (x) => (y) {{ {constant} y = Mul(x, k) }}'
    run = run_text(text + body, "inline-functions")
    assert operators(run) == ["Mul", "Mul"]
    assert len(run.model.graph.initializers) == 1


def test_an_input_handed_on_by_a_function_is_the_argument() -> None:
    body = '<domain: "f", opset_import: ["" : 18]> F (x) => (x) { unused = Neg(x) }'
    run = run_text(CALL + body, "inline-functions,dead-code")
    assert operators(run) == ["Identity"]


def test_an_input_handed_on_that_is_left_out_keeps_the_call() -> None:
    text = CALL.replace("y = f.F(x)", "y, z = f.F(x, )").replace("float[2,3] y)", "float[2,3] y, float[2,3] z)")
    body = '<domain: "f", opset_import: ["" : 18]> F (x, w) => (y, w) { y = Neg(x) }'
    run = run_text(text + body, "inline-functions")
    assert not run.edits


# Tensors


class Unreadable(ir.LazyTensor):
    """A tensor that must not be read."""

    def __init__(self, *shape: int) -> None:
        super().__init__(self.refuse, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name="unreadable")

    def refuse(self) -> ir.Tensor:
        raise AssertionError("read")


def test_tensors_that_must_be_made_are_not_read_for_comparison() -> None:
    huge = Unreadable(1 << 20)
    assert equal_tensors([huge, Unreadable(1 << 20)]) == []
    assert equal_tensors([huge, Unreadable(1 << 20), huge]) == [[0, 2]]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.bool_])
def test_tensors_are_equal_by_all_their_bytes(dtype: type) -> None:
    first = np.zeros(5000, dtype)
    last = first.copy()
    last[-1] = 1
    tensors = [ir.tensor(array) for array in (first, last, first.copy(), last.copy(), first.reshape(5000))]
    assert equal_tensors(tensors) == [[0, 2, 4], [1, 3]]
    assert equal_tensors(tensors) == [[0, 2, 4], [1, 3]], "and again, from what was learned"


def test_zeros_of_different_sign_and_strings_are_not_merged() -> None:
    assert equal_tensors([ir.tensor(np.float32([0.0])), ir.tensor(np.float32([-0.0]))]) == []
    assert equal_tensors([ir.tensor(["a"]), ir.tensor(["a"])]) == []


def test_weights_in_a_file_are_merged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    same, other = (rng.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    begins_alike = same.copy()
    begins_alike[-1, -1] += 1
    weights = {"a": same, "b": other, "c": same.copy(), "d": begins_alike}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Sum", list(weights), ["y"])],
        "g",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [64, 64])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    provenance.stamp(model)
    assert len(run_passes(model, "merge-initializers").edits) == 1
    assert [value.name for value in model.graph.node(0).inputs] == ["a", "b", "a", "d"]
    assert list(model.graph.initializers) == ["a", "b", "d"]


# Size


@pytest.mark.parametrize("passes", CLEAN_UP.split(","))
def test_long_chains_need_no_recursion(passes: str) -> None:
    chain = " ".join(f"t{i + 1} = {('Neg', 'Abs')[i % 2]}(t{i})" for i in range(DEEP))
    text = f"""
    <ir_version: 8, opset_import: ["" : 18]>
    g (float[2] t0) => (float[2] y, float[2] z) <bool c = {{1}}> {{
      y = If(c) <
        then_branch = t () => (float[2] t{DEEP}) {{ {chain} }},
        else_branch = e () => (float[2] q) {{ q = Neg(t0) }}>
      z = Neg(t0)
    }}
    """
    run = run_text(text, passes)
    assert bool(run.edits) == (passes == "control-flow")


# Random Loops and Scans


class RandomIteration:
    """Writes a model around one Loop or Scan whose values depend on one another at random."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.states = [f"s{i}" for i in range(self.rng.randint(1, 4))]
        self.collected = [f"k{i}" for i in range(self.rng.randint(0, 3))]
        self.is_loop = self.rng.random() < 0.6
        self.elements = [] if self.is_loop else [f"e{i}" for i in range(self.rng.randint(1, 2))]

    def body(self) -> str:
        lines, values = [], [*self.states, *self.elements, "x", "w", "h"]
        for index in range(self.rng.randint(2, 8)):
            op = self.rng.choice(("Add", "Sub", "Mul"))
            one, other = self.rng.choice(values), self.rng.choice(values)
            lines.append(f"v{index} = {op}({one}, {other})")
            values.append(f"v{index}")
        ends = [f"{name}_next" for name in self.states] + self.collected
        lines += [f"{end} = Tanh({self.rng.choice(values)})" for end in ends]
        if self.is_loop:
            lines.append(
                self.rng.choice(("go = Identity(more)", "go = Constant <value = bool {0}> ()", "go = Not(more)"))
            )
        inputs = ["int64 number", "bool more"] * self.is_loop + [f"float[2] {n}" for n in self.states + self.elements]
        outputs = ["bool go"] * self.is_loop + [f"float[2] {end}" for end in ends]
        signature = f"b ({', '.join(inputs)}) => ({', '.join(outputs)})"
        return f"body = {signature} <float[2] h = {{0.5, 2}}> {{ {' '.join(lines)} }}"

    def text(self) -> str:
        outs = [f"{name}_end" for name in self.states] + [f"{name}_all" for name in self.collected]
        read = self.rng.sample(outs, self.rng.randint(1, len(outs)))
        rank_two = [name for name in read if name.endswith("_all")]
        declared = [f"float[{'L,' if name in rank_two else ''}2] {name}" for name in read]
        starts = [self.rng.choice(("x", "w")) for _ in self.states]
        if self.is_loop:
            limit = self.rng.choice(("n", "zero", "one", "three"))
            node = f"Loop({limit}, {self.rng.choice(('', 'yes', 'no', 'fed'))}, {', '.join(starts)}) <{self.body()}>"
        else:
            rows = ["rows" for _ in self.elements]
            node = f"Scan <num_scan_inputs = {len(rows)}, {self.body()}> ({', '.join([*starts, *rows])})"
        count = self.rng.choice((1, 3))
        return f"""
        <ir_version: 8, opset_import: ["" : {self.rng.choice((11, 13, 18))}]>
        g (float[2] x, float[{count},2] rows, int64 n, bool fed) => ({", ".join(declared)})
        <float[2] w = {{1, -1}}, int64 zero = {{0}}, int64 one = {{1}}, int64 three = {{3}}, bool yes = {{1}},
         bool no = {{0}}>
        {{ {", ".join(outs)} = {node} }}
        """


@pytest.mark.parametrize("passes", ["dead-code", "hoist", "control-flow", CLEAN_UP])
def test_random_loops_and_scans_give_the_same(passes: str) -> None:
    edited = 0
    for seed in range(RANDOM_MODELS):
        proto = onnx.parser.parse_model(RandomIteration(seed).text())
        onnx.checker.check_model(proto)
        run = run_verified(proto, passes)
        edited += bool(run.edits)
        rng = np.random.default_rng(seed)
        rows = proto.graph.input[1].type.tensor_type.shape.dim[0].dim_value
        for n, fed in ((2, True), (0, True), (3, False)):
            x, table = (rng.standard_normal(shape).astype(np.float32) for shape in ((2,), (rows, 2)))
            feed = {"x": x, "rows": table, "n": np.array(n), "fed": np.array(fed)}
            feed = {info.name: feed[info.name] for info in proto.graph.input}
            comparison = Comparison()
            comparison.update(outputs_of(proto, feed), outputs_of(run.model, feed))
            assert comparison.equal, f"seed {seed}: {comparison.worst}"
    assert edited > RANDOM_MODELS // 4
