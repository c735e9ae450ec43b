"""What all tests share: the folder of shared assets, how hypothesis searches, and what random numbers are drawn."""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# `fixed` draws the same examples on every run; `explore` draws others each time, for a search by hand:
# HYPOTHESIS_PROFILE=explore pytest tests/test_properties.py
settings.register_profile(
    "fixed",
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.register_profile("explore", settings.get_profile("fixed"), derandomize=False, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time models for a moment only: no test judges a latency."""
    monkeypatch.setattr("graphopt.measurement.LATENCY_SECONDS", 0.02)


@pytest.fixture(autouse=True)
def own_numbers(request: pytest.FixtureRequest) -> None:
    """Start the generator of a module, and torch's, anew for each test: none must depend on which ran before it.

    ``GRAPHOPT_TEST_SEED=1 pytest`` draws others, for a search by hand after tests that pass by luck.
    """
    seed = [zlib.crc32(request.node.name.encode()), int(os.environ.get("GRAPHOPT_TEST_SEED", "0"))]
    generator = getattr(request.module, "RNG", None)
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = np.random.default_rng(seed).bit_generator.state
    torch = sys.modules.get("torch")  # importing it takes seconds, which tests without it need not wait
    if torch is not None and hasattr(torch, "manual_seed"):
        torch.manual_seed(sum(seed))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared assets, beside the repository or where GRAPHOPT_SHARED says; skips where there is none."""
    folder = Path(os.environ.get("GRAPHOPT_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared assets at `{folder}`; set GRAPHOPT_SHARED")
    return folder
