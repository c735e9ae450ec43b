"""The options of recovery that say what is minimised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from graphopt.errors import UsageError
from graphopt.options import opt

BUILT_IN_TASKS = ("auto", "none", "cross-entropy", "next-token", "mse")
AUGMENTATIONS = ("flip", "crop", "mixup", "cutmix")
# Those that make one image of two, which then is of neither's class.
MIXING = ("mixup", "cutmix")
# The share of distillation where a task is named beside a teacher, and no share is given.
SHARE_BESIDE_A_TASK = 0.5


@dataclass(frozen=True)
class Aim:
    """What training is to make small.

    The loss is ``distill`` × distillation + (1 − ``distill``) × task (Hinton et al., Distilling the Knowledge in a
    Neural Network, 2015), and on top of that ``features`` × features + ``attention`` × attention.
    """

    task: str = opt(
        "auto",
        help="loss against labels: auto (none with a teacher), none, cross-entropy, next-token, mse, file.py:function "
        "or module:function",
        function=True,
    )
    distill: float | None = opt(
        None,
        help="share of the loss that is distance to the teacher's outputs; 1 with a teacher unless a task is named",
        low=0.0,
        high=1.0,
    )
    distance: Literal["auto", "kl", "mse"] = opt(
        "auto", help="distance to the teacher's outputs: kl (classes), mse (anything); auto decides output by output"
    )
    temperature: float = opt(4.0, help="what logits are divided by before kl compares them", low=0.05, high=100.0)
    features: float = opt(0.0, help="weight of the distance between values inside, paired by origin", low=0.0)
    attention: float = opt(
        0.0, help="weight of the distance between attention weights, or attention maps of convolutions", low=0.0
    )
    reconstruct: Literal["no", "blocks", "layers"] = opt(
        "no", help="train block by block, or layer by layer, on what the original's give; no other loss then"
    )
    augment: tuple[str, ...] = opt(
        (), help="what is done to input images: flip, crop, mixup, cutmix, joined by +; the last two without labels"
    )
    l1: float = opt(0.0, help="shrink single weights by rate × this each step, to exact zeros", low=0.0)
    group_lasso: float = opt(0.0, help="shrink whole channels by rate × this each step, to exact zeros", low=0.0)
    batch_norm: Literal["keep", "update"] = opt(
        "keep", help="statistics of batch normalization: keep, or update over the samples once trained"
    )

    def check_aim(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: They do.
        """
        if self.task not in BUILT_IN_TASKS and ":" not in self.task:
            raise UsageError(
                f"pass `recover`: unknown task `{self.task}`",
                hint=f"one of: {', '.join(BUILT_IN_TASKS)}; or file.py:function, package.module:function",
            )
        self._check_shares()
        self._check_augmentations()
        if self.reconstruct != "no":
            self._check_reconstruction()

    def _check_shares(self) -> None:
        for name in ("features", "attention", "l1", "group_lasso"):
            if not math.isfinite(getattr(self, name)):
                raise UsageError(f"pass `recover`: `{name}` must be finite", hint=f"a number such as `{name}=0.5`")
        named = self.task not in ("auto", "none")
        if named and self.distill == 1.0:
            raise UsageError(
                f"pass `recover`: `distill=1` leaves nothing for task `{self.task}`",
                hint="a `distill` below 1, or no `task`",
            )
        if self.task == "none" and self.distill is not None and self.distill < 1.0 and not self._has_extras():
            raise UsageError(
                f"pass `recover`: `task=none` with `distill={self.distill:g}` leaves a part of the loss empty",
                hint="leave out `distill`, or name a task",
            )

    def _has_extras(self) -> bool:
        return self.features > 0 or self.attention > 0

    def _check_augmentations(self) -> None:
        for name in self.augment:
            if name not in AUGMENTATIONS:
                raise UsageError(
                    f"pass `recover`: unknown augmentation `{name}`",
                    hint=f"of {', '.join(AUGMENTATIONS)}; several are joined by +, as in {'+'.join(AUGMENTATIONS[:2])}",
                )
        if len(set(self.augment)) < len(self.augment):
            raise UsageError("pass `recover`: an augmentation is named twice", hint="name each once")

    def _check_reconstruction(self) -> None:
        # A part has inputs and outputs: no labels, no classes, nothing inside; and channels go through several.
        extra = {
            "task": self.task not in ("auto", "none"),
            "distill": self.distill is not None,
            "features": self.features > 0,
            "attention": self.attention > 0,
            "augment": bool(self.augment),
            "l1": self.l1 > 0,
            "group_lasso": self.group_lasso > 0,
            "batch_norm": self.batch_norm != "keep",
        }
        for option, is_set in extra.items():
            if is_set:
                raise UsageError(
                    f"pass `recover`: `reconstruct={self.reconstruct}` and `{option}` exclude each other",
                    hint=f"leave out `{option}`, or follow with a second `recover` that has it",
                )
