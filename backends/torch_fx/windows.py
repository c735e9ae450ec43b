"""Windows over the spatial axes of a tensor, as convolutions and poolings take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Where windows lie: for each spatial axis the size of the kernel, its steps and what is put around the input.

    Attributes:
        kernel: Elements of a window.
        strides: From one window to the next.
        dilations: From one element of a window to the next.
        before: Elements put before the input.
        after: Elements put behind it.
        counts: How many windows there are.
        sizes: How large the input is.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    counts: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(
        cls,
        sizes: Sequence[int],
        kernel: Sequence[int],
        *,
        strides: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
    ) -> Self:
        """Return the windows that ONNX's attributes mean over an input with spatial axes of these sizes."""
        rank = len(kernel)
        steps, gaps = tuple(strides or [1] * rank), tuple(dilations or [1] * rank)
        spans = [(size - 1) * gap + 1 for size, gap in zip(kernel, gaps, strict=True)]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            counts = [-(-size // step) for size, step in zip(sizes, steps, strict=True)]
            needed = [
                max((count - 1) * step + span - size, 0)
                for count, step, span, size in zip(counts, steps, spans, sizes, strict=True)
            ]
            half, rest = [total // 2 for total in needed], [total - total // 2 for total in needed]
            before, after = (half, rest) if auto_pad == "SAME_UPPER" else (rest, half)
        else:
            given = list(pads or [0] * (2 * rank)) if auto_pad != "VALID" else [0] * (2 * rank)
            before, after = given[:rank], given[rank:]
            counts = [
                _count(size, low, high, span, step, bool(ceil_mode))
                for size, low, high, span, step in zip(sizes, before, after, spans, steps, strict=True)
            ]
        return cls(tuple(kernel), steps, gaps, tuple(before), tuple(after), tuple(counts), tuple(sizes))

    @property
    def even(self) -> bool:
        """Whether as much is put before the input as behind it."""
        return self.before == self.after

    @property
    def padded(self) -> bool:
        """Whether anything is put around the input."""
        return any(self.before) or any(self.after)

    def beyond(self) -> tuple[int, ...]:
        """Return how many elements the last windows reach over what is put behind the input; less than 0 for none."""
        return tuple(
            (count - 1) * step + (size - 1) * gap + 1 - (whole + low + high)
            for count, step, size, gap, whole, low, high in zip(
                self.counts,
                self.strides,
                self.kernel,
                self.dilations,
                self.sizes,
                self.before,
                self.after,
                strict=True,
            )
        )

    def padding(self) -> list[int]:
        """Return what is put around the input as `torch.nn.functional.pad` takes it."""
        return [one for pair in zip(reversed(self.before), reversed(self.after), strict=True) for one in pair]

    def pad(self, x: Tensor, value: float) -> Tensor:
        """Return the input with what is put around it, which may be less than nothing."""
        return F.pad(x, self.padding(), value=value) if self.padded else x

    def over(self, x: Tensor, value: float, *, padded: bool = False) -> Tensor:
        """Return a view of the elements of all windows: batch, channels, windows along each axis, elements of each.

        Args:
            x: The input: batch, channels, spatial axes.
            value: What is put around it, and beyond, where the last windows reach over that.
            padded: Whether what is put around it is there already.
        """
        x = x if padded else self.pad(x, value)
        missing = [max(0, more) for more in self.beyond()]
        if any(missing):
            x = F.pad(x, [one for more in reversed(missing) for one in (0, more)], value=value)
        for axis, (size, gap, step, count) in enumerate(
            zip(self.kernel, self.dilations, self.strides, self.counts, strict=True), 2
        ):
            x = x.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap].narrow(axis, 0, count)
        return x

    def axes(self, x: Tensor) -> list[int]:
        """Return the axes of the elements of a window in what `over` gives."""
        return list(range(x.ndim - len(self.kernel), x.ndim))


def _count(size: int, before: int, after: int, span: int, step: int, ceil: bool) -> int:
    """Return how many windows fit; with ``ceil`` the last may be cut short, if it begins in the input or before it."""
    room = size + before + after - span
    if not ceil:
        return room // step + 1
    count = -(-room // step) + 1
    return count - 1 if (count - 1) * step >= size + before else count
