"""Time and memory of rounding a large model's weights to int4, beside ONNX Runtime's own tool.

    python benchmarks/int4.py MODEL [--peer PYTHON] [--rounds N]

MODEL should be in canonical form (`graphopt optimize MODEL --passes simplify`): the tool leaves weights that are behind
a Transpose. Each run is a process of its own, and the runs take turns. Seconds are from after the imports to the file
written; memory is the peak resident size of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_MEASURE = """
import json, resource, sys, time
{imports}
source, target = sys.argv[1:]
start, used = time.perf_counter(), time.process_time()
{work}
print(json.dumps({{
    "seconds": time.perf_counter() - start,
    "cpu_seconds": time.process_time() - used,
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}}))
"""
_OURS = _MEASURE.format(
    imports="""
import numpy, onnx_ir
import graphopt
from graphopt.authoring import Context
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.passes.lossy.quant import Quant
from graphopt.rewriter import Rewriter
""",
    work="""
model = graphopt.load(source)
ctx = Context(model, Rewriter(model), TARGETS["ort-cpu-x86"], OnnxRuntime())
Quant(mode="weights", weights="int4", group="32", solver="rtn").run(model, ctx)
graphopt.save(model, target)
""",
)
_COMMAND = _MEASURE.format(
    imports="import numpy, onnx_ir, graphopt",
    work="""
passes = "quant:mode=weights:weights=int4:group=32:solver=rtn"
graphopt.optimize(source, passes, target="ort-cpu-x86", verify="off", output=target)
""",
)
_PEER = _MEASURE.format(
    imports="""
import logging
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
logging.disable(logging.CRITICAL)
""",
    work="""
tool = MatMulNBitsQuantizer(source, block_size=32, is_symmetric=True, accuracy_level=4)
tool.process()
tool.model.save_model_to_file(target, True)
""",
)


def main() -> None:
    """Run the tools in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", default=sys.executable, help="a Python that has onnxruntime.quantization")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tools = {
        "graphopt, the pass": (sys.executable, _OURS),
        "graphopt, the command": (sys.executable, _COMMAND),
        "MatMulNBitsQuantizer": (options.peer, _PEER),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in tools}
    sizes: dict[str, int] = {}
    for _ in range(options.rounds):
        for name, (python, script) in tools.items():
            with tempfile.TemporaryDirectory() as folder:
                command = [python, "-c", script, str(options.model), str(Path(folder) / "out.onnx")]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
                sizes[name] = sum(file.stat().st_size for file in Path(folder).iterdir())
    print("| tool | seconds | CPU seconds | peak MB | file MB |\n|---|---|---|---|---|")
    for name, found in runs.items():
        seconds, cpu, peak = (statistics.median(one[key] for one in found) for key in found[0])
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} | {peak:.0f} | {sizes[name] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
