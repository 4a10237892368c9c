"""Made-up images that show a classifier something of every class.

Dead leaves look alike to the late layers of a network that knows a thousand classes: it sees a few of them, and
channels that tell the others apart seem superfluous. So images are moved, by gradients of the network's own, towards
classes drawn at random, until it finds them there (class-conditional inversion: Yin et al., "Dreaming to distill", CVPR
2020, without the batch statistics that they lean on, which most files have folded away). Gradients are smoothed at
several scales: what makes natural images is not the finest grain.

As large a share of the images is moved as the share of the classes that dead leaves do not show. If all were moved, a
network for few classes, which finds most of them in dead leaves, would seem to do nothing but tell classes apart.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.calibration.batches import for_samples
from onnxfuse.calibration.images import Image
from onnxfuse.config import Provider
from onnxfuse.errors import DataError, UnsupportedGraphError
from onnxfuse.gradient import GradientNetwork, choose_loss
from onnxfuse.gradient.forward import final_values, with_outputs
from onnxfuse.gradient.loss import CrossEntropy
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples, whole_batches

__all__ = ["dream"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# How far the first step goes, in root mean squares over the range of pixels; later ones go less far, down to a quarter.
_STEPS, _STEP = 16, 0.02
_LAST = 0.25
# Deviations of the Gaussians that smooth gradients, in pixels of an image with a side of 160.
_SCALES = (0.0, 1.0, 2.0, 4.0)
_SIDE = 160
# A step runs the network once forward, and backward to its input alone.
_PASSES = 2
# The range of pixels is about so many of their deviations.
_DEVIATIONS = 4.0
# From integers to numbers that have gradients.
_DECODERS = frozenset({"Cast", "DequantizeLinear"})
_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE})


def dream(
    analysis: Analysis, samples: Samples, images: Mapping[str, Image], provider: Provider, seed: int, macs: float
) -> Samples | None:
    """Move images towards random classes: the more, the fewer of the classes the network finds in them.

    Args:
        analysis: The network.
        samples: Images to begin with, in runs as large as they can be.
        images: Where inputs that are images have their pixels.
        provider: Where to run.
        seed: Seed of which images, and which classes.
        macs: How many multiply-accumulates it may take.

    Returns:
        The samples, some of them moved; None where the network is no classifier of images that has gradients, or the
        budget is too small for a single run.

    Raises:
        RuntimeFailedError: ONNX Runtime could not run the network.
    """
    affordable = int(macs / (_PASSES * _STEPS * max(analysis.cost.macs, 1)))
    if affordable == 0 or len(images) != 1:
        return None
    name, image = next(iter(images.items()))
    graph = GraphView(for_samples(analysis.graph.model, samples))
    value = _first_floats(analysis, name)
    if value is None:
        return None
    rng = np.random.default_rng([seed, samples.count])
    try:
        if not isinstance(choose_loss(graph, _taken(samples, np.arange(samples.batch)), provider), CrossEntropy):
            return None
        found = _classes(graph, samples, provider)
        wanted = round((1.0 - _effective(found) / len(found)) * samples.count)
        chosen = rng.permutation(samples.count)[: min(affordable, wanted)]
        few = _taken(samples, chosen)
        if few.count == 0:
            return None
        classes = rng.integers(0, len(found), few.count)
        network = GradientNetwork(graph, few, [value], CrossEntropy(classes), provider)
    except (DataError, UnsupportedGraphError):
        return None
    runs = [_moved(network, feeds, name, value, image, run) for run, feeds in enumerate(network.samples.feeds())]
    moved = np.concatenate(runs)
    array = samples.arrays[name].copy()
    array[chosen[: len(moved)]] = moved
    return replace(samples, arrays={**samples.arrays, name: array})


def _taken(samples: Samples, chosen: IntArray) -> Samples:
    """Return the chosen samples, as far as they make whole runs; these may be smaller."""
    batch = whole_batches(len(chosen), samples.batch)[0] if samples.divisible else samples.batch
    whole = chosen[: len(chosen) // batch * batch]
    arrays = {name: array[whole] for name, array in samples.arrays.items()}
    return replace(samples, arrays=arrays, batch=batch, dims={n: (batch, *d[1:]) for n, d in samples.dims.items()})


def _first_floats(analysis: Analysis, name: str) -> str | None:
    """Return the first value with the pixels of an input that has gradients: itself, unless it is made of integers."""
    while analysis.shapes.types.get(name) not in _FLOATS:
        reader = analysis.graph.sole_reader(name)
        if reader is None or reader.op not in _DECODERS:
            return None
        name = reader.outputs[0]
    return name


def _classes(graph: GraphView, samples: Samples, provider: Provider) -> IntArray:
    """Return in how many samples a classifier finds each class, shape (classes,)."""
    name = final_values(graph)[0]
    session = Session(with_outputs(graph.model, [name]), provider)
    counts: IntArray = np.zeros(1, np.int64)
    for feeds in samples.feeds():
        scores = session.run(feeds)[name]
        rows = scores.reshape(len(scores), -1)
        counts = counts + np.bincount(rows.argmax(axis=1), minlength=rows.shape[1]).astype(np.int64)
    return counts


def _effective(counts: IntArray) -> float:
    """Return how many classes of equal size are as varied as these: the exponential of their entropy.

    Example:
        >>> round(_effective(np.array([5, 5, 0, 0])), 6), round(_effective(np.array([9, 1])), 2)
        (2.0, 1.38)
    """
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _moved(
    network: GradientNetwork, feeds: Mapping[str, AnyArray], name: str, value: str, image: Image, run: int
) -> AnyArray:
    """Return the images of one run, moved towards their classes."""
    first = feeds[name]
    pixels = first.astype(np.float64)
    low, high = pixels.min(), pixels.max()
    size = _DEVIATIONS * float(pixels.std())
    for step in range(_STEPS):
        at = np.rint(pixels) if first.dtype.kind in "iu" else pixels
        batch = network({**feeds, name: at.astype(first.dtype)}, run * network.samples.batch)
        gradient = _smoothed(batch.gradients[value].astype(np.float64), image)
        pixels = np.clip(pixels - _STEP * _share(step) * size * gradient, low, high)
    found: AnyArray = (np.rint(pixels) if first.dtype.kind in "iu" else pixels).astype(first.dtype)
    return found


def _share(step: int) -> float:
    """Return how far a step goes, as a share of the first: ever less far.

    Example:
        >>> _share(0), _share(8)
        (1.0, 0.625)
    """
    return 1.0 - (1.0 - _LAST) * step / _STEPS


def _smoothed(gradient: FloatArray, image: Image) -> FloatArray:
    """Return the sum of gradients smoothed at several scales, all of one size in each image; that size is 1."""
    from scipy.ndimage import gaussian_filter  # Takes long to import, and few runs need it.

    along = (1, 2) if image.channels_last else (2, 3)
    side = min(image.height, image.width) / _SIDE
    total = np.zeros_like(gradient)
    for scale in _SCALES:
        widths = [scale * side if axis in along else 0.0 for axis in range(gradient.ndim)]
        total += _of_size_one(gaussian_filter(gradient, widths, mode="nearest"))
    return _of_size_one(total)


def _of_size_one(gradient: FloatArray) -> FloatArray:
    """Return gradients with a root mean square of 1 in every image; where there is none, zeros."""
    size = np.sqrt(np.square(gradient).mean(axis=tuple(range(1, gradient.ndim)), keepdims=True))
    scaled: FloatArray = np.divide(gradient, size, out=np.zeros_like(gradient), where=size > 0)
    return scaled
