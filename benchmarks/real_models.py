"""The real models benchmarks run on: where they are, how they are scored, and what calibrates them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import graphopt

SHARED = Path(os.environ.get("GRAPHOPT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
VAD_FRAME = 576


def load_scorer() -> ModuleType:
    """Return `score.py`, which lies beside the models, as a module."""
    spec = importlib.util.spec_from_file_location("score", SHARED / "assets" / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calibration(scorer: ModuleType, name: str, samples: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return calibration samples named as the model's inputs, never among the scored ones."""
    if name == "silero_vad":  # frames of speech with a fresh state; the scorer has none of its own
        pcm = scorer.data("vad_speech_16k.npz")["pcm"][: samples * VAD_FRAME].astype(np.float32) / 32768
        return {
            "input": pcm.reshape(samples, 1, VAD_FRAME),
            "state": np.zeros((samples, 2, 1, 128), np.float32),
            "sr": np.full(samples, 16000, np.int64),
        }
    found = scorer.ASSETS[name][2](samples)
    if isinstance(found, dict):
        return found
    return {graphopt.load(scorer.HERE / "models" / scorer.ASSETS[name][0]).graph.inputs[0].name or "": found}
