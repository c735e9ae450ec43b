"""What runs in the interpreter of the other quantizers: quantize one model with one of them, or time files on OpenVINO.

    PEERS/bin/python benchmarks/quant_peers.py make TOOL MODEL DATA.npz OUT
    PEERS/bin/python benchmarks/quant_peers.py time DATA.npz BATCH SECONDS FILE ...

The last line on stdout is JSON: seconds after the imports and peak bytes resident; or the milliseconds of each run of
each file. Imports nothing of graphopt. Each peer runs as its own documentation recommends.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Feeds = dict[str, Array]
# Prepares the model and imports the tool, and returns the work that is timed.
Tool = Callable[[Path, Feeds, Path], Callable[[], None]]

CALIBRATION_BATCH = 8
BLOCK = 32
THREADS = 2
WARM_UP, LEAST_ROUNDS = 3, 15


def ort_static(method: str) -> Tool:
    """Return ONNX Runtime's static quantizer behind its preparation: QDQ, U8 activations, S8 weights by channel."""

    def prepare(model: Path, feeds: Feeds, out: Path) -> Callable[[], None]:
        from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        def work() -> None:
            with tempfile.TemporaryDirectory() as folder:
                prepared = f"{folder}/prepared.onnx"
                try:
                    quant_pre_process(str(model), prepared)
                except Exception:  # its symbolic shape inference fails on some models; its advice is to skip it
                    quant_pre_process(str(model), prepared, skip_symbolic_shape=True)
                quantize_static(
                    prepared,
                    str(out),
                    Reader(feeds),
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    calibrate_method=getattr(CalibrationMethod, method),
                )

        return work

    return prepare


def ort_dynamic(model: Path, feeds: Feeds, out: Path) -> Callable[[], None]:
    """ONNX Runtime's dynamic quantizer, a weight scale for each channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    return lambda: quantize_dynamic(str(model), str(out), weight_type=QuantType.QInt8, per_channel=True)


def ort_nbits(algorithm: str, **settings: Any) -> Tool:
    """Return ONNX Runtime's weight-only quantizer to MatMulNBits of 4 bits."""

    def prepare(model: Path, feeds: Feeds, out: Path) -> Callable[[], None]:
        import onnx
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        if algorithm == "HQQ":
            import torch  # noqa: F401  (else it would be imported while the clock runs)

        def config() -> Any:
            if algorithm == "GPTQ":
                return nbits.GPTQWeightOnlyQuantConfig(calibration_data_reader=Reader(feeds), block_size=BLOCK)
            if algorithm == "HQQ":
                return nbits.HQQWeightOnlyQuantConfig(block_size=BLOCK)
            return nbits.DefaultWeightOnlyQuantConfig(block_size=BLOCK, **settings)

        def work() -> None:
            loaded = onnx.load(model)
            # GPTQ takes its grid from these two; the other algorithms from their configuration.
            tool = nbits.MatMulNBitsQuantizer(loaded, block_size=BLOCK, algo_config=config(), **settings)
            tool.process()
            tool.model.save_model_to_file(str(out), use_external_data_format=model.stat().st_size > 1 << 30)

        return work

    return prepare


def nncf_static(model: Path, feeds: Feeds, out: Path) -> Callable[[], None]:
    """NNCF's post-training quantization of ONNX models, with its fast bias correction."""
    import nncf
    import onnx

    is_transformer = any(feed.ndim == 2 and feed.dtype == np.int64 for feed in feeds.values())
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    samples = list(batches(feeds, 1))

    def work() -> None:
        made = nncf.quantize(
            onnx.load(model),
            nncf.Dataset(samples),
            subset_size=len(samples),
            model_type=kind,
            target_device=nncf.TargetDevice.CPU,
        )
        onnx.save(made, out)

    return work


def nncf_int4(**settings: Any) -> Tool:
    """Return NNCF's weight compression to 4 bits, which fails on a weight behind a Transpose: onnxsim folds these."""

    def prepare(model: Path, feeds: Feeds, out: Path) -> Callable[[], None]:
        import nncf
        import onnx
        import onnxsim

        samples = list(batches(feeds, 1))

        def work() -> None:
            plain, _ = onnxsim.simplify(onnx.load(model))
            data = nncf.Dataset(samples) if settings else None
            made = nncf.compress_weights(
                at_least_opset_21(plain),
                mode=nncf.CompressWeightsMode.INT4_ASYM,
                group_size=BLOCK,
                dataset=data,
                **settings,
            )
            onnx.save(made, out)

        return work

    return prepare


def at_least_opset_21(model: Any) -> Any:
    """Return a model in the opset that has 4-bit integers, which NNCF demands."""
    import onnx

    version = next(one.version for one in model.opset_import if not one.domain)
    return model if version >= 21 else onnx.version_converter.convert_version(model, 21)


def onnxsim_static(model: Path, feeds: Feeds, out: Path) -> Callable[[], None]:
    """onnxsim's static quantization as it comes."""
    import onnx
    import onnxsim

    return lambda: onnx.save(onnxsim.quantize_static(str(model), calibration_data=list(batches(feeds))), out)


def onnxsim_dynamic(model: Path, feeds: Feeds, out: Path) -> Callable[[], None]:
    """onnxsim's dynamic quantization as it comes."""
    import onnx
    import onnxsim

    return lambda: onnx.save(onnxsim.quantize_dynamic(str(model)), out)


def onnxsim_int4(*, gptq: bool) -> Tool:
    """Return onnxsim's symmetric 4-bit weights in blocks of 32, rounded to nearest or by its GPTQ."""

    def prepare(model: Path, feeds: Feeds, out: Path) -> Callable[[], None]:
        import onnx
        import onnxsim

        def work() -> None:
            whole = at_least_opset_21(onnx.load(model))  # below, it returns the model unchanged without a word
            made = onnxsim.quantize_weight_only_int4(whole)
            if gptq:
                made = onnxsim.apply_gptq(whole, made, calibration_data=list(batches(feeds)))
            onnx.save(made, out)

        return work

    return prepare


TOOLS: dict[str, Tool] = {
    "ORT min-max": ort_static("MinMax"),
    "ORT percentile": ort_static("Percentile"),
    "ORT entropy": ort_static("Entropy"),
    "ORT dynamic": ort_dynamic,
    "ORT RTN": ort_nbits("DEFAULT", is_symmetric=False),
    "ORT RTN symmetric": ort_nbits("DEFAULT", is_symmetric=True),
    "ORT HQQ": ort_nbits("HQQ"),
    # Its GPTQ fails with zero points where a row has an odd number of blocks.
    "ORT GPTQ symmetric": ort_nbits("GPTQ", is_symmetric=True),
    "NNCF": nncf_static,
    "NNCF int4": nncf_int4(),
    "NNCF int4 AWQ": nncf_int4(awq=True, scale_estimation=True),
    "onnxsim": onnxsim_static,
    "onnxsim dynamic": onnxsim_dynamic,
    "onnxsim int4": onnxsim_int4(gptq=False),
    "onnxsim int4 GPTQ": onnxsim_int4(gptq=True),
}


def batches(feeds: Feeds, size: int = CALIBRATION_BATCH) -> Iterator[Feeds]:
    """Yield calibration samples in batches."""
    for at in range(0, len(next(iter(feeds.values()))), size):
        yield {key: x[at : at + size] for key, x in feeds.items()}


class Reader:
    """Calibration batches as ONNX Runtime's quantizer reads them: one at a time, None at the end."""

    def __init__(self, feeds: Feeds) -> None:
        self.feeds = feeds
        self.left = batches(feeds)

    def get_next(self) -> Feeds | None:
        """Return the next batch, or None at the end."""
        return next(self.left, None)

    def __iter__(self) -> Iterator[Feeds]:
        return batches(self.feeds)

    def __deepcopy__(self, memo: Any) -> Reader:
        return Reader(self.feeds)

    def __len__(self) -> int:
        return sum(1 for _ in batches(self.feeds))

    def set_range(self, start_index: int, end_index: int) -> None:
        """Read some of the batches only."""
        self.left = iter(list(batches(self.feeds))[start_index:end_index])


def make(tool: str, model: str, data: str, out: str) -> None:
    """Quantize a model and print what that took."""
    logging.disable(logging.WARNING)
    measure(TOOLS[tool](Path(model), dict(np.load(data)), Path(out)))


def measure(work: Callable[[], None]) -> None:
    """Do the work and print the seconds it took and the peak bytes resident."""
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print("\n" + json.dumps([seconds, peak]))


def time_openvino(data: str, batch: str, seconds: str, *files: str) -> None:
    """Time files on OpenVINO in turn, round by round, and print the milliseconds of each run of each file.

    A file that does not compile, or run, gets its error's first line instead.
    """
    import openvino

    feed = {key: x[: int(batch)] for key, x in np.load(data).items()}
    core, found = openvino.Core(), dict[str, Any]()
    settings = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
    requests = {}
    for file in files:
        try:
            request = core.compile_model(file, "CPU", settings).create_infer_request()
            for _ in range(WARM_UP):
                request.infer(feed)
            requests[file], found[file] = request, []
        except Exception as error:  # any: what does not run there is a finding
            found[file] = str(error).strip().splitlines()[-1]
    end, rounds = time.perf_counter() + float(seconds), 0
    while requests and (rounds < LEAST_ROUNDS or time.perf_counter() < end):
        rounds += 1
        for file, request in requests.items():
            start = time.perf_counter()
            request.infer(feed)
            found[file].append((time.perf_counter() - start) * 1e3)
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    {"make": make, "time": time_openvino}[sys.argv[1]](*sys.argv[2:])
