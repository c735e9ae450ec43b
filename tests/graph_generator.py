"""Random valid ONNX models, made of small motifs that optimizers meet, miss or break.

A model is written down as a `Recipe`: an opset, an IR version and a list of steps, each the name of a motif and a seed
of its own. Dropping a step leaves the others as they were, so a failing model shrinks well, and its recipe, which
`build` turns into the same model again, is short enough to paste into a test.

What the metadata of a model says: `motifs` the steps taken, `nondeterministic` that two runs may differ,
`nonfinite` that an output may hold NaN or infinity, `overridable_inputs` the inputs with a default that `feeds` may
replace.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto

from .graph_motifs import FUNCTION_DOMAIN, MOTIFS

# The newest opset that ONNX Runtime 1.31 takes without being asked to, and the newest IR version.
NEWEST_OPSET = min(26, onnx.defs.onnx_opset_version())
NEWEST_IR_VERSION = min(13, onnx.IR_VERSION)
# Opset 10 is here for what opset 11 ended: attributes for the bounds of Clip and the widths of Pad.
OPSETS = range(10, NEWEST_OPSET + 1)
# Version 3 makes every initializer an input as well, 4 ends that and lets an input have a default, 8 brings functions.
IR_VERSIONS = (8, 10, NEWEST_IR_VERSION, 4, 3)

# Feeds lie within these bounds: floats symmetrically, integers where they can index any axis of two or more elements.
LARGEST_FLOAT = 3.0
INTEGER_RANGE = (-2, 1)
# Symbolic sizes are drawn from here.
SIZE_RANGE = (1, 4)
# A value that could be larger than this is squashed before it is used, so that no chain overflows, even in float16.
LARGEST_OPERAND = 50.0
# How often an operand is a new graph input even though a value would fit, and how far back it may lie.
FRESH_SHARE = 0.1
REACH = 8
ODD_NAME_SHARE = 0.15
ODD_NAMES = ("/model/layers.0/{}", "{}:0", "层 {}", "a b {}", "{}.weight")


@dataclass(frozen=True, eq=False)
class Value:
    """A value of the graph: its name and type, how large its numbers may get, and its contents if it is a constant."""

    name: str
    type: onnx.TypeProto
    bound: float = LARGEST_FLOAT
    data: np.ndarray | None = None

    @property
    def dtype(self) -> int:
        return self.type.tensor_type.elem_type

    @property
    def shape(self) -> tuple[int | str | None, ...] | None:
        """Sizes; a string is a symbol, a None unknown; None for an unknown rank."""
        if not self.type.tensor_type.HasField("shape"):
            return None
        kinds = ((dim, dim.WhichOneof("value")) for dim in self.type.tensor_type.shape.dim)
        return tuple(getattr(dim, kind) if kind else None for dim, kind in kinds)

    @property
    def known(self) -> bool:
        """Whether every size is a positive number or a symbol."""
        return self.shape is not None and None not in self.shape and 0 not in self.shape


class Builder:
    """Adds nodes to one graph; a child builds a subgraph, which may capture what its parents hold."""

    def __init__(self, opset: int, ir_version: int, parent: Builder | None = None) -> None:
        self.opset = opset
        self.ir_version = ir_version
        self.parent = parent
        self.root: Builder = parent.root if parent else self
        self.depth: int = parent.depth + 1 if parent else 0
        self.random = random.Random(0)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.offered: list[Value] = []
        self.consumed: set[Value] = set()
        self.functions: dict[str, onnx.FunctionProto] = {}
        self.flags: set[str] = set()
        self.overridable: list[str] = []
        self._names = 0

    @property
    def rng(self) -> random.Random:
        return self.root.random

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def child(self) -> Builder:
        return Builder(self.opset, self.ir_version, self)

    def name(self, hint: str) -> str:
        """Return a name new to this graph and its parents, but the same one in every sibling subgraph."""
        self._names += 1
        name = f"{hint}_{self._names}" if self.depth == 0 else f"sub{self.depth}_{self._names}"
        return self.rng.choice(ODD_NAMES).format(name) if self.chance(ODD_NAME_SHARE) else name

    # Operands

    def pick(
        self,
        dtype: int = TensorProto.FLOAT,
        rank: int | None = None,
        where: Callable[[tuple], bool] = lambda shape: True,
        fresh: Sequence[int | str] | None = None,
    ) -> Value:
        """Return an earlier value that fits and whose numbers are moderate, or a new graph input of shape `fresh`."""
        fits = [
            v
            for v in self.visible()
            if v.dtype == dtype and v.known and (rank is None or len(v.shape) == rank) and where(v.shape)
        ]
        if not fits or self.chance(FRESH_SHARE):
            return self.new_input(dtype, self.random_shape(rank) if fresh is None else fresh)
        value = self.rng.choice(fits[-REACH:])
        self.root.consumed.add(value)
        return self.tame(value)

    def visible(self) -> list[Value]:
        """Return the values that motifs offered here and, for a subgraph, around it, oldest first."""
        return [*self.parent.visible(), *self.offered] if self.parent else list(self.offered)

    def tame(self, value: Value) -> Value:
        """Return the value, through Tanh if its numbers may be large."""
        floating = value.dtype in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
        return self.op("Tanh", value, bound=1.0) if floating and value.bound > LARGEST_OPERAND else value

    def random_shape(self, rank: int | None = None) -> tuple[int | str, ...]:
        rank = self.rng.choice((2, 3, 4, 2, 1, 0)) if rank is None else rank
        batch = self.rng.choice(("batch", 1, 2))
        match rank:
            case 4:
                side = self.rng.choice((5, 6))
                return batch, self.rng.choice((4, 2)), side, side
            case 3:
                return batch, self.rng.choice(("seq", 3)), 4
            case 2:
                return batch, 4
            case _:
                return (4,) * rank

    def new_input(self, dtype: int = TensorProto.FLOAT, shape: Sequence[int | str] = ()) -> Value:
        """Return a new input of the outermost graph."""
        value = Value(self.root.name("x"), onnx.helper.make_tensor_type_proto(dtype, shape))
        self.root.inputs.append(value)
        self.root.offered.append(value)
        self.root.consumed.add(value)
        return value

    def formal(self, type_: onnx.TypeProto, bound: float = LARGEST_FLOAT) -> Value:
        """Return a new input of this subgraph."""
        value = Value(self.name("formal"), type_, bound)
        self.inputs.append(value)
        return value

    # Constants

    def const(self, array: np.ndarray) -> Value:
        """Return a constant: an initializer, here or in the outermost graph, or the output of a Constant node."""
        form = self.rng.choice(("initializer", "initializer", "node", "outer"))
        if form == "node":
            tensor = onnx.numpy_helper.from_array(array)
            return self.op("Constant", bound=_bound(array), data=array, value=tensor)
        return (self.root if form == "outer" or self.ir_version < 4 else self).initializer(array)

    def initializer(self, array: np.ndarray) -> Value:
        """Return a new initializer of this graph, its numbers stored raw or in the field of their type."""
        name = self.name("w")
        tensor = onnx.numpy_helper.from_array(array, name)
        if self.chance(0.3):
            tensor = onnx.helper.make_tensor(name, tensor.data_type, array.shape, array.flatten())
        self.initializers.append(tensor)
        type_ = onnx.helper.make_tensor_type_proto(tensor.data_type, array.shape)
        return Value(name, type_, _bound(array), array)

    def weight(self, *shape: int, dtype: int = TensorProto.FLOAT, between: tuple[float, float] = (-0.5, 0.5)) -> Value:
        """Return a constant of random numbers."""
        numbers = np.random.default_rng(self.rng.getrandbits(32)).uniform(*between, shape)
        return self.const(np.asarray(numbers, onnx.helper.tensor_dtype_to_np_dtype(dtype)))

    def ints(self, numbers: int | Iterable[int]) -> Value:
        """Return an int64 constant."""
        return self.const(np.array(numbers if isinstance(numbers, int) else list(numbers), np.int64))

    # Nodes

    def op(self, op_type: str, *inputs: Value | None, **attributes: object) -> Value:
        """Add a node of one output and return that; see `ops`."""
        [value] = self.ops(op_type, inputs, (True,), **attributes)
        return value

    def ops(
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        outputs: Sequence[bool],
        *,
        types: Sequence[onnx.TypeProto] | None = None,
        as_shape: Sequence[int | str | None] | None = None,
        bound: float | None = None,
        data: np.ndarray | None = None,
        domain: str = "",
        **attributes: object,
    ) -> list[Value]:
        """Add a node and return its outputs, those marked False left empty.

        `types` or `as_shape` say what inference cannot know; `bound` is the largest number of the outputs, by default
        that of the inputs or one.
        """
        present = [value for value in inputs if value is not None]
        self.root.consumed.update(present)
        names = [self.name("t") if wanted else "" for wanted in outputs]
        node = onnx.helper.make_node(
            op_type,
            ["" if value is None else value.name for value in inputs],
            names,
            name=self.name(f"/{op_type}") if self.chance(0.6) else "",
            domain=domain,
            **attributes,
        )
        self.nodes.append(node)
        if types is None:
            inferred = self._infer(node, present)
            types = [inferred[name] for name in names if name]
        if as_shape is not None:
            types = [onnx.helper.make_tensor_type_proto(types[0].tensor_type.elem_type, as_shape)]
        if bound is None:
            bound = max([1.0, *(value.bound for value in present)])
        kept = [name for name in names if name]
        return [Value(name, type_, bound, data) for name, type_ in zip(kept, types, strict=True)]

    def _infer(self, node: onnx.NodeProto, inputs: Sequence[Value]) -> dict[str, onnx.TypeProto]:
        return onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(node.op_type, self.opset, node.domain),
            node,
            {value.name: value.type for value in inputs},
            {value.name: onnx.numpy_helper.from_array(value.data) for value in inputs if value.data is not None},
            opset_imports=[onnx.helper.make_opsetid("", self.opset)],
            ir_version=self.ir_version,
        )

    # Results

    def offer(self, values: Value | Sequence[Value] | None) -> list[Value]:
        """Make a motif's results available to the next ones; what nobody uses becomes a graph output."""
        results = [values] if isinstance(values, Value) else list(values or ())
        self.offered.extend(results)
        return results

    def absorb(self, x: Value, other: Value) -> Value:
        """Return `x` plus the mean of `other`: the shape and type of `x`, but depending on `other`."""
        if not other.known:
            return x
        number = other if other.dtype == x.dtype else self.op("Cast", other, to=x.dtype)
        return self.op("Add", x, self.op("ReduceMean", number, keepdims=0), bound=x.bound + other.bound)

    def graph(self, name: str, outputs: Sequence[Value], inputs: Sequence[Value] | None = None) -> onnx.GraphProto:
        def infos(values: Sequence[Value]) -> list[onnx.ValueInfoProto]:
            return [onnx.helper.make_value_info(value.name, value.type) for value in values]

        inputs = self.inputs if inputs is None else inputs
        return onnx.helper.make_graph(self.nodes, name, infos(inputs), infos(outputs), self.initializers)

    def model(self, annotated: bool) -> onnx.ModelProto:
        """Return the finished model, with the types of the intermediate values if `annotated`."""
        if not self.outputs and all(value in self.consumed for value in self.offered):
            self.outputs.append(self.op("Identity", self.pick()))
        leaves = [value for value in self.offered if value not in self.consumed]
        outputs = list(dict.fromkeys([*self.outputs, *leaves]))
        defaults = [tensor for tensor in self.initializers if self.ir_version < 4 or tensor.name in self.overridable]
        types = [onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims) for tensor in defaults]
        also = [Value(tensor.name, type_) for tensor, type_ in zip(defaults, types, strict=True)]
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        if self.functions:
            opsets.append(onnx.helper.make_opsetid(FUNCTION_DOMAIN, 1))
        model = onnx.helper.make_model(
            self.graph("generated", outputs, [*self.inputs, *also]),
            ir_version=self.ir_version,
            opset_imports=opsets,
            functions=list(self.functions.values()),
        )
        if annotated:
            model = onnx.shape_inference.infer_shapes(model)
        onnx.helper.set_model_props(
            model,
            {"overridable_inputs": json.dumps(self.overridable), **dict.fromkeys(sorted(self.flags), "1")},
        )
        return model


@dataclass(frozen=True)
class Recipe:
    """What a generated model is made from: motifs by name, each with a seed of its own."""

    opset: int
    ir_version: int
    steps: tuple[tuple[str, int], ...]
    annotated: bool = False


def build(recipe: Recipe) -> onnx.ModelProto:
    """Return the model of a recipe; a motif that its opset or IR version lacks is skipped."""
    builder = Builder(recipe.opset, recipe.ir_version)
    taken = []
    for name, seed in recipe.steps:
        motif = MOTIFS[name]
        if recipe.opset not in motif.opsets or recipe.ir_version < motif.since_ir_version:
            continue
        builder.random = random.Random(seed)
        builder.offer(motif.write(builder))
        taken.append(name)
    model = builder.model(recipe.annotated)
    model.metadata_props.add(key="motifs", value=" ".join(taken))
    return model


def random_recipe(seed: int, *, size: int = 12) -> Recipe:
    """Return the recipe of at most `size` steps that belongs to a seed."""
    rng = random.Random(seed)
    names, weights = list(MOTIFS), [motif.weight for motif in MOTIFS.values()]
    steps = rng.choices(names, weights, k=rng.randint(max(1, size // 2), size))
    return Recipe(
        opset=rng.choice(OPSETS),
        ir_version=rng.choices(IR_VERSIONS, (3, 3, 3, 1, 1))[0],
        steps=tuple((name, rng.getrandbits(16)) for name in steps),
        annotated=rng.random() < 0.5,
    )


def random_model(seed: int, *, size: int = 12) -> onnx.ModelProto:
    """Return the model that belongs to a seed."""
    return build(random_recipe(seed, size=size))


def recipes(*, size: int = 12, opsets: Sequence[int] = OPSETS) -> st.SearchStrategy[Recipe]:
    """Return the strategy of all recipes up to a number of steps; prefer it to `models` for what a failure prints."""
    motifs = st.sampled_from([name for name, motif in MOTIFS.items() for _ in range(motif.weight)])
    steps = st.lists(st.tuples(motifs, st.integers(0, 2**16 - 1)), min_size=1, max_size=size)
    return st.builds(Recipe, st.sampled_from(opsets), st.sampled_from(IR_VERSIONS), steps.map(tuple), st.booleans())


def models(*, size: int = 12, opsets: Sequence[int] = OPSETS) -> st.SearchStrategy[onnx.ModelProto]:
    """Return the strategy of all generated models."""
    return st.builds(build, recipes(size=size, opsets=opsets))


def feeds(model: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    """Return numbers for the model's inputs; the same symbol means the same size; half the defaults are replaced."""
    rng = np.random.default_rng(seed)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    initializers = {tensor.name for tensor in model.graph.initializer}
    overridable = json.loads(properties["overridable_inputs"])
    sizes: dict[str, int] = {}
    fed = {}
    for info in model.graph.input:
        if info.name in initializers and not (info.name in overridable and rng.random() < 0.5):
            continue
        dims = info.type.tensor_type.shape.dim
        shape = [
            sizes.setdefault(d.dim_param, int(rng.integers(*SIZE_RANGE))) if d.dim_param else d.dim_value for d in dims
        ]
        fed[info.name] = _numbers(rng, onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type), shape)
    return fed


def _numbers(rng: np.random.Generator, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    if dtype.kind == "b":
        return np.asarray(rng.random(shape) < 0.5)
    if dtype.kind in "iu":
        return np.asarray(rng.integers(*INTEGER_RANGE, shape, dtype, endpoint=True))
    numbers = np.clip(rng.normal(size=shape), -LARGEST_FLOAT, LARGEST_FLOAT)
    exact = np.round(numbers)  # zeros of both signs and small integers, where rewrites differ
    return np.where(rng.random(shape) < 0.1, exact, numbers).astype(dtype)


def _bound(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0)) if array.dtype.kind in "fiu" else 1.0
