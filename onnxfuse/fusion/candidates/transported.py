"""Output maps from transport plans: each selected channel takes in what the plan sends to it.

A balanced plan must mix even the channels that should stay whole. So there are relaxed plans, and of every plan a few
blends with the selection. Channels are compared by what they do (the correlation of their activations), and by their
weights as in the paper; the mass of a channel is what its readers hear of it, or the same for all.
"""

from collections.abc import Iterator

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.fusion.candidates.protocol import Known
from onnxfuse.transport import ground_cost, partial, unbalanced
from onnxfuse.transport.solvers import exact

__all__ = ["balanced_transport", "partial_transport", "unbalanced_transport"]

_BLENDS = (0.25, 0.5, 1.0)
_REACHES = (1.0, 3.0)
_SHARES = (0.6, 0.8)


def balanced_transport(known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
    """Yield blends with exact plans.

    Args:
        known: What is known about the group's C channels, and which K are selected.
        rng: Not used.
    """
    del rng
    for cost, a, b in _problems(known):
        yield from _blends(known, exact(cost, a, b, regularisation=1.0).plan)


def unbalanced_transport(known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
    """Yield blends with plans that leave mass behind where it is too far from every selected channel.

    Args:
        known: What is known about the group's C channels, and which K are selected.
        rng: Not used.
    """
    del rng
    for cost, a, b in _problems(known):
        for reach in _REACHES:
            yield from _blends(known, unbalanced(cost, a, b, reach=reach))


def partial_transport(known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
    """Yield blends with plans that move a share of the mass.

    Args:
        known: What is known about the group's C channels, and which K are selected.
        rng: Not used.
    """
    del rng
    for cost, a, b in _problems(known):
        for share in _SHARES:
            yield from _blends(known, partial(cost, a, b, share=share))


def _problems(known: Known) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
    """Yield ground costs, in function space and in weight space, with masses, uniform and by what readers hear."""
    vectors, channels = known.features.vectors(), known.features.channels
    covariance = np.sum([reading.covariance for reading in known.readings], axis=0)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)).clip(min=0.0))
    correlation = np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0)
    heard = [np.diag(reading.covariance) * np.diag(reading.strength) for reading in known.readings]
    loudness = np.sqrt(np.sum(heard, axis=0).clip(min=0.0))
    costs = (
        np.maximum(1.0 - correlation[:, known.selected], 0.0),
        ground_cost(vectors, vectors[known.selected], p=1.0, normalised=True),
    )
    for cost in costs:
        for mass in (loudness, np.ones(channels)):
            if mass[known.selected].sum() > 0:
                yield cost, mass / mass.sum(), mass[known.selected] / mass[known.selected].sum()


def _blends(known: Known, plan: FloatArray) -> Iterator[FloatArray]:
    """Yield mixtures of the selection and the plan's means; a channel to which nothing is sent stays itself."""
    selection, received = known.selection, plan.sum(axis=0)[:, None]
    means = np.where(received > 0, plan.T / np.where(received > 0, received, 1.0), selection)
    for share in _BLENDS:
        yield (1.0 - share) * selection + share * means
