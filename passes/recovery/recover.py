"""Recovery: a model that lost something is trained until it does again what it did before."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.authoring import Context, Given, Guarantee, Need, Pass
from graphopt.errors import BackendError, UsageError
from graphopt.options import FunctionText, check, opt

from .aim import Aim
from .held import Held
from .settings import Training

# What training is done with, and the extra that brings it.
_PACKAGES = ("torch", "accelerate")
_INSTALL = "`pip install 'graphopt[recover]'`"


@dataclass(frozen=True)
class Recover(Training, Aim, Held, Pass):
    """Train what is left of a model, on the original's outputs or on labels; what earlier passes fixed stays fixed."""

    device: str = opt("auto", help="where it is trained, such as cpu or cuda; auto: a GPU where there is one")

    name = "recover"
    guarantee = Guarantee.LOSSY
    trains = True

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, wherever the pass was made."""
        check(self, where=f"pass `{self.name}`")
        self.check_training()
        self.check_aim()
        self.check_held()
        if self.l1 and "weights" not in self.train:
            raise UsageError("pass `recover`: `l1` has no weights to shrink", hint="`train=weights`, or leave out `l1`")

        if self.checkpoints is not None and isinstance(self.task, FunctionText) and not self.task.is_found:
            raise UsageError(
                f"pass `recover`: checkpoints of task `{self.task}` could not be told from those of another one",
                hint="a function at the top of a module or script, or no `checkpoints`",
            )

    @property
    def needs(self) -> frozenset[Need]:
        """Samples to train on; and canonical form, in which channels are found."""
        return frozenset({Need.CALIBRATION, *([Need.CANONICAL] if self.group_lasso else [])})

    def check_ahead(self, given: Given) -> None:
        """Refuse what could not be trained: packages, samples, labels, a teacher or gradients are missing.

        Raises:
            BackendError: Torch or Accelerate is not installed, or the device is not there.
            UsageError: There is nothing to learn from, or nothing that may be trained.
            DataError: The samples are too few, or do not fit.
            PassError: The model has operators without a gradient.
        """
        require_packages()
        from .recovery_run import check_subject, device_of
        from .training.acceleration import join

        assert given.data is not None, "the pass declares that it needs data"
        check_subject(self, given.model, given.teacher, given.data)
        join(self, device_of(self.device))

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Train the model and write the weights back, all in one edit.

        Raises:
            PassError: Training diverges, or a constraint of an earlier pass would be broken.
            UsageError: There is nothing to learn from.
        """
        require_packages()
        from .recovery_run import recover

        recover(model, ctx, self)


def require_packages() -> None:
    """Raise an error where what trains models is not installed.

    Raises:
        BackendError: It is not.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(f"`{name}`" for name in missing)
        raise BackendError(f"training needs {names}, not installed here", hint=_INSTALL)
