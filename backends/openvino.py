"""OpenVINO: Intel's runtime for CPUs, and for its GPUs and NPUs."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array, Feeds, Kernel, Trouble
from graphopt.errors import BackendError, UsageError, one_line
from graphopt.options import opt

from .openvino_kernels import read_kernels
from .openvino_model import Ports, model_in_memory, to_array, to_tensor

_DEVICE = re.compile(r"(cpu|gpu|npu)(\.\d+)?|auto")
# Where OpenVINO's text says who speaks: source files, checks that failed, and brackets around the words that matter.
_NOISE = re.compile(
    r"Exception from \S+:\d+:|Check '.*?' failed at \S+:\d+:|FrontEnd API failed with \w+:|To facilitate the .*"
    r"|Model wasn't fully converted\.|Summary:|\[ [A-Z_]+ \]",
    re.DOTALL,
)
_INSTALL = "`pip install 'graphopt[openvino]'`"
_REINSTALL = "`pip install --force-reinstall openvino`"
_INT32 = np.iinfo(np.int32)
_WIDE_INTEGERS = ("int64", "uint64", "uint32")
_TICK = 1e-3  # milliseconds: OpenVINO counts whole microseconds
# What the plug-in of CPUs does of its own accord and can be told to leave: integers in place of Q and DQ, and kernels
# compiled for chains of small operators. Properties that it does not document.
_OPTIMIZATIONS_OFF = {"LP_TRANSFORMS_MODE": "NO", "SNIPPETS_MODE": "DISABLE"}


@dataclass(frozen=True)
class OpenVino:
    """OpenVINO; ``device`` says on what.

    It is asked for float32 unless told otherwise: by itself it computes in bfloat16 on CPUs that have it, and what a
    pass did could not be told from what that costs.
    """

    device: str = opt("cpu", help="device: cpu, gpu, gpu.1, npu or auto")
    precision: Literal["f32", "f16", "bf16", "default"] = opt(
        "f32", help="what floats are computed in; default leaves it to OpenVINO, which takes bf16 where the CPU has it"
    )
    activation_group: int = opt(
        0, low=0, help="inputs of a product with compressed weights quantized on the fly by one scale; 0 for none"
    )
    hint: Literal["latency", "throughput"] = opt("latency", help="what OpenVINO arranges its threads for")
    pin: bool = opt(False, help="keep threads on cores: faster on a machine of one's own, many times slower on others")
    cache: str | None = opt(None, help="folder that keeps compiled models for later runs")
    config: tuple[str, ...] = opt((), help="further properties, KEY=VALUE")

    name: ClassVar[str] = "openvino"
    help: ClassVar[str] = "OpenVINO (Intel and AMD CPUs; Intel GPUs and NPUs)"
    # It always puts operators together; what it is asked to leave is not all of it.
    plain: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a device or property that is none."""
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(f"backend `openvino`: `{self.device}` is no device", hint="cpu, gpu, gpu.1, npu or auto")
        for entry in self.config:
            if not all(entry.partition("=")):
                raise UsageError(f"backend `openvino`: `{entry}` is no property", hint="KEY=VALUE")

    def missing(self) -> BackendError | None:
        """Return the error that says why this device cannot run here and what to install, or None if it can."""
        runtime = _runtime()
        if runtime is None:
            broken = _version() is not None
            what = "OpenVINO is installed and cannot be loaded" if broken else "OpenVINO is not installed"
            return BackendError(what, hint=_REINSTALL if broken else _INSTALL)
        found = [str(one).lower() for one in _core().available_devices]
        wanted = self.device.partition(".")[0]
        if wanted == "auto" or any(one == self.device or one.partition(".")[0] == wanted for one in found):
            return None
        return BackendError(
            f"backend `{self.describe()}` cannot run here: OpenVINO finds {', '.join(found) or 'no device'}",
            hint=f"install Intel's driver of the {wanted.upper()}, or use `--backend openvino`, which runs on the CPU",
        )

    def describe(self) -> str:
        """Return the name tables show."""
        return f"openvino {self.device}"

    def version(self) -> str | None:
        """Return the package and version that is installed, or None."""
        found = _version()
        return f"openvino {found}" if found is not None else None

    def variants(self) -> Sequence[OpenVino]:
        """Return it for the CPU, and for each other device OpenVINO finds."""
        found = [str(one).lower() for one in _core().available_devices] if _runtime() is not None else []
        return [OpenVino(), *(OpenVino(device=one) for one in found if one != "cpu" and _DEVICE.fullmatch(one))]

    def troubles(self) -> Sequence[Trouble]:
        """Return what is wrong with the installation; see `graphopt.backend.Diagnosable.troubles`."""
        if _version() is None or _runtime() is not None:
            return []
        try:
            importlib.import_module("openvino")
        except ImportError as error:
            return [Trouble(f"openvino does not load: {one_line(error)}", _REINSTALL, fatal=True)]
        return []

    def open(
        self, model: ir.Model | Path, *, threads: int = 0, optimize: bool = True, profile: Path | None = None
    ) -> OpenVinoSession:
        """Open a model; see `graphopt.backend.Backend.open`.

        Without ``optimize`` OpenVINO is asked to leave integers and compiled chains; it fuses operators all the same.
        """
        return OpenVinoSession(*self._compile(model, threads, optimize, profiled=profile is not None), profile=profile)

    def kernels(self, model: ir.Model, feeds: Feeds, *, threads: int = 0, runs: int = 5) -> list[Kernel]:
        """Return what OpenVINO makes of a model; see `graphopt.backend.Inspectable.kernels`.

        Of nested graphs it tells nothing: what runs in one is part of the If, Loop or Scan.
        """
        compiled, ports, arrays = self._compile(model, threads, optimize=True, profiled=True)
        with OpenVinoSession(compiled, ports, arrays) as session:
            session.run(feeds)
            first = session.times()
            for _ in range(runs):
                session.run(feeds)
            # What OpenVINO tells is the mean of all runs so far; the first one, which packs weights, is taken out.
            means = {name: _without(first.get(name, 0.0), mean, runs) for name, mean in session.times().items()}
            return read_kernels(compiled.get_runtime_model(), means)

    def _compile(
        self, model: ir.Model | Path, threads: int, optimize: bool, *, profiled: bool
    ) -> tuple[Any, Ports, list[Array]]:
        """Return the compiled model, its ports, and the weights that must outlive it."""
        why = self.missing()
        if why is not None:
            raise why
        self._make_cache()
        ports = Ports.of(model)
        properties = self._properties(threads) | ({"PERF_COUNT": True} if profiled else {})
        with _in_one_line(f"{self.describe()} refuses the model"):
            arrays: list[Array] = []
            if isinstance(model, Path):
                read = _core().read_model(str(model))
            else:
                proto, arrays = model_in_memory(model)
                read = _core().read_model(proto, b"")
            if not optimize:
                try:
                    return self._compiled(read, properties | _OPTIMIZATIONS_OFF), ports, arrays
                except RuntimeError as error:
                    if "Unsupported property" not in str(error):
                        raise
            return self._compiled(read, properties), ports, arrays

    def _make_cache(self) -> None:
        if self.cache is None:
            return
        try:
            Path(self.cache).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"backend `openvino`: compiled models cannot be kept in `{self.cache}`: {error.strerror}",
                hint="another `cache`, or none",
            ) from error

    def _compiled(self, model: Any, properties: Mapping[str, Any]) -> Any:
        return _core().compile_model(model, self.device.upper(), dict(properties))

    def _properties(self, threads: int) -> dict[str, Any]:
        found: dict[str, Any] = {"PERFORMANCE_HINT": self.hint.upper()}
        if self.precision != "default":
            found["INFERENCE_PRECISION_HINT"] = self.precision
        if self.device == "cpu":
            found["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = self.activation_group
            found["ENABLE_CPU_PINNING"] = self.pin
            found |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        found |= {"CACHE_DIR": self.cache} if self.cache is not None else {}
        return found | {entry.partition("=")[0]: entry.partition("=")[2] for entry in self.config}


class OpenVinoSession:
    """A compiled model, and one request to run it."""

    def __init__(self, compiled: Any, ports: Ports, weights: Sequence[Array], *, profile: Path | None = None) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._weights = weights
        self._profile = profile
        self._ports = ports
        self._fed: dict[str, Any] = {}  # what the request reads is ours to keep
        # OpenVINO leaves out inputs that nothing reads; they are fed all the same, and taken no notice of.
        self._indices = {name: index for index, name in enumerate(_inputs_of(compiled, ports))}
        self.input_names: Sequence[str] = [name for name in ports.inputs if name not in ports.defaults]
        self.output_names: Sequence[str] = list(ports.outputs)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run the model once; see `graphopt.backend.Session.run`."""
        self._take(feeds)
        with _in_one_line("openvino fails on the model"):
            self._request.infer()
            found = [to_array(self._request.get_output_tensor(index)) for index in range(len(self.output_names))]
        return dict(zip(self.output_names, found, strict=True))

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Return what runs the model on a feed in place; see `graphopt.backend.Bindable.bind`."""
        self._take({name: np.array(array) for name, array in feeds.items()})
        fed = self._fed

        def run() -> None:
            with _in_one_line("openvino fails on the model"):
                if self._fed is not fed:  # another feed was taken since
                    self._set(fed)
                self._request.infer()

        return run

    def _take(self, feeds: Feeds) -> None:
        """Hand the feeds to the request.

        OpenVINO keeps what it was last given where an input is left out, and makes numbers of one dtype of another, so
        both are refused here.
        """
        for name in self.input_names:
            if name not in feeds:
                raise BackendError(f"openvino: input `{name}` is not fed", hint="give every input of the model")
        # Anew, and at once: what was bound before finds out, whether or not all of this one is taken.
        fed = self._fed = {}
        for name, array in feeds.items():
            if name in self._indices:
                self._check(name, array)
                with _in_one_line(f"openvino refuses the feed of `{name}`"):
                    fed[name] = to_tensor(np.asarray(array))
                    self._request.set_input_tensor(self._indices[name], fed[name])
            elif name in self._ports.defaults:
                raise BackendError(
                    f"openvino takes `{name}` for a constant, as it has a default, and cannot be fed another",
                    hint="leave it out of the feed, or use another `--backend`",
                )
            elif name not in self._ports.inputs:
                raise BackendError(f"openvino: the model has no input `{name}`", hint="give inputs by their names")

    def _set(self, fed: dict[str, Any]) -> None:
        for name, tensor in fed.items():
            self._request.set_input_tensor(self._indices[name], tensor)
        self._fed = fed

    def _check(self, name: str, array: Array) -> None:
        wanted = self._ports.inputs[name]
        given = np.asarray(array)
        if wanted is not None and given.dtype != wanted:
            raise BackendError(f"openvino: input `{name}` is {wanted}, and was given {given.dtype}", hint="convert it")
        if given.dtype.name in _WIDE_INTEGERS and given.size and self._leaves_32_bits(given):
            raise BackendError(
                f"openvino computes in integers of 32 bits, and `{name}` holds larger ones",
                hint="another `--backend` runs it",
            )

    @staticmethod
    def _leaves_32_bits(array: Array) -> bool:
        return int(array.max()) > _INT32.max or int(array.min()) < _INT32.min

    def times(self) -> dict[str, float]:
        """Return the milliseconds of each node, the mean of all runs so far, by its name in OpenVINO's graph."""
        return {one.node_name: one.real_time.total_seconds() * 1e3 for one in self._request.profiling_info}

    def end_profiling(self) -> Path:
        """Write the operator profile, means of all runs so far, to the place asked for and return its file."""
        assert self._profile is not None, "a profile was asked for"
        rows = [
            {
                "name": one.node_name,
                "op": one.node_type,
                "kernel": one.exec_type,
                "milliseconds": one.real_time.total_seconds() * 1e3,
            }
            for one in self._request.profiling_info
        ]
        file = self._profile.with_name(f"{self._profile.name}_openvino.json")
        file.write_text(json.dumps(rows, indent=1) + "\n")
        return file

    def close(self) -> None:
        """Free the request, the model and its weights, in this order."""
        self._request = None
        self._compiled = None
        self._weights = []
        self._fed = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _without(first: float, mean: float, runs: int) -> float:
    """Return the mean time of so many runs from that of all, the first one before them included."""
    # Of what takes less than a tick, OpenVINO says that it takes nothing, and of means it drops what is less.
    return max(((runs + 1) * mean - first) / runs, _TICK / 2)


def _inputs_of(compiled: Any, ports: Ports) -> list[str]:
    """Return which input of the model each of a compiled model is.

    Where an operator does nothing, its input goes by the name of its output, too, or by that alone. As long as no input
    was left out, they are in the model's order.

    Raises:
        BackendError: It cannot be told; what ran would read whatever is in memory.
    """
    wanted = [name for name in ports.inputs if name not in ports.defaults]
    named = [{*port.get_names(), port.get_node().get_friendly_name()} for port in compiled.inputs]
    found = [next((name for name in wanted if name in names), None) for names in named]
    if len(found) == len(wanted):
        found = [name or at for name, at in zip(found, wanted, strict=True)]
    known = [name for name in found if name is not None]
    if len(set(known)) < len(named):
        raise BackendError(
            "openvino refuses the model: it renamed an input that an operator hands on unchanged",
            hint="`--passes simplify` removes such operators; another `--backend` runs it as it is",
        )
    return known


@functools.cache
def _runtime() -> Any:
    """Return the module, or None where it is not installed or does not load."""
    try:
        return importlib.import_module("openvino")
    except ImportError:
        return None


@functools.cache
def _core() -> Any:
    """Return the one core of this process: it keeps the plug-ins of devices, and starting them takes time."""
    return _runtime().Core()


def _version() -> str | None:
    try:
        return version("openvino")
    except PackageNotFoundError:
        return None


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turn what OpenVINO raises, which is many lines about its own source files, into one line of the user's."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        text = " ".join(_NOISE.sub(" ", str(error)).split())
        raise BackendError(f"{what}: {one_line(RuntimeError(text or 'no reason given'))}") from error
