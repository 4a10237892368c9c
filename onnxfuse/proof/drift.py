"""How far a compressed model's outputs are from the original's, on the same inputs."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.arrays import is_finite
from onnxfuse.errors import DataError, ProofError, RuntimeFailedError
from onnxfuse.graph.shapes import infer_dims
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.runtime import Feeds, Session
from onnxfuse.proof.samples import Samples

__all__ = ["Drift", "OutputDrift", "check_at_other_sizes", "measure_drift"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

logger = logging.getLogger(__name__)

_REPORT = "this is a defect of onnxfuse; please report it with the model"
_GENTLER = "a lower ratio, or another method, keeps the numbers in range"

# How many numbers of an output are compared at a time.
_PART = 2**22


@dataclass(frozen=True, slots=True)
class OutputDrift:
    """The drift of one output over all samples.

    Attributes:
        name: The output's name.
        max_abs: Largest absolute difference.
        mean_abs: Mean absolute difference.
        cosine: Cosine of the angle between the outputs as one long vector each, from -1 to 1; None if one is all zero.
        sqnr_db: Signal to difference, 10 log10(sum y^2 / sum (y - y')^2), in dB; None if the difference or y is zero.
        top1_agreement: Share of samples with the same largest entry, for outputs of shape (samples, classes) or
            (samples, classes, 1, 1) with at least 2 classes; None for others.
    """

    name: str
    max_abs: float
    mean_abs: float
    cosine: float | None
    sqnr_db: float | None
    top1_agreement: float | None


@dataclass(frozen=True, slots=True)
class Drift:
    """The drift of all outputs.

    Attributes:
        data: What the inputs were, in words.
        samples: How many samples were run.
        provider: Where they were run: ``cpu`` or ``cuda``.
        outputs: One entry for every output that is a tensor of numbers, and was of the same shape in some run.
        note: Which outputs could not be compared in all runs, and why; empty if all could.
    """

    data: str
    samples: int
    provider: str
    outputs: tuple[OutputDrift, ...]
    note: str = ""


@dataclass
class _Sums:
    """Running sums over batches, float64, of the entries that are finite in the original's output."""

    count: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    dot: float = 0.0
    original: float = 0.0
    compressed: float = 0.0
    difference: float = 0.0
    rows: int = 0
    agreeing: int = 0
    classifies: bool = field(default=True)
    left_out: int = 0

    def add(self, y: AnyArray, z: AnyArray) -> None:
        self._add_classes(y, z)
        y, z = y.reshape(-1), z.reshape(-1)
        for start in range(0, y.size, _PART):
            self._add_part(y[start : start + _PART].astype(np.float64), z[start : start + _PART].astype(np.float64))

    def _add_part(self, a: AnyArray, b: AnyArray) -> None:
        finite = np.isfinite(a)
        self.left_out += int((~finite).sum())
        a, b = a[finite], b[finite]
        gap = a - b
        self.count += a.size
        self.max_abs = max(self.max_abs, float(np.abs(gap).max(initial=0.0)))
        self.sum_abs += float(np.abs(gap).sum())
        self.dot += float(a @ b)
        self.original += float(a @ a)
        self.compressed += float(b @ b)
        self.difference += float(gap @ gap)

    def _add_classes(self, y: AnyArray, z: AnyArray) -> None:
        is_map = y.ndim == 4 and y.shape[2:] == (1, 1)
        self.classifies = self.classifies and (y.ndim == 2 or is_map) and y.shape[1] > 1
        if self.classifies:
            a, b = (x.reshape(y.shape[:2]).astype(np.float64) for x in (y, z))
            known = ~np.isnan(a).any(axis=1)
            same = a[known].argmax(axis=1) == b[known].argmax(axis=1)
            self.rows += len(same)
            self.agreeing += int(same.sum())

    def result(self, name: str) -> OutputDrift:
        if self.left_out and not self.count:
            what = "the original model's output has no finite value on these inputs, so nothing can be compared"
            mend = "check the samples, and that the original model runs well on them"
            raise DataError(what, where=f"output {name!r}", mend=mend)
        product = math.sqrt(self.original * self.compressed)
        cosine = min(1.0, max(-1.0, self.dot / product)) if product else None
        sqnr = 10 * math.log10(self.original / self.difference) if self.original and self.difference else None
        top1 = self.agreeing / self.rows if self.classifies and self.rows else None
        return OutputDrift(name, self.max_abs, self.sum_abs / max(self.count, 1), cosine, sqnr, top1)


def measure_drift(original: Session, compressed: Session, samples: Samples, graph: GraphView | None = None) -> Drift:
    """Run both models on the same samples and compare their outputs wherever the original's are finite.

    Args:
        original: The original.
        compressed: What has been made from it.
        samples: The inputs.
        graph: The original's graph, which tells what sizes of outputs follow from those of inputs; others, such as how
            many boxes a detector finds or how long a voice speaks, may differ. Without it none may.

    Raises:
        DataError: An output of the original is never finite.
        ProofError: Names, shapes or types of the outputs differ, or the compressed model's outputs are not finite where
            the original's are.
        RuntimeFailedError: A run failed.
    """
    if original.output_names != compressed.output_names:
        what = f"the outputs are called {_listed(compressed)}, in the original {_listed(original)}"
        raise ProofError(what, where=compressed.name, mend="compare a model with one that was made from it")
    sums: dict[str, _Sums] = {}
    unlike: dict[str, int] = {}
    runs = 0
    for feeds in samples.feeds(rest=True):
        runs += 1
        before, after = original.run(feeds), compressed.run(feeds)
        for name, y in before.items():
            if not isinstance(y, np.ndarray) or y.dtype.kind not in "fiubV":
                continue
            if graph is not None and _is_of_other_size(name, y, after[name], graph, feeds):
                unlike[name] = unlike.get(name, 0) + 1
            else:
                _check(name, y, after[name])
                sums.setdefault(name, _Sums()).add(y, after[name])
    outputs = tuple(total.result(name) for name, total in sums.items())
    note = "; ".join(
        f"the size of output {name!r} depends on values, and was another one in {count} of {runs} runs, which were not "
        "compared"
        for name, count in unlike.items()
    )
    return Drift(samples.origin, samples.total, str(compressed.provider), outputs, note)


def _is_of_other_size(name: str, y: AnyArray, z: Any, graph: GraphView, feeds: Feeds) -> bool:
    """Whether an output has another size than in the original, and one that no input's size decides."""
    if not isinstance(z, np.ndarray) or (y.ndim, y.dtype) != (z.ndim, z.dtype) or y.shape == z.shape:
        return False
    if name in infer_dims(graph, {fed: array.shape for fed, array in feeds.items()}):
        return False
    if not is_finite(z).all() and is_finite(y).all():
        what = "the output has values that are not finite, where the original has none"
        raise ProofError(what, where=f"output {name!r}", mend=_GENTLER)
    return True


def check_at_other_sizes(original: Session, compressed: Session, graph: GraphView, others: Iterable[Feeds]) -> None:
    """Run both models on inputs of other shapes, and compare the shapes of outputs that follow from them.

    Args:
        original: The original.
        compressed: What has been made from it.
        graph: The original's graph.
        others: Inputs; the first that the original takes are run.

    Raises:
        ProofError: The compressed model does not run on them, or gives other shapes.
    """
    for feeds in others:
        try:
            before = original.run(feeds)
        except RuntimeFailedError as error:
            logger.debug("no comparison at other sizes: %s", error.what)
            continue
        where = ", ".join(f"input {name!r} of shape {array.shape}" for name, array in feeds.items())
        try:
            after = compressed.run(feeds)
        except RuntimeFailedError as error:
            what = f"the original runs at these sizes, and the compressed model does not: {error.what}"
            raise ProofError(what, where=where, mend=_REPORT) from error
        # How many boxes a detector finds, for one, may well differ.
        known = infer_dims(graph, {name: array.shape for name, array in feeds.items()})
        for name in known.keys() & before.keys():
            if np.shape(before[name]) != np.shape(after[name]):
                what = f"output {name!r} is {np.shape(after[name])}, in the original {np.shape(before[name])}"
                raise ProofError(what, where=where, mend=_REPORT)
        return


def _check(name: str, y: AnyArray, z: Any) -> None:
    if not isinstance(z, np.ndarray) or y.shape != z.shape or y.dtype != z.dtype:
        form = f"{z.shape} of {z.dtype}" if isinstance(z, np.ndarray) else type(z).__name__
        what = f"the output is {form}, in the original {y.shape} of {y.dtype}"
        mend = "compare a model with one that was made from it"
        raise ProofError(what, where=f"output {name!r}", mend=mend)
    broken = ~is_finite(z) & is_finite(y)
    if broken.any():
        what = f"the output has {int(broken.sum())} values that are not finite, where the original's are"
        raise ProofError(what, where=f"output {name!r}", mend=_GENTLER)


def _listed(session: Session) -> str:
    return ", ".join(repr(name) for name in session.output_names)
