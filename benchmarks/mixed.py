"""Sensitivity and mixed precision on real models: predicted beside measured, layers kept, budgets held, seconds.

    python benchmarks/mixed.py sensitivity|hard|language [NAME ...] [--samples 64]

Prints Markdown tables. `sensitivity`: Spearman's rank correlation of predicted and measured cost of layers. `hard`: a
channel between two convolutions is scaled a thousandfold, and back by the second, which leaves the function as it is
and ruins int8; the budget is then held with the fewest layers in float. `language`: int4 weights with the fewest bytes
more that hold a budget on perplexity, scored by the scorer beside the model. Models and data come from the assets
folder (``GRAPHOPT_SHARED``); calibration samples are never among the scored ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
from real_models import calibration, load_scorer

import graphopt

SENSITIVITY = {
    "digits": "quant:mode=static",
    "resnet20": "quant:mode=static",
    "mobilenet": "quant:mode=static",
    "squeezenet": "quant:mode=static",
    "gutenberg_lm": "quant:mode=weights:weights=int4:group=32:solver=rtn",
}
HARD = {"digits": "kl=0.002", "resnet20": "kl=0.002", "squeezenet": "kl=0.02"}
LANGUAGE = {
    "stories_lm": ("perplexity=0.5%", "perplexity=2%"),
    "gutenberg_lm": ("perplexity=0.25%", "perplexity=0.5%"),
}
INT4 = "mode=weights:weights=int4:group=32:solver=rtn"
# The outlier: what int8 leaves of any other channel is then less than one code.
FACTOR = 1000.0
SAMPLES = 64
THREADS = 2


def main() -> None:
    """Print the table that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sensitivity", "hard", "language"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    options = parser.parse_args()
    tables = {"sensitivity": (SENSITIVITY, sensitivity), "hard": (HARD, hard), "language": (LANGUAGE, language)}
    known, table = tables[options.what]
    table(load_scorer(), [name for name in known if not options.names or name in options.names], options.samples)


def sensitivity(scorer: ModuleType, names: list[str], samples: int) -> None:
    """Print how well the predicted order of layers is the measured one."""
    print("| model | pass | layers | left | Spearman | KL, all layers | most sensitive | s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        start = time.perf_counter()
        data = calibration(scorer, name, samples)
        found = graphopt.sensitivity(
            file_of(scorer, name), SENSITIVITY[name], data=data, metric="kl", samples=samples, threads=THREADS
        )
        rank = "–" if found.rank_correlation is None else f"{found.rank_correlation:.2f}"
        worst = found.rows[0]
        print(
            f"| {name} | `{SENSITIVITY[name]}` | {len(found.rows)} | {len(found.left)} | {rank} "
            f"| {found.whole.divergence:.2g} | {worst.name} ({worst.cost:.2g}) | {time.perf_counter() - start:.0f} |",
            flush=True,
        )


def hard(scorer: ModuleType, names: list[str], samples: int) -> None:
    """Print how many layers the budget needs on models made hard, scored as the scorer does."""
    print("| model made hard | budget | int8 throughout | mixed | layers kept | score, fp32 → int8 → mixed | s |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        data = calibration(scorer, name, samples)
        with tempfile.TemporaryDirectory() as folder:
            source, plain, output = (Path(folder) / f"{kind}.onnx" for kind in ("hard", "plain", "mixed"))
            graphopt.save(made_hard(file_of(scorer, name)), source)
            common: dict[str, Any] = {"data": data, "metric": "kl", "threads": THREADS}
            throughout = graphopt.optimize(source, "quant:mode=static", output=plain, **common).report
            start = time.perf_counter()
            report = graphopt.optimize(
                source, "mixed-quant:mode=static", output=output, budget=HARD[name], **common
            ).report
            seconds = time.perf_counter() - start
            scores = [next(iter(scorer.ASSETS[name][1](file).values())) for file in (source, plain, output)]
        assert throughout.after is not None
        assert report.after is not None
        print(
            f"| {name} | {HARD[name]} | KL {throughout.after.metrics['kl']:.2g} | KL {report.after.metrics['kl']:.2g} "
            f"| {kept(report)} | {' → '.join(f'{score:.4f}' for score in scores)} | {seconds:.0f} |",
            flush=True,
        )


def language(scorer: ModuleType, names: list[str], samples: int) -> None:
    """Print what a budget on perplexity costs in bytes."""
    print("| model | pass | budget | perplexity | bytes | layers higher | s |\n|---|---|---|---|---|---|---|")
    for name in names:
        source, data = file_of(scorer, name), calibration(scorer, name, samples)
        score = scorer.ASSETS[name][1]
        print(f"| {name} | float | | {score(source)['perplexity']:.3f} | {source.stat().st_size:,} | | |", flush=True)
        runs = [(f"quant:{INT4}", ()), *((f"mixed-quant:{INT4}:higher=int8+float", one) for one in LANGUAGE[name])]
        for passes, budget in runs:
            with tempfile.TemporaryDirectory() as folder:
                output, start = Path(folder) / "out.onnx", time.perf_counter()
                # Chosen on all of the samples: what counts is scored below, on others.
                report = graphopt.optimize(
                    source, passes, output=output, data=data, evaluation=data, budget=budget, threads=THREADS
                ).report
                seconds, got = time.perf_counter() - start, score(output)["perplexity"]
                print(
                    f"| {name} | `{passes}` | {budget or ''} | {got:.3f} | {output.stat().st_size:,} | {kept(report)} "
                    f"| {seconds:.0f} |",
                    flush=True,
                )


def file_of(scorer: ModuleType, name: str) -> Path:
    """Return a model's file."""
    return Path(scorer.HERE) / "models" / str(scorer.ASSETS[name][0])


def kept(report: Any) -> str:
    """Return how many layers are in more bits, of how many, and which."""
    for step in report.steps:
        for note in step.notes:
            if "kept" in note.facts:
                chosen = [f"{one['layer']} ({one['in']})" for one in note.facts["kept"]]
                shown = ", ".join(chosen[:3]) + (", …" if len(chosen) > 3 else "")
                return f"{len(chosen)} of {note.facts['layers']}: {shown}"
    return ""


def made_hard(source: Path) -> ir.Model:
    """Return a simplified model with an outlier channel between two of its convolutions, halfway through."""
    model = graphopt.optimize(source, "simplify", verify="off").model
    pairs = [(node, after) for node in model.graph if (after := _convolution_after(node)) is not None]
    first, second = pairs[len(pairs) // 2]
    channel = int(np.abs(_array(first, 1)).sum(axis=(1, 2, 3)).argmax())
    _scale(first, 1, np.s_[channel], FACTOR)
    if len(first.inputs) > 2:
        _scale(first, 2, np.s_[channel], FACTOR)
    _scale(second, 1, np.s_[:, channel], 1 / FACTOR)
    return model


def _convolution_after(node: ir.Node) -> ir.Node | None:
    """Return the one convolution, not in groups, that reads a convolution through a Relu alone."""
    relu = _only_reader(node) if node.op_type == "Conv" else None
    after = _only_reader(relu) if relu is not None and relu.op_type == "Relu" else None
    if after is None or after.op_type != "Conv" or after.attributes.get_int("group", 1) != 1:
        return None
    return after


def _only_reader(node: ir.Node) -> ir.Node | None:
    readers = {use.node for use in node.outputs[0].uses()}
    return readers.pop() if len(readers) == 1 and not node.outputs[0].is_graph_output() else None


def _array(node: ir.Node, index: int) -> np.ndarray[Any, Any]:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy()).copy()


def _scale(node: ir.Node, index: int, where: Any, factor: float) -> None:
    array, value = _array(node, index), node.inputs[index]
    assert value is not None
    array[where] *= np.float32(factor)
    value.const_value = ir.tensor(array, name=value.name)


if __name__ == "__main__":
    main()
