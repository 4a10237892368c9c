"""Inputs to run a model on, and how the user's are read.

A samples file is an ``.npz`` keyed by input name whose first axis runs over samples. Where the model's input has the
samples on its own first axis (a batch), the array has the rank of the input; where it has not, one more.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper

from onnxfuse.arrays import is_finite
from onnxfuse.errors import DataError, UnsupportedGraphError
from onnxfuse.graph.view import GraphView

__all__ = ["Samples", "arrange", "load_samples", "read_arrays", "stated_dims", "whole_batches"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_LARGEST_BATCH = 64
# What NumPy raises for files that are not its own, are cut short or hold pickles (the first four), and zipfile for
# archives that are packed in a way it does not know (NotImplementedError) or are encrypted (RuntimeError).
_DAMAGED = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Samples:
    """Inputs for several runs.

    Attributes:
        arrays: By input name; the first axis runs over samples.
        dims: The shape that each input has in one run, with the batch that is used.
        origin: Where they are from, in words for reports.
        batched: Inputs whose own first axis runs over samples; the others get one sample a run.
        batch: How many samples one run takes.
        compared: Whether the numbers that the graph compares inputs with are among synthetic ones.
        divisible: Whether a run may have fewer samples than ``batch``.
    """

    arrays: Mapping[str, AnyArray]
    dims: Mapping[str, tuple[int, ...]]
    origin: str
    batched: frozenset[str]
    batch: int
    compared: bool = False
    divisible: bool = False

    @property
    def count(self) -> int:
        """How many samples there are in full batches; 1 for a model without inputs."""
        if not self.arrays:
            return 1
        return len(next(iter(self.arrays.values()))) // self.batch * self.batch

    @property
    def total(self) -> int:
        """How many samples a comparison looks at: all of them, if the last run may have fewer than the others."""
        return len(next(iter(self.arrays.values()))) if self.arrays and self.divisible else self.count

    def in_batches(self, most: int) -> "Samples":
        """Return the samples, at most so many in one run, if the model takes any number at once.

        Some of the last may be left out: fewer than there are in a run.
        """
        if self.batch <= most or not self.divisible:
            return self
        batch, _ = whole_batches(self.total, max(most, 1))
        dims = {name: (batch, *d[1:]) for name, d in self.dims.items()}
        return replace(self, batch=batch, dims=dims)

    def in_whole_runs(self, batch: int) -> "Samples":
        """Return the samples, just so many in every run: the model states any number and takes this one alone."""
        dims = {name: (batch, *d[1:]) for name, d in self.dims.items()}
        return replace(self, batch=batch, dims=dims, divisible=False)

    @property
    def broken(self) -> int:
        """How many samples of a comparison have a value that is NaN or infinite."""
        found = np.zeros(len(next(iter(self.arrays.values()), ())), bool)
        for array in self.arrays.values():
            found |= ~is_finite(array).all(axis=tuple(range(1, array.ndim)))
        return int(found[: self.total].sum())

    @property
    def note(self) -> str:
        """What a reader of results should know of them; empty if there is nothing."""
        if not self.broken:
            return ""
        found = f"{self.broken} of the {self.total} samples have values that are NaN or infinite"
        return f"{found}; what these reach is not counted"

    def refuse_broken(self) -> None:
        """Refuse samples of which not one is sound.

        Raises:
            DataError: Every one of them has a value that is NaN or infinite.
        """
        if not 0 < self.total == self.broken:
            return
        name, array = next((n, a) for n, a in self.arrays.items() if not is_finite(a).all())
        place = np.argwhere(~is_finite(array))[0]
        what = f"every one of the {self.total} samples has values that are NaN or infinite"
        where = f"{name!r} of sample {place[0]}, at {tuple(map(int, place[1:]))}: {array[tuple(place)]}"
        mend = "look where the samples were prepared: a division by zero, a logarithm of 0, or numbers never filled in"
        raise DataError(what, where=where, mend=mend)

    def sound_feeds(self) -> dict[str, AnyArray]:
        """Return the feeds of the first run whose values are all finite; of the first run if there is none."""
        sound = (feeds for feeds in self.feeds() if all(is_finite(array).all() for array in feeds.values()))
        return next(sound, next(self.feeds()))

    def feeds(self, *, rest: bool = False) -> Iterator[dict[str, AnyArray]]:
        """Yield the feeds of one run after the other.

        Args:
            rest: Whether samples that fill no run come last, if the model takes fewer; a calibration leaves them out.
        """
        for start in range(0, self.total if rest else self.count, self.batch):
            yield {
                name: np.asarray(a[start : start + self.batch] if name in self.batched else a[start], order="C")
                for name, a in self.arrays.items()
            }


def load_samples(path: str | os.PathLike[str] | Mapping[str, AnyArray], graph: GraphView, origin: str = "") -> Samples:
    """Read samples for a model's inputs and check that they fit.

    Args:
        path: An ``.npz`` file, or arrays by input name.
        graph: The model.
        origin: Where arrays are from, for messages and reports; empty for a path.

    Raises:
        DataError: The file can't be read, or names, shapes, data types or numbers of samples do not fit.
    """
    where = origin or ("the arrays given" if isinstance(path, Mapping) else str(path))
    arrays = _as_arrays(path) if isinstance(path, Mapping) else read_arrays(Path(path))
    names = list(graph.inputs)
    if len(names) == len(arrays) == 1 and next(iter(arrays)) == "arr_0":
        arrays = {names[0]: arrays["arr_0"]}
    for word, odd in (
        ("no", [n for n in names if n not in arrays]),
        ("an unknown", [n for n in arrays if n not in names]),
    ):
        if odd:
            what = f"there is {word} array called {odd[0]!r}"
            raise DataError(what, where=where, mend=f"name the arrays like the model's inputs: {', '.join(names)}")
    counts = {name: len(a) if a.ndim else 0 for name, a in arrays.items()}
    mend = "the first axis of every array runs over samples, at least one"
    for name in (name for name, number in counts.items() if not number):
        what = f"{name!r} has shape {arrays[name].shape}, so it holds no samples"
        raise DataError(what, where=where, mend=mend)
    if len(set(counts.values())) > 1:
        what = f"the arrays have different numbers of samples: {counts}"
        raise DataError(what, where=where, mend=mend)
    fitted = {name: _fit(name, a, graph.inputs[name], where) for name, a in arrays.items()}
    return arrange(fitted, graph, where, f"{next(iter(counts.values()), 1)} samples from {where}")


def read_arrays(path: Path) -> dict[str, AnyArray]:
    """Read an ``.npz`` file, or an ``.npy`` file as one array called ``arr_0``.

    Raises:
        DataError: There is no such file, or it is not one of NumPy's.
    """
    try:
        # NumPy leaves a file open that it opened itself and can't read.
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"arr_0": loaded}
            with loaded as file:
                arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        what = "there is no such samples file"
        raise DataError(what, where=str(path), mend="check the path") from error
    except IsADirectoryError as error:
        what = "this is a folder, not a samples file"
        raise DataError(what, where=str(path), mend="name the .npz file inside it") from error
    except _DAMAGED as error:
        raise _not_arrays(path) from error
    except OSError as error:
        what = f"the samples file can't be read: {error.strerror or error}"
        raise DataError(what, where=str(path), mend="check its permissions") from error
    # NumPy hands out what is in the archive but not an array as bytes.
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise _not_arrays(path)
    return arrays


def _not_arrays(path: Path) -> DataError:
    what = "this is not an .npz file of plain arrays, or it is damaged"
    return DataError(what, where=str(path), mend="write it with numpy.savez(path, input_name=array)")


def _as_arrays(given: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """Accept whatever NumPy can make arrays of, such as lists."""
    return {name: np.asarray(array) for name, array in given.items()}


def stated_dims(info: onnx.ValueInfoProto) -> list[int | None]:
    """Return the dimensions that the file states of an input; None for those that it leaves open.

    Raises:
        UnsupportedGraphError: It is not a tensor.
    """
    if not info.type.HasField("tensor_type"):
        kind = info.type.WhichOneof("value")
        what = f"input {info.name!r} is not a tensor but a {kind}"
        raise UnsupportedGraphError(what, mend="onnxfuse can't make or feed such inputs")
    return [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in info.type.tensor_type.shape.dim
    ]


def _fit(name: str, array: AnyArray, info: onnx.ValueInfoProto, where: str) -> AnyArray:
    dims = stated_dims(info)
    wanted = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
    shape = "x".join("?" if d is None else str(d) for d in dims) or "a scalar"
    if array.ndim not in {len(dims), len(dims) + 1} or array.ndim == 0:
        what = f"{name!r} has shape {array.shape}, which fits no batch of {shape}"
        raise DataError(what, where=where, mend="the first axis runs over samples, the others are the model's")
    inner = dims[1:] if array.ndim == len(dims) else dims
    if any(d is not None and d != s for d, s in zip(inner, array.shape[1:], strict=True)):
        what = f"{name!r} has shape {array.shape}, but the model takes {shape}"
        raise DataError(what, where=where, mend="prepare the samples as the model expects them")
    if array.dtype == wanted:
        return array
    if array.dtype.kind == "f" and wanted.kind in "fV":
        return array.astype(wanted)
    what = f"{name!r} is of type {array.dtype}, but the model takes {wanted}"
    raise DataError(what, where=where, mend=f"store it with .astype(numpy.{wanted})")


def arrange(
    arrays: Mapping[str, AnyArray], graph: GraphView, where: str, origin: str, batch: int | None = None
) -> Samples:
    """Choose the batch: all inputs must be batched for more than one sample a run, and a stated batch is kept.

    Args:
        arrays: By input name; the first axis runs over samples.
        graph: The model.
        where: Where they are from, for messages.
        origin: Where they are from, for reports.
        batch: How many samples the model takes at once, if it is known to take no other number.

    Raises:
        DataError: The model states different batches, or a larger one than there are samples.
    """
    stated = {name: stated_dims(graph.inputs[name]) for name in arrays}
    batched = frozenset(name for name, a in arrays.items() if a.ndim == len(stated[name]))
    count = len(next(iter(arrays.values()))) if arrays else 1
    fixed = {size for name in batched if (size := stated[name][0]) is not None}
    if len(fixed) > 1 or (len(batched) < len(arrays) and fixed - {1}):
        what = f"the model states different batches for its inputs: {sorted(fixed)}"
        raise DataError(what, where=where, mend="give each array one axis more than its input: (samples, *input shape)")
    is_divisible = not fixed and len(batched) == len(arrays) > 0 and batch is None
    if fixed or len(batched) < len(arrays):
        batch = max(fixed, default=1)
    elif batch is None:
        batch, _ = whole_batches(count)
    if count < batch:
        what = f"{count} samples, but the model takes {batch} at a time"
        raise DataError(what, where=where, mend=f"give a multiple of {batch} samples")
    used = count // batch * batch
    if used < count and not is_divisible:
        origin = f"{origin}, {used} of them in full batches of {batch}"
    dims = {n: (batch, *a.shape[1:]) if n in batched else a.shape[1:] for n, a in arrays.items()}
    return Samples(arrays, dims, origin, batched, batch, divisible=is_divisible)


def whole_batches(count: int, most: int = _LARGEST_BATCH) -> tuple[int, int]:
    """Return how many samples to take at once, at most so many, and how many there are then in whole batches.

    Example:
        >>> whole_batches(512), whole_batches(400), whole_batches(101), whole_batches(159, 19)
        ((64, 512), (50, 400), (50, 100), (13, 156))
    """
    # Of the batches of fair size, the largest of those that leave the fewest samples out.
    few, many = (max(min(count, size), 1) for size in (max(most // 4, min(most, 4)), most))
    fair = range(few, many + 1)
    batch = min(fair, key=lambda size: (count % size, -size))
    return batch, count // batch * batch
