"""A stand-in for ONNX Runtime where there is no GPU: it writes down what it was asked, and plays back outputs.

What a session on CUDA or TensorRT is told can so be tested anywhere. Whether they do it cannot: `benchmarks/gpu.py`
asks the real ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from graphopt.backends import onnxruntime_library
from graphopt.backends.onnxruntime_library import Gpu

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
GPU = Gpu("Recorded GPU", "9.0", "12.8")
Placer = Callable[[onnx.NodeProto], str]


@dataclass
class RecordedSession:
    """What one session was asked for.

    Attributes:
        model: The model, read when the session was made.
        path: The file it came from, or None for bytes.
        providers: Names and options of the providers, as given.
        entries: Session configuration entries.
        weights: Weights given beside the model.
        runs: Feeds it was run on, as they were bound or given.
        devices: Where each output was bound to.
        deterministic: Whether the same result was asked of every run.
        optimized: Whether ONNX Runtime's own optimizations were on.
    """

    model: onnx.ModelProto
    path: Path | None
    providers: list[tuple[str, dict[str, str]]]
    entries: dict[str, str]
    weights: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)
    devices: dict[str, tuple[str, int]] = field(default_factory=dict)
    deterministic: bool = False
    optimized: bool = True

    def options(self, provider: str) -> dict[str, str]:
        """Return the options of one of its providers."""
        return dict(self.providers)[provider]


@dataclass
class Recording:
    """What stands in for the module `onnxruntime`.

    Attributes:
        available: Providers it claims to have.
        started: Providers that start when asked for; others are replaced by the CPU without a word.
        place: Says which provider takes a node.
        outputs: What is played back, by name of output; zeros otherwise.
        computes: Whether the real ONNX Runtime computes the outputs, on the CPU.
        sessions: Every session made, in order.
        refuses: Errors the next sessions fail with, one each.
        tells_placement: Whether it is a version that knows where nodes went.
    """

    available: list[str] = field(default_factory=lambda: [TENSORRT, CUDA, CPU])
    started: Sequence[str] = (TENSORRT, CUDA, CPU)
    place: Placer | None = None
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    computes: bool = False
    sessions: list[RecordedSession] = field(default_factory=list)
    refuses: list[Exception] = field(default_factory=list)
    tells_placement: bool = True
    __version__: ClassVar[str] = "1.99.0"
    GraphOptimizationLevel: ClassVar[Any] = SimpleNamespace(ORT_ENABLE_ALL=99, ORT_DISABLE_ALL=0)

    def install(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        gpus: tuple[Gpu, ...] | None = (GPU,),
        tensorrt: tuple[int, ...] | None = (10, 9, 0),
    ) -> Recording:
        """Put it where graphopt looks for ONNX Runtime, with a driver and a TensorRT that say what is given."""
        from graphopt.backends import onnxruntime, onnxruntime_engines, onnxruntime_session

        for module in (onnxruntime_library, onnxruntime, onnxruntime_engines, onnxruntime_session):
            for name, stand_in in (
                ("runtime", lambda: self),
                ("gpus", lambda: gpus),
                ("tensorrt_version", lambda: tensorrt),
            ):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, stand_in)
        return self

    @property
    def last(self) -> RecordedSession:
        """The session made last."""
        return self.sessions[-1]

    def get_available_providers(self) -> list[str]:
        return self.available

    @property
    def InferenceSession(self) -> type:
        recording = self

        class Session(_Session):
            def __init__(self, model: Any, options: Any, providers: Any, enable_fallback: int = 1) -> None:
                assert not enable_fallback, "what a provider refuses would be printed, and run elsewhere"
                super().__init__(recording, model, options, providers)

        if recording.tells_placement:
            Session.get_provider_graph_assignment_info = Session._placed  # type: ignore[attr-defined]
        return Session

    @property
    def SessionOptions(self) -> type:
        return _SessionOptions

    @property
    def OrtValue(self) -> Any:
        return _Values


class _Values:
    @staticmethod
    def ortvalue_from_numpy(array: Any, device: str = "cpu", number: int = 0) -> Any:
        return SimpleNamespace(array=array, device=(device, number))

    @staticmethod
    def ortvalue_from_numpy_with_onnx_type(array: Any, _type: int) -> Any:
        return SimpleNamespace(array=array, device=("cpu", 0))


class _SessionOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.weights: dict[str, Any] = {}
        self.use_deterministic_compute = False
        self.profile_file_prefix = ""

    def add_session_config_entry(self, key: str, value: str) -> None:
        assert isinstance(key, str)
        assert isinstance(value, str), f"ONNX Runtime takes text, not {value!r}"
        self.entries[key] = value

    def add_external_initializers(self, names: list[str], values: list[Any]) -> None:
        self.weights = dict(zip(names, values, strict=True))


class _Session:
    def __init__(self, recording: Recording, model: Any, options: Any, providers: Any) -> None:
        for name, given in providers:
            assert name in recording.available
            assert all(isinstance(one, str) for pair in given.items() for one in pair), given
        if recording.refuses:
            raise recording.refuses.pop()
        path = Path(model) if isinstance(model, str) else None
        proto = onnx.load(path) if path is not None else onnx.load_from_string(model)
        self._recording = recording
        self.record = RecordedSession(proto, path, list(providers), options.entries, options.weights)
        self.record.deterministic = options.use_deterministic_compute
        self.record.optimized = options.graph_optimization_level != recording.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._profile = options.profile_file_prefix
        self._real = _on_cpu(model, options.weights) if recording.computes else None
        recording.sessions.append(self.record)

    def get_providers(self) -> list[str]:
        asked = [name for name, _ in self.record.providers if name in self._recording.started]
        return [*asked, CPU]

    def get_inputs(self) -> list[Any]:
        held = {tensor.name for tensor in self.record.model.graph.initializer}
        given = [one for one in self.record.model.graph.input if one.name not in held]
        return [SimpleNamespace(name=one.name, type="tensor(float)") for one in given]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=one.name, type="tensor(float)") for one in self.record.model.graph.output]

    def run(self, _names: None, feeds: dict[str, Any]) -> list[Any]:
        self.record.runs.append(feeds)
        if self._real is not None:
            return list(self._real.run(None, feeds))
        return [self._recording.outputs.get(one.name, np.zeros(1, np.float32)) for one in self.get_outputs()]

    def io_binding(self) -> _Binding:
        return _Binding(self.record)

    def run_with_iobinding(self, binding: _Binding) -> None:
        self.record.runs.append(dict(binding.inputs))
        if self._real is not None:
            self._real.run(None, {name: value.array for name, value in binding.inputs.items()})

    def end_profiling(self) -> str:
        """Return a file in which each node took 250 µs in each run."""
        events = [
            {"cat": "Node", "name": f"{node.name}_kernel_time", "dur": 250, "args": {"op_name": node.op_type, **where}}
            for part in self._placed()
            for node in part.get_nodes()
            for where in [{"provider": part.ep_name}] * len(self.record.runs)
        ]
        file = Path(f"{self._profile}.json")
        file.write_text(json.dumps(events))
        return str(file)

    def _placed(self) -> list[Any]:
        first = self.record.providers[0][0]
        place = self._recording.place or (lambda _node: first)
        return [
            SimpleNamespace(ep_name=place(node), get_nodes=lambda node=node: [node])
            for node in self.record.model.graph.node
        ]


def _on_cpu(model: Any, weights: dict[str, Any]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal errors alone
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(value.array) for value in weights.values()]
    if weights:
        options.add_external_initializers(list(weights), values)
    return onnxruntime.InferenceSession(model, options, providers=[CPU])


class _Binding:
    def __init__(self, record: RecordedSession) -> None:
        self.inputs: dict[str, Any] = {}
        self._record = record

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value

    def bind_output(self, name: str, device: str = "cpu", number: int = 0) -> None:
        self._record.devices[name] = (device, number)

    def synchronize_inputs(self) -> None: ...

    def synchronize_outputs(self) -> None: ...
