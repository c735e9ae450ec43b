"""Augmentation of input images: other pictures of the same things, so that few samples teach more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array
from graphopt.errors import UsageError

from ..aim import MIXING

_IMAGE_RANK = 4
# Greyscale, colours, colours with transparency: an axis of another length holds no colours.
_COLOURS = (1, 3, 4)
# How far an image is moved at most, as a share of its side: 4 of 32 pixels, as He et al. (Deep Residual Learning for
# Image Recognition, 2015, section 4.2) did with CIFAR-10.
_MOVED_SHARE = 8
# Both parameters of the Beta distribution of the share of the first of two images: 1 gives all shares alike, as
# distillation bears best (Beyer et al., Knowledge Distillation: A Good Teacher Is Patient and Consistent, 2022).
_BETA = 1.0
_FLIPPED_SHARE = 0.5
# How many images are blended where both mixup and cutmix are asked for; the others get a patch.
_BLENDED_SHARE = 0.5
# Each sample has random numbers of its own for what it is mixed with, and others for what is done to it.
_PARTNER, _CHANGE = 0, 1


@dataclass(frozen=True)
class ImageInput:
    """An input of images.

    Attributes:
        name: The input.
        height: Its axis of rows.
        width: Its axis of columns.
    """

    name: str
    height: int
    width: int


@dataclass(frozen=True)
class Augmentation:
    """What is done to the images of a batch; random, but by seed, epoch and sample alone.

    So it is the same however samples are divided into batches, and batches among processes.

    Attributes:
        names: What is done: flip, crop, mixup or cutmix.
        inputs: Which inputs are images; all of a sample's are changed alike.
    """

    names: tuple[str, ...]
    inputs: tuple[ImageInput, ...]

    @property
    def mixes(self) -> bool:
        """Whether images are made of two, of which `partners` says which the other is."""
        return not set(self.names).isdisjoint(MIXING)

    def partners(self, rows: Array, epoch: int, seed: int, pool: Array) -> Array:
        """Return the sample that each is mixed with.

        Args:
            rows: Samples, as indices of the whole data, int64 [count].
            epoch: How often all samples have been seen before.
            seed: The run's.
            pool: Samples that may be drawn, int64 [any]: those that are trained on.

        Returns:
            Indices, int64 [count].
        """
        return np.array([pool[_random(seed, epoch, row, _PARTNER).integers(len(pool))] for row in rows], np.int64)

    def apply(
        self,
        feeds: Mapping[str, Array],
        rows: Array,
        epoch: int,
        seed: int,
        *,
        partners: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Return feeds with other images; arrays given are not written to.

        Args:
            feeds: Input name to array, samples first, [count, ...].
            rows: Samples, as indices of the whole data, int64 [count].
            epoch: How often all samples have been seen before.
            seed: The run's.
            partners: The same inputs of what each is mixed with, where images are.
        """
        changed = dict(feeds)
        for image in self.inputs:
            others = partners[image.name] if partners is not None and self.mixes else None
            changed[image.name] = np.stack(
                [
                    self._change(feeds[image.name][place], image, _random(seed, epoch, row, _CHANGE), other)
                    for place, row in enumerate(rows)
                    for other in (others[place] if others is not None else None,)
                ]
            )
        return changed

    def _change(self, array: Array, image: ImageInput, random: np.random.Generator, other: Array | None) -> Array:
        height, width = image.height - 1, image.width - 1  # of one sample
        # All numbers are drawn in any case, so that each change is the same whatever else is asked for.
        flips, shifts, share = random.random(), random.random(2), random.beta(_BETA, _BETA)
        centre, blends = random.random(2), random.random() < _BLENDED_SHARE
        if "flip" in self.names and flips < _FLIPPED_SHARE:
            array = np.flip(array, width)
        if "crop" in self.names:
            array = _moved(array, (height, width), shifts)
        if other is None or not self.mixes:
            return array
        if "cutmix" not in self.names or ("mixup" in self.names and blends):
            return (share * array + (1 - share) * other).astype(array.dtype)
        return _with_patch(array, other, (height, width), share, centre)


def _random(seed: int, epoch: int, row: int, use: int) -> np.random.Generator:
    return np.random.default_rng((seed, epoch, int(row), use))


def _moved(array: Array, axes: tuple[int, int], shifts: Array) -> Array:
    """Return an image moved by up to an eighth of its sides; what comes in is a reflection of its border."""
    for axis, shift in zip(axes, shifts, strict=True):
        size = array.shape[axis]
        most = size // _MOVED_SHARE
        widths = [(most, most) if place == axis else (0, 0) for place in range(array.ndim)]
        start = int(shift * (2 * most + 1))
        array = np.take(np.pad(array, widths, mode="reflect"), range(start, start + size), axis)
    return array


def _with_patch(array: Array, other: Array, axes: tuple[int, int], share: float, centre: Array) -> Array:
    """Return an image with a rectangle of another in it (Yun et al., CutMix, 2019), of 1 − ``share`` of its area."""
    side = float(np.sqrt(1 - share))
    where = [slice(None)] * array.ndim
    for axis, middle in zip(axes, centre, strict=True):
        size = array.shape[axis]
        where[axis] = slice(max(0, round(size * (middle - side / 2))), min(size, round(size * (middle + side / 2))))
    patched = array.copy()
    patched[tuple(where)] = other[tuple(where)]
    return patched


def augmentation_of(names: Sequence[str], model: ir.Model) -> Augmentation | None:
    """Return what is to be done to the images a model reads; None where nothing is.

    Raises:
        UsageError: The model reads no images.
    """
    if not names:
        return None
    images = [image for value in model.graph.inputs if (image := _image_input(value)) is not None]
    if not images:
        raise UsageError(
            f"pass `recover`: `augment={'+'.join(names)}` needs images, and no input is one",
            hint="an image is of floats and of rank 4, its colours, 1, 3 or 4, right behind the samples or last",
        )
    return Augmentation(tuple(names), tuple(images))


def _image_input(value: ir.Value) -> ImageInput | None:
    is_float = value.dtype is not None and value.dtype.is_floating_point()
    if not is_float or value.shape is None or len(value.shape) != _IMAGE_RANK or value.is_initializer():
        return None
    for colours, height, width in ((1, 2, 3), (3, 1, 2)):
        if value.shape[colours] in _COLOURS and all(value.shape[axis] not in (1, 2) for axis in (height, width)):
            return ImageInput(value.name or "", height, width)
    return None
