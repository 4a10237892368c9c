"""Inputs that are images: where they have their pixels, and other views of the same pixels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray
from onnxfuse.proof.samples import Samples

__all__ = ["HELD_BACK", "MOST_VIEWS", "Image", "Split", "image_inputs", "split_and_vary"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_PIXEL_TYPES = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8, TensorProto.INT8}
)
_SMALLEST_SIDE = 8
# Whether a view is mirrored, and whether it is shifted: the image itself first.
_VIEWS = ((False, False), (True, True), (True, False), (False, True))
MOST_VIEWS = len(_VIEWS)
# Shifts are by up to one part in so many of a side.
_SHIFT = 8
# One sample in so many is held back.
HELD_BACK = 8


@dataclass(frozen=True)
class Image:
    """Where an input has its pixels.

    Attributes:
        channels: How many colours.
        height: Pixels.
        width: Pixels.
        channels_last: Whether the colours are its last axis.
    """

    channels: int
    height: int
    width: int
    channels_last: bool


def image_inputs(analysis: Analysis, samples: Samples) -> dict[str, Image]:
    """Return the inputs that take images: four axes, one or three colours, at least 8 x 8 pixels."""
    found = {}
    for name in samples.batched:
        image = _image(analysis, name, samples.dims[name])
        if image is not None:
            found[name] = image
    return found


def _image(analysis: Analysis, name: str, dims: tuple[int, ...]) -> Image | None:
    if len(dims) != 4 or analysis.graph.inputs[name].type.tensor_type.elem_type not in _PIXEL_TYPES:
        return None
    for last in (False, True):
        channels, height, width = (dims[3], dims[1], dims[2]) if last else dims[1:]
        if channels in {1, 3} and min(height, width) >= _SMALLEST_SIDE:
            return Image(channels, height, width, last)
    return None


@dataclass(frozen=True)
class Split:
    """Samples in runs, the last of them held back.

    Attributes:
        samples: The samples.
        used: How many runs, from the first on, are to fit on; the others are held back.
    """

    samples: Samples
    used: int


def split_and_vary(
    samples: Samples, images: Mapping[str, Image], views: int, batch: int, rng: np.random.Generator
) -> Split | None:
    """Hold samples back, take more views of the others, and arrange all in runs.

    Views are mirrored and shifted, as training pipelines make them. The original network says what it makes of each, so
    they need no labels, and a few hundred images say as much as some thousand.

    Args:
        samples: The samples.
        images: Where inputs that are images have their pixels; without any there is one view.
        views: How many views of each to use, from 1 to `MOST_VIEWS`.
        batch: How many samples a run should have at most, where the network takes any number.
        rng: Source of the order and of the shifts.

    Returns:
        The samples in runs; None if there are too few to hold any back.
    """
    runs = samples.in_batches(max(1, min(batch, samples.count // HELD_BACK)))
    total = runs.count // runs.batch
    used = total - max(1, total // HELD_BACK)
    if used < 1:
        return None
    if not images or samples.batched != set(samples.arrays):
        return Split(runs, used)
    # Images that are held back have no other view among those to fit on.
    kept = used * runs.batch
    order = rng.permutation(kept * views)
    moves = rng.uniform(-1.0, 1.0, (views, kept, 2))
    arrays = {}
    for name, array in runs.arrays.items():
        seen = [_view(array[:kept], images.get(name), view, moves[view]) for view in range(views)]
        arrays[name] = np.concatenate([np.concatenate(seen)[order], array[kept : runs.count]])
    return Split(replace(runs, arrays=arrays), used * views)


def _view(array: AnyArray, image: Image | None, number: int, moves: FloatArray) -> AnyArray:
    """Return one of the views of images, shifted by some share of the most that they may be; other inputs stay."""
    if image is None:
        return array
    mirrored, shifted = _VIEWS[number]
    down, along = (1, 2) if image.channels_last else (2, 3)
    seen = np.flip(array, along) if mirrored else array
    if not shifted:
        return seen
    moved = np.empty_like(seen)
    steps = np.rint(moves * [image.height / _SHIFT, image.width / _SHIFT]).astype(np.int64)
    for i, (dy, dx) in enumerate(steps):
        rows, columns = _reflected(image.height, int(dy)), _reflected(image.width, int(dx))
        moved[i] = np.take(np.take(seen[i], rows, axis=down - 1), columns, axis=along - 1)
    return moved


def _reflected(size: int, offset: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return which pixel comes to each place of a shifted side; behind the margin is its mirror image.

    Example:
        >>> _reflected(4, 1).tolist(), _reflected(4, -2).tolist()
        ([1, 2, 3, 2], [2, 1, 0, 1])
    """
    where = np.abs(np.arange(size) + offset)
    return np.where(where < size, where, 2 * (size - 1) - where)
