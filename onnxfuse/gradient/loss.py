r"""Losses, with and without labels, as the gradient of each output: where a backward pass starts.

With labels, the loss of a classifier is the cross entropy, as in training. Without, its own answers stand for labels:
the classes that it finds most likely, or classes drawn from the distribution that it predicts, whose squared gradients
are in the mean the Fisher information (Kunstner, Balles and Hennig, "Limitations of the empirical Fisher approximation
for natural gradient descent", NeurIPS 2019). Cross entropy with the whole predicted distribution is of no use: its
gradient is zero. Networks that are no classifiers get half the squared distance of their outputs from the mean, each
output relative to its variance: what is then measured is how far a change moves what the network says.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np

from onnxfuse.arrays import FloatArray, IntArray
from onnxfuse.config import Provider
from onnxfuse.errors import DataError
from onnxfuse.gradient.forward import final_values, loss_values, with_outputs
from onnxfuse.graph.view import GraphView
from onnxfuse.proof.runtime import Session
from onnxfuse.proof.samples import Samples

__all__ = ["CrossEntropy", "HalfSquares", "Loss", "choose_loss"]

AnyArray: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# How far a row of probabilities may be from a sum of 1.
_SUM_TOLERANCE = 1e-3


class Loss(Protocol):
    """A scalar loss, summed over samples."""

    @property
    def words(self) -> str:
        """What the loss is, for reports."""

    def __call__(self, outputs: Mapping[str, AnyArray], start: int, /) -> Mapping[str, FloatArray]:
        """Return the gradient of each output that the loss depends on.

        Args:
            outputs: The outputs of one run, in order; before they were quantised, if they are.
            start: How many samples there were in the runs before.
        """


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy of the first output, (batch, classes), with labels or what stands for them.

    Where the rows are probabilities already (a network that ends in Softmax), it is minus their logarithm.

    Attributes:
        labels: The class of each sample; None for the most likely one.
        seed: Without labels, a seed to draw classes with from what the network predicts; None for the most likely one.
    """

    labels: IntArray | None = None
    seed: int | None = None

    @property
    def words(self) -> str:
        """What the loss is, for reports."""
        if self.labels is not None:
            return "cross entropy with the labels"
        return "cross entropy with the class that the network finds most likely" + (
            "" if self.seed is None else f", drawn by what it predicts (seed {self.seed})"
        )

    def __call__(self, outputs: Mapping[str, AnyArray], start: int, /) -> Mapping[str, FloatArray]:
        """Return the gradient of the first output."""
        name, output = next(iter(outputs.items()), ("", np.zeros(0)))
        rows = _class_rows(output)
        if rows is None:
            what = f"the first output has shape {output.shape}, which is not one row of scores for each sample"
            raise DataError(what, where=name, mend="leave the labels out of the data")
        is_distribution = _are_distributions(rows)
        likely = rows if is_distribution else _softmax(rows)
        chosen = self._classes(likely, start)
        places = np.arange(len(rows))
        gradient = np.zeros_like(rows)
        if is_distribution:
            gradient[places, chosen] = -1.0 / np.maximum(rows[places, chosen], np.finfo(np.float32).tiny)
        else:
            gradient += likely
            gradient[places, chosen] -= 1.0
        return {name: gradient.reshape(output.shape)}

    def _classes(self, likely: FloatArray, start: int) -> IntArray:
        if self.labels is not None:
            found = self.labels[start : start + len(likely)]
            if len(found) < len(likely) or found.min() < 0 or found.max() >= likely.shape[1]:
                what = f"there are labels from {self.labels.min()} to {self.labels.max()} for {likely.shape[1]} classes"
                raise DataError(what, where="labels", mend="number the classes from 0 on, a label for each sample")
            return found
        if self.seed is None:
            return np.asarray(likely.argmax(axis=1), np.int64)
        drawn = np.random.default_rng([self.seed, start]).random((len(likely), 1))
        below = (likely.cumsum(axis=1) < drawn).sum(axis=1)
        return np.asarray(np.minimum(below, likely.shape[1] - 1), np.int64)


@dataclass(frozen=True)
class HalfSquares:
    """Half the squared distance of every output from its mean, relative to its variance.

    Attributes:
        means: Mean of each output over the samples, without the batch axis where it has one.
        variances: Its variance, summed over its entries.
    """

    means: Mapping[str, FloatArray]
    variances: Mapping[str, float]
    words: str = field(default="half the squared distance of the outputs from their mean", init=False)

    def __call__(self, outputs: Mapping[str, AnyArray], start: int, /) -> Mapping[str, FloatArray]:
        """Return the gradients of all outputs that vary."""
        del start
        return {
            name: (outputs[name].astype(np.float64) - mean) / self.variances[name] for name, mean in self.means.items()
        }


def choose_loss(
    graph: GraphView, samples: Samples, provider: Provider, labels: IntArray | None = None
) -> CrossEntropy | HalfSquares:
    """Return the loss that suits a network.

    A network with one output that has one row of two or more scores for each sample counts as a classifier.

    Args:
        graph: The network.
        samples: What it is to run on.
        provider: Where to run it.
        labels: The right class of each sample, if known.

    Raises:
        DataError: No output varies between the samples.
        RuntimeFailedError: ONNX Runtime could not run the network.
    """
    if labels is not None:
        return CrossEntropy(labels)
    ends = (name for name in final_values(graph) if name in graph.producers)
    session = Session(with_outputs(graph.model, ends), provider)
    totals: dict[str, FloatArray] = {}
    squares: dict[str, FloatArray] = {}
    runs = 0
    for feeds in samples.feeds():
        outputs = loss_values(graph, {**feeds, **session.run(feeds)})
        first = next(iter(outputs.values()), None)
        if len(outputs) == 1 and first is not None and len(first) == samples.batch and _class_rows(first) is not None:
            return CrossEntropy()
        runs += 1
        for name, output in outputs.items():
            value = output.astype(np.float64)
            totals[name] = totals.get(name, 0.0) + value
            squares[name] = squares.get(name, 0.0) + np.square(value)
    means, variances = {}, {}
    for name, total in totals.items():
        # Outputs with the batch in front are averaged over it too.
        over = (0,) if total.ndim and len(total) == samples.batch else ()
        mean, square = (x.mean(axis=over) / runs for x in (total, squares[name]))
        if samples.count == 1:
            mean = np.zeros_like(mean)
        variance = float((square - np.square(mean)).sum())
        if np.isfinite(variance) and variance > 0:
            means[name], variances[name] = mean, variance
    if not means:
        what = "no output of the network is made of floats that vary between samples, so there is no loss"
        raise DataError(what, mend="give more samples, or choose an importance that needs no gradients")
    return HalfSquares(means, variances)


def _class_rows(output: AnyArray) -> FloatArray | None:
    """Return an output as one row of scores for each sample; None if it is not that."""
    if output.ndim < 2 or output.dtype.kind != "f" or max(output.shape[1:]) != output[0].size or output[0].size < 2:
        return None
    return output.reshape(len(output), -1).astype(np.float64)


def _are_distributions(rows: FloatArray) -> bool:
    return bool(rows.min() >= 0 and np.abs(rows.sum(axis=1) - 1).max() < _SUM_TOLERANCE)


def _softmax(rows: FloatArray) -> FloatArray:
    likely: FloatArray = np.exp(rows - rows.max(axis=1, keepdims=True))
    likely /= likely.sum(axis=1, keepdims=True)
    return likely
