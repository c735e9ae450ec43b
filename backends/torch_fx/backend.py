"""PyTorch as a runtime: what trains a model also runs it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from graphopt.backend import Trouble
from graphopt.errors import BackendError, UsageError, one_line
from graphopt.options import opt

if TYPE_CHECKING:
    from torch import fx

    from .session import TorchSession

_INSTALL = "`pip install 'graphopt[torch]'`"
_REINSTALL = "`pip install --force-reinstall torch`"
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Torch:
    """PyTorch, operator by operator as the model says; ``device`` says on what."""

    device: str = opt("cpu", help="device: cpu, cuda or cuda:1")

    name: ClassVar[str] = "torch"
    help: ClassVar[str] = "PyTorch, operator by operator: what `recover` trains a model with"

    def __post_init__(self) -> None:
        """Refuse a device that is none."""
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(f"backend `torch`: `{self.device}` is no device", hint="cpu, cuda or cuda:1")

    def missing(self) -> BackendError | None:
        """Return the error that says why this device cannot run here and what to install, or None if it can."""
        if _version() is None:
            return BackendError("PyTorch is not installed", hint=_INSTALL)
        failure = _failure()
        if failure is not None:
            return BackendError(f"PyTorch is installed and does not load: {failure}", hint=_REINSTALL)
        if self.device == "cpu":
            return None
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(self.device.partition(":")[2] or 0) < count:
            return None
        return BackendError(
            f"backend `{self.describe()}` cannot run here: PyTorch finds {count or 'no'} GPU{'s' * (count > 1)}",
            hint="a PyTorch built for CUDA and NVIDIA's driver, or `--backend torch`, which runs on the CPU",
        )

    def describe(self) -> str:
        """Return the name tables show."""
        return f"torch {self.device}"

    def version(self) -> str | None:
        """Return the package and version that is installed, or None."""
        found = _version()
        return f"torch {found}" if found is not None else None

    def variants(self) -> Sequence[Torch]:
        """Return it for the CPU and for CUDA."""
        return [Torch(), Torch(device="cuda")]

    def troubles(self) -> Sequence[Trouble]:
        """Return what is wrong with the installation; see `graphopt.backend.Diagnosable.troubles`."""
        failure = _failure() if _version() is not None else None
        return [Trouble(f"torch does not load: {failure}", _REINSTALL, fatal=True)] if failure is not None else []

    def open(
        self, model: ir.Model | Path, *, threads: int = 0, optimize: bool = True, profile: Path | None = None
    ) -> TorchSession:
        """Open a model; see `graphopt.backend.Backend.open`.

        It is computed as it stands, whatever ``optimize`` says.
        """
        if profile is not None:
            raise BackendError("backend `torch` writes no profile", hint="use `--backend onnxruntime`")
        self._check_runs_here()
        from .session import open_session

        return open_session(model, self.device, threads)

    def lower(
        self, model: ir.Model, *, observe: Sequence[str] = (), differentiable: bool = True, shared: bool = True
    ) -> fx.GraphModule:
        """Return a model as a module of torch; see `graphopt.backend.Differentiable.lower`."""
        self._check_runs_here()
        from .lowering import lower

        return lower(model, observe=observe, differentiable=differentiable, shared=shared).to(self.device)

    def _check_runs_here(self) -> None:
        why = self.missing()
        if why is not None:
            raise why


def _version() -> str | None:
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def _failure() -> str | None:
    """Return why torch cannot be imported, or None where it can."""
    try:
        import_module("torch")
    except (ImportError, OSError) as error:  # a library it lacks is an OSError
        return one_line(error)
    return None
