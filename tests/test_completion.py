"""What a shell is told when a name is begun."""

from __future__ import annotations

import pytest

from .command_line import run


@pytest.mark.parametrize(
    ("begun", "found"),
    [
        ("debug re", {"reduce", "replay"}),
        ("optimize net.onnx --passes correct", {"correct-bias"}),
        ("optimize net.onnx --passes prune,qu", {"prune,quant"}),
        ("bench net.onnx --backend onnxruntime,op", {"onnxruntime,openvino"}),
        ("explain net.onnx --target tens", {"tensorrt"}),
        ("compare a.onnx b.onnx --other-backend ref", {"reference"}),
        ("debug reduce a.onnx --other-backend ref", {"reference"}),
        ("optimize net.onnx --passes nothing-like", set()),
    ],
)
def test_names_are_completed(begun: str, found: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"graphopt {begun}"
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    monkeypatch.setenv("_GRAPHOPT_COMPLETE", "complete_bash")
    assert set(run().out.split()) == found
