"""Top-1 accuracy of a classifier, where the user's data has labels."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from onnxfuse.arrays import IntArray
from onnxfuse.errors import DataError
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples, read_arrays

__all__ = ["LABELS", "measure_accuracy", "split_labels"]

LABELS = "labels"
"""The name under which a data file holds the right class of every sample."""

_Arrays: TypeAlias = Mapping[str, np.ndarray[Any, np.dtype[Any]]]


def split_labels(
    data: str | os.PathLike[str] | _Arrays | None, graph: GraphView
) -> tuple[_Arrays | None, IntArray | None]:
    """Take the labels out of a data set.

    Returns:
        The inputs, and the labels, shape (samples,), int64; None where there are none.

    Raises:
        DataError: The file can't be read, or the labels are not whole numbers, one for each sample.
    """
    if data is None:
        return None, None
    if isinstance(data, Mapping):
        arrays = {name: np.asarray(array) for name, array in data.items()}
    else:
        arrays = read_arrays(Path(data))
    if LABELS not in arrays or LABELS in graph.inputs:
        return arrays, None
    labels = arrays.pop(LABELS)
    count = max((len(a) for a in arrays.values() if a.ndim), default=0)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        what = f"the labels have shape {labels.shape} and type {labels.dtype}"
        mend = f"they must be whole numbers, one for each of the {count} samples"
        raise DataError(what, where=LABELS, mend=mend)
    return arrays, labels.astype(np.int64)


def measure_accuracy(session: Session, samples: Samples, labels: IntArray) -> float:
    """Return the share of samples whose largest entry in the first output is at the label, 0 to 1.

    Raises:
        DataError: The first output is not one row of scores for each sample.
        RuntimeFailedError: A run failed.
    """
    right, seen = 0, 0
    for feeds in samples.feeds(rest=True):
        scores = np.asarray(next(iter(session.run(feeds).values())))
        rows = scores.reshape(len(scores), -1) if scores.ndim > 1 else scores.reshape(1, -1)
        if len(rows) != min(samples.batch, samples.total - seen) or rows.shape[1] < 2:
            what = f"the first output has shape {scores.shape}, which is not one row of scores for each sample"
            raise DataError(what, where=session.output_names[0], mend="leave the labels out of the data")
        right += int((rows.argmax(axis=1) == labels[seen : seen + len(rows)]).sum())
        seen += len(rows)
    return right / seen
