"""`explain`: which operators of a model a target runs in integers, through which kernels, and why not the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Inspectable
from graphopt.choices import ModelLike, find_backend, find_target, open_model
from graphopt.data import open_data
from graphopt.errors import BackendError, DataError
from graphopt.explaining.advice import better_in_float, constant_factor, has_made_weight, made_of_constants
from graphopt.explaining.codes import captured_behind_moves, is_dequantize, is_quantize
from graphopt.explaining.proof import Proof, Ran, numbered, prove
from graphopt.explaining.rules import Prediction, predict
from graphopt.generated import generated_feeds
from graphopt.progress import Display
from graphopt.shapes import infer_shapes
from graphopt.target import Target

RUNS = 5
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

Outcome = Literal["integers", "weights", "absorbed", "float", "gone"]


@dataclass(frozen=True)
class Finding:
    """What becomes of one operator.

    Attributes:
        node: Its name.
        op: Its operator.
        state: What ran, or is expected to where nothing was run: ``integers``: it computes on codes; ``weights``: it
            reads codes of weights and computes in float; ``absorbed``: the Q behind it does its work; ``float``;
            ``gone``: the runtime folded it, or it did nothing.
        kernel: The kernel.
        why: Why it is in float, or nothing.
        fix: What would help.
        remark: What is wrong with it although it is in integers, or nothing.
        predicted: The state expected by the target's rules.
        predicted_kernel: The kernel expected.
        milliseconds: Of a run, or None where nothing was run.
    """

    node: str
    op: str
    state: Outcome
    kernel: str
    why: str
    fix: str
    remark: str
    predicted: Outcome
    predicted_kernel: str
    milliseconds: float | None

    @property
    def in_integers(self) -> bool:
        """Whether it does without floats where it matters."""
        return self.state in ("integers", "weights", "absorbed")

    @property
    def agrees(self) -> bool | None:
        """Whether it ran as predicted; None where it did not run, or was gone before it could."""
        return None if self.milliseconds is None or self.state == "gone" else self.state == self.predicted


@dataclass(frozen=True)
class Explanation:
    """What becomes of the operators of a model on a target.

    Attributes:
        target: The target.
        proven_by: The backend that ran the model, or None.
        unproven: Why it was not run, or nothing.
        inputs: What it ran on, or None.
        findings: Each operator that is quantized or could be, in graph order.
        quantizable: Where nothing is quantized: operators that could be, and the kernels they would run as.
        milliseconds: Of a run of the whole model, or None.
        conversions: Q and DQ left when it runs, or None.
        conversion_milliseconds: Their share of the time, or None.
        parts: Kernels and milliseconds of each part of the runtime that ran some: its execution providers.
        in_functions: Operators in bodies of functions, which were not looked at.
    """

    target: str
    proven_by: str | None
    unproven: str
    inputs: str | None
    findings: tuple[Finding, ...]
    quantizable: tuple[tuple[str, str, int], ...]
    milliseconds: float | None
    conversions: int | None
    conversion_milliseconds: float | None
    parts: Mapping[str, tuple[int, float]]
    in_functions: int

    @property
    def agreement(self) -> tuple[int, int] | None:
        """How many operators ran as predicted, of how many; None where nothing was run."""
        judged = [one.agrees for one in self.findings if one.agrees is not None]
        return (sum(judged), len(judged)) if self.proven_by is not None else None

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        values = asdict(self) | {"findings": [asdict(one) | {"agrees": one.agrees} for one in self.findings]}
        ops = [{"op": op, "kernel": kernel, "count": count} for op, kernel, count in self.quantizable]
        right, judged = self.agreement or (None, None)
        parts = {name: {"kernels": count, "milliseconds": time} for name, (count, time) in self.parts.items()}
        return values | {"quantizable": ops, "parts": parts, "agreement": {"as_predicted": right, "of": judged}}


def explain(
    model: ModelLike,
    *,
    target: str | None = None,
    data: Any = None,
    backend: str | None = None,
    threads: int = 0,
    seed: int = 0,
    runs: int = RUNS,
    progress: bool = False,
) -> Explanation:
    """Say of each operator whether a target runs it in integers; prove it where the target can run here.

    Args:
        model: A quantized model in any form: Q and DQ, integer operators, dynamic or weight-only; or a float one.
        target: Name of the target; where None, this machine's CPU.
        data: Samples to run on, as for `optimize`; made-up inputs where None.
        backend: Backend text; the target's own where None.
        threads: Threads for the backend; 0 leaves it to the runtime.
        seed: Seed of made-up inputs.
        runs: Runs whose times are averaged.
        progress: Show progress on stderr.

    Raises:
        UsageError: The target or backend is unknown.
        ModelError: The file cannot be loaded.
        DataError: The data does not fit the model.
    """
    found = find_target(target)
    opened = open_model(model)
    inferred = opened.clone()
    infer_shapes(inferred)
    predictions = predict(inferred, found)
    feeds, inputs, why = _feeds(opened, data, seed)
    proof, proven_by = None, None
    if feeds is not None:
        with Display(progress).stage("running"):
            proof, proven_by, why = _prove(opened, found, backend, feeds, threads, runs)
    numbers = {id(node): number for number, node in enumerate(numbered(inferred))}
    findings = tuple(_finding(one, proof.ran[numbers[id(one.node)]] if proof else None) for one in predictions)
    quantized = any(_is_quantized(node) for node in numbered(inferred)) or any(one.in_integers for one in findings)
    return Explanation(
        target=found.name,
        proven_by=proven_by,
        unproven=why,
        inputs=inputs if proof is not None else None,
        findings=findings,
        quantizable=() if quantized else tuple(_quantizable(inferred, found)),
        milliseconds=proof.milliseconds if proof else None,
        conversions=proof.conversions if proof else None,
        conversion_milliseconds=proof.conversion_milliseconds if proof else None,
        parts=proof.parts if proof else {},
        in_functions=sum(len(function) for function in inferred.functions.values()),
    )


def _feeds(model: ir.Model, data: Any, seed: int) -> tuple[Mapping[str, Array] | None, str | None, str]:
    """Return what to run on and its name, or None and why there is nothing."""
    if data is not None:
        samples = open_data(data, model)
        return next(iter(samples.batches(1))).feeds, f"a sample of `{samples.name}`", ""
    try:
        return generated_feeds(model, seed, sets=1, batch=1)[0], "made-up inputs", ""
    except DataError as error:
        return None, None, f"{error.message}; {error.hint}"


def _prove(
    model: ir.Model, target: Target, backend: str | None, feeds: Mapping[str, Array], threads: int, runs: int
) -> tuple[Proof | None, str | None, str]:
    """Return the proof and what gave it, or why there is none."""
    host = find_target(None)
    if backend is None and _is_another_cpu(target, host):
        return None, None, f"what `{target.name}` stands for cannot run here: this machine is `{host.name}`"
    runtime = find_backend(backend, target, must_run=False)
    missing = runtime.missing()
    if missing is not None:
        return None, None, missing.message
    if captured_behind_moves(model, target.fusions):
        return None, None, "the runtime would end the process: a nested graph reads what a move makes of codes"
    if not isinstance(runtime, Inspectable):
        return None, None, f"backend `{runtime.describe()}` does not tell what it runs"
    try:
        return prove(model.clone(), runtime, feeds, threads=threads, runs=runs), runtime.describe(), ""
    except BackendError as error:
        return None, None, error.message


def _is_another_cpu(target: Target, host: Target) -> bool:
    """Return whether the target's runtime is this machine's own, but what it stands for is not."""
    same_runtime = (target.backend, target.provider) == (host.backend, host.provider)
    return same_runtime and target.fusions != host.fusions


def _finding(prediction: Prediction, ran: Ran | None) -> Finding:
    why, fix, remark = prediction.why, prediction.fix, prediction.remark
    state: Outcome = prediction.state
    if ran is not None:
        # What a Q takes over has no kernel of its own, or is part of one in integers.
        taken_over = prediction.state == "absorbed" and ran.state in (None, "integers")
        state = "absorbed" if taken_over else ran.state or "gone"
        if state == "float" and prediction.state != "float":
            why, fix = "it was not fused, against the rules graphopt knows", "please report the model"
        elif state != "float":
            why, fix = "", ""
    return Finding(
        node=walk.label(prediction.node),
        op=prediction.node.op_type,
        state=state,
        kernel=ran.kernel if ran is not None and state != "absorbed" else prediction.kernel,
        why=why,
        fix=fix,
        remark=remark,
        predicted=prediction.state,
        predicted_kernel=prediction.kernel,
        milliseconds=ran.milliseconds if ran is not None else None,
    )


def _is_quantized(node: ir.Node) -> bool:
    return is_quantize(node) or is_dequantize(node) or node.op_type == "DynamicQuantizeLinear"


def _quantizable(model: ir.Model, target: Target) -> list[tuple[str, str, int]]:
    """Return the operators of a float model that the target could run in integers, with their kernels and counts."""
    kernels = {op: _kernel_of(op, target) for op in sorted(target.integer_ops | target.weight_only_ops)}
    able = (node for node in numbered(model) if _could_be_integer(node, kernels))
    counts = Counter(node.op_type for node in able if better_in_float(node, target, dynamic=False) is None)
    return [(op, kernels[op], count) for op, count in counts.most_common()]


def _kernel_of(op: str, target: Target) -> str:
    rule = target.fusions.of(op) if op in target.integer_ops else None
    if rule is not None:
        return rule.kernel
    weights = target.fusions.weights
    return weights.kernel if weights is not None and op in weights.ops else ""


def _could_be_integer(node: ir.Node, kernels: Mapping[str, str]) -> bool:
    if not walk.is_onnx_op(node, *(op for op, kernel in kernels.items() if kernel)):
        return False
    if node.outputs[0].dtype not in (None, ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return False
    if node.op_type in _PRODUCTS:
        return constant_factor(node) is not None or has_made_weight(node)
    return not made_of_constants(node.outputs[0])  # decodes a weight
