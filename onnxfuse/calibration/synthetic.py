"""Samples from pictures, and where the user gives none: dead leaves and sounds, scaled as the network expects them.

A file does not say how its images were normalised. Integer types tell their range. For floats the network tells: the
first batch normalisations state what they saw in training, and where there are none, pixels of a wrong scale make
outputs that hardly depend on the image.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from onnx import TensorProto

from onnxfuse.analysis import Analysis
from onnxfuse.calibration.batches import in_larger_runs
from onnxfuse.calibration.dreams import dream
from onnxfuse.calibration.images import Image, image_inputs
from onnxfuse.calibration.pictures import read_pictures
from onnxfuse.calibration.sounds import sound_inputs
from onnxfuse.config import CompressionConfig, Pixels
from onnxfuse.errors import DataError
from onnxfuse.gradient.forward import with_outputs
from onnxfuse.graph.view import NodeView
from onnxfuse.proof.random_samples import samples_like
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples
from onnxfuse.proof.values import value_hints
from onnxfuse.statistics.dead_leaves import dead_leaves
from onnxfuse.statistics.sounds import sounds

__all__ = ["Synthetic", "calibration_samples"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# How many samples, and multiply-accumulates for one pass over all of them.
_MOST, _FEWEST = 512, 16
_MACS = 60_000_000_000
_NUMBERS = 24_000_000
# Multiply-accumulates to move images towards classes with.
_DREAM_MACS = 1.5e12
# Images from which the scale is told.
_TRIALS = 16
# Means and deviations of red, green and blue over ImageNet, which most training pipelines divide by.
_MEAN, _DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
# Outputs vary so many times more at the right scale, if the other is wrong by a factor of a hundred.
_LIVELIER = 4.0
# What recordings of 16 bits are multiplied by that are not divided by it.
_SIXTEEN_BITS = 32768.0

_Scale = TypeVar("_Scale", str, float)


@dataclass(frozen=True)
class Synthetic:
    """Samples that were made up.

    Attributes:
        samples: The samples.
        is_like_data: Whether they are like what such networks see: images, tokens or sounds, not mere random numbers.
        note: What else a reader of results should know of them; empty if there is nothing.
        runs: The same, several at once if the network can be made to take them; None where that was not looked into.
    """

    samples: Samples
    is_like_data: bool
    note: str = ""
    runs: Samples | None = None


def calibration_samples(
    analysis: Analysis, samples: Samples, config: CompressionConfig, folder: Path | None = None
) -> Synthetic:
    """Make samples for a calibration from pictures, or without data.

    Args:
        analysis: The network.
        samples: One synthetic run that it works with; its shapes are kept.
        config: Where to run, the seed of the images, and how pixels become inputs.
        folder: A folder of pictures; None for made-up images.

    Raises:
        DataError: No picture can be read, the network takes none, or pixels can't become its inputs as asked for.
        RuntimeFailedError: ONNX Runtime could not run the network.
    """
    tables = dict(_tables(analysis))
    images = image_inputs(analysis, samples)
    numbers = sum(int(np.prod(dims)) for dims in samples.dims.values()) // max(samples.batch, 1)
    count = min(_MACS // max(analysis.cost.macs, 1), _NUMBERS // max(numbers, 1), _MOST)
    rng = np.random.default_rng(config.seed)
    pictures: Mapping[str, AnyArray] = {}
    note = ""
    if folder is not None:
        pictures, note = _pictures(folder, images, count)
        count = len(next(iter(pictures.values())))
    count = max(count, 1 if folder else _FEWEST)
    plain = samples_like(analysis.graph, samples, config.seed, count)
    if not images:
        tokens = {
            name: _tokens(array, table, rng) for name, array in plain.arrays.items() if (table := tables.get(name))
        }
        heard = sound_inputs(analysis, samples)
        if heard:
            return Synthetic(_sounding(analysis, plain, heard, config, rng), is_like_data=True)
        origin = f"{plain.count} rows of random tokens (seed {config.seed})" if tokens else plain.origin
        return Synthetic(replace(plain, arrays={**plain.arrays, **tokens}, origin=origin), is_like_data=bool(tokens))
    leaves = pictures or {
        name: dead_leaves(_count(plain.arrays[name], image), image.height, image.width, image.channels, rng)
        for name, image in images.items()
    }
    scaled = {name: _scalings(analysis, name, image) for name, image in images.items()}
    word = _right_scale(analysis, plain, leaves, scaled, images, config)
    arrays = {**plain.arrays, **{n: _as_input(scaled[n][word](leaves[n]), images[n], plain, n) for n in images}}
    words = f"{plain.count} synthetic images (dead leaves, seed {config.seed}; pixels {word})"
    if folder is not None:
        words = f"{plain.count} pictures from {folder} (pixels {word})"
        return Synthetic(replace(plain, arrays=arrays, origin=words), is_like_data=True, note=note)
    return _dreamt(analysis, replace(plain, arrays=arrays, origin=words), images, config)


def _dreamt(analysis: Analysis, leaves: Samples, images: Mapping[str, Image], config: CompressionConfig) -> Synthetic:
    """Return dead leaves that show a classifier something of every class, as far as the effort allows."""
    if config.effort == 0:
        return Synthetic(leaves, is_like_data=True)
    runs = in_larger_runs(analysis, leaves, config.provider)
    moved = dream(analysis, runs, images, config.provider, config.seed, config.effort * _DREAM_MACS)
    if moved is None:
        return Synthetic(leaves, is_like_data=True, runs=runs)
    origin = leaves.origin.replace("dead leaves", "dead leaves, some of them moved towards random classes")
    return Synthetic(replace(leaves, arrays=moved.arrays, origin=origin), is_like_data=True, runs=moved)


def _sounding(
    analysis: Analysis, plain: Samples, heard: Mapping[str, int], config: CompressionConfig, rng: np.random.Generator
) -> Samples:
    """Return made-up sounds, as loud as recordings that go from -1 to 1, or to 32768 if the network tells that."""
    waves = {name: sounds(len(plain.arrays[name]), length, rng) for name, length in heard.items()}

    def at(scale: float, few: Samples) -> dict[str, AnyArray]:
        like = few.arrays
        return {n: (scale * w[: len(like[n])]).reshape(like[n].shape).astype(like[n].dtype) for n, w in waves.items()}

    loud = _suits(analysis, plain, at, (1.0, _SIXTEEN_BITS), config) == _SIXTEEN_BITS
    words = "from -32768 to 32767" if loud else "from -1 to 1"
    origin = f"{plain.count} synthetic sounds (tones and noise, seed {config.seed}; {words})"
    return replace(plain, arrays={**plain.arrays, **at(_SIXTEEN_BITS if loud else 1.0, plain)}, origin=origin)


def _pictures(folder: Path, images: Mapping[str, Image], most: int) -> tuple[dict[str, AnyArray], str]:
    """Return the pictures of a folder by the name of the input that takes them, and a note of those left out."""
    if len(images) != 1:
        what = "pictures are for networks with one input that takes images"
        raise DataError(what, where=str(folder), mend="give an .npz file with an array for every input")
    name, image = next(iter(images.items()))
    found = read_pictures(folder, image.height, image.width, image.channels, max(most, 1))
    if not found.unreadable:
        return {name: found.pixels}, ""
    total = len(found.pixels) + len(found.unreadable)
    left_out = f"{len(found.unreadable)} of the {total} pictures can't be read and are left out"
    return {name: found.pixels}, f"{left_out}, the first of them {str(found.unreadable[0])!r}"


def _tables(analysis: Analysis) -> Iterator[tuple[str, int]]:
    """Yield the inputs that look tokens up in a table, perhaps in another shape, with the table's length."""
    for name in analysis.graph.inputs:
        below = value_hints(analysis.graph, name).below
        if below is not None:
            yield name, below


def _tokens(like: AnyArray, table: int, rng: np.random.Generator) -> AnyArray:
    found: AnyArray = rng.integers(0, table, like.shape).astype(like.dtype)
    return found


def _scalings(analysis: Analysis, name: str, image: Image) -> dict[str, Callable[[AnyArray], AnyArray]]:
    """Return the ways in which pixels from 0 to 1 may become the input, the usual one first."""
    kind = analysis.graph.inputs[name].type.tensor_type.elem_type
    if kind == TensorProto.UINT8:
        return {str(Pixels.BYTES): lambda x: np.round(255 * x)}
    if kind == TensorProto.INT8:
        return {str(Pixels.SIGNED): lambda x: np.round(255 * x) - 128}
    mean, deviation = (_MEAN, _DEVIATION) if image.channels == 3 else (_MEAN[:1], _DEVIATION[:1])
    return {
        str(Pixels.STANDARDISED): lambda x: (x - mean[:, None, None]) / deviation[:, None, None],
        str(Pixels.BYTES): lambda x: 255 * x,
        str(Pixels.SIGNED): lambda x: 255 * x - 128,
        str(Pixels.SYMMETRIC): lambda x: 2 * x - 1,
        str(Pixels.UNIT): lambda x: x,
    }


def _count(array: AnyArray, image: Image) -> int:
    """Return how many images there are in an array; several in a run have an axis of their own behind that of runs."""
    return array.size // (image.height * image.width * image.channels)


def _as_input(pixels: AnyArray, image: Image, samples: Samples, name: str) -> AnyArray:
    laid = pixels.transpose(0, 2, 3, 1) if image.channels_last else pixels
    return np.ascontiguousarray(laid).reshape(samples.arrays[name].shape).astype(samples.arrays[name].dtype)


def _right_scale(
    analysis: Analysis,
    plain: Samples,
    leaves: Mapping[str, AnyArray],
    scaled: Mapping[str, Mapping[str, Callable[[AnyArray], AnyArray]]],
    images: Mapping[str, Image],
    config: CompressionConfig,
) -> str:
    """Return the scaling that suits the network, or is asked for; the same for all inputs."""
    words = tuple(dict.fromkeys(word for choices in scaled.values() for word in choices))
    if config.pixels is not Pixels.AUTO:
        if not all(str(config.pixels) in choices for choices in scaled.values()):
            what = f"pixels can't be {str(config.pixels)!r} for inputs of this type"
            raise DataError(what, where="--pixels", mend=f"possible: {', '.join(words)}")
        return str(config.pixels)
    if any(len(choices) == 1 for choices in scaled.values()):
        return next(iter(next(choices for choices in scaled.values() if len(choices) == 1)))

    def at(word: str, few: Samples) -> dict[str, AnyArray]:
        counts = {n: _count(few.arrays[n], images[n]) for n in images}
        return {n: _as_input(scaled[n][word](leaves[n][: counts[n]]), images[n], few, n) for n in images}

    return _suits(analysis, plain, at, words, config)


def _suits(
    analysis: Analysis,
    plain: Samples,
    at: Callable[[_Scale, Samples], Mapping[str, AnyArray]],
    scales: Sequence[_Scale],
    config: CompressionConfig,
) -> _Scale:
    """Return the scale that suits the network best: of inputs with those of the usual one first, raw ones second."""
    norms = list(_first_norms(analysis))
    model = with_outputs(analysis.graph.model, dict.fromkeys(norm.inputs[0] for norm in norms))
    session = Session(model, config.provider, name=f"the original model {analysis.source.name!r}")
    strangeness, liveliness = {}, {}
    few = -(-_TRIALS // plain.batch) * plain.batch
    some = replace(plain, arrays={name: array[:few] for name, array in plain.arrays.items()})
    for scale in scales:
        arrays = {**some.arrays, **at(scale, some)}
        runs = [session.run(feeds) for feeds in replace(some, arrays=arrays).feeds()]
        strangeness[scale] = float(np.mean([_strangeness(analysis, norm, runs) for norm in norms])) if norms else 0.0
        liveliness[scale] = _liveliness([[run[name] for run in runs] for name in analysis.graph.outputs])
    if norms:
        return min(scales, key=lambda scale: strangeness[scale])
    usual, raw = scales[0], scales[1]
    return raw if liveliness[raw] > _LIVELIER * liveliness[usual] else usual


def _first_norms(analysis: Analysis) -> Iterator[NodeView]:
    """Yield the first normalisations whose statistics are stored: far from the input every scale looks alike."""
    nodes = (analysis.graph.nodes[index] for index in analysis.channels.normalising)
    stored = (node for node in nodes if all(node.inputs[slot] in analysis.graph.constants for slot in (3, 4)))
    yield from islice(stored, 2)


def _strangeness(analysis: Analysis, norm: NodeView, runs: list[dict[str, Any]]) -> float:
    """Return how far a normalisation's input is from what the file states of it: 0 if mean and variance agree."""
    mean, variance = (analysis.graph.array(norm.inputs[slot]).astype(np.float64) for slot in (3, 4))
    values = np.concatenate([run[norm.inputs[0]] for run in runs]).astype(np.float64)
    seen = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
    deviation = np.sqrt(variance) + 1e-12
    shift = np.abs(seen.mean(axis=1) - mean) / deviation
    return float(np.mean(np.log1p(shift) + np.abs(np.log((seen.std(axis=1) + 1e-12) / deviation))))


def _liveliness(outputs: list[list[Any]]) -> float:
    """Return how much outputs vary from image to image, against their size."""
    found = []
    for runs in outputs:
        if all(isinstance(y, np.ndarray) and y.dtype.kind == "f" and y.ndim for y in runs):
            values = [np.asarray(y, np.float64) for y in runs]
            stacked = np.stack(values) if len(values[0]) == 1 else np.concatenate(values)
            size = float(np.abs(stacked).mean())
            found.append(float(stacked.std(axis=0).mean()) / size if size > 0 else 0.0)
    return float(np.mean(found)) if found else 0.0
