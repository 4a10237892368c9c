"""Output maps from transport plans: each selected channel takes in what the plan sends to it.

A balanced plan must mix even the channels that should stay whole. So there are relaxed plans, and of every plan a few
blends with the selection. Channels are compared by what they do (the correlation of their activations), and by their
weights as in the paper; the mass of a channel is what its readers hear of it, its importance as in the paper (the l1
norm of its weights), or the same for all.
"""

from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from onnxfuse.arrays import FloatArray
from onnxfuse.errors import SolverError
from onnxfuse.fusion.candidates.protocol import Known
from onnxfuse.importance import IMPORTANCES
from onnxfuse.transport import ground_cost, partial, unbalanced
from onnxfuse.transport.solvers import entropic, exact

__all__ = [
    "balanced_transport",
    "blends",
    "entropic_transport",
    "ground_costs",
    "partial_transport",
    "unbalanced_transport",
]

_BLENDS = (0.25, 0.5, 1.0)
_REGULARISATIONS = (0.05, 0.2)
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
        yield from blends(known, exact(cost, a, b, regularisation=1.0).plan)


def entropic_transport(known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
    """Yield blends with entropic plans, which spread each channel over several selected ones.

    Args:
        known: What is known about the group's C channels, and which K are selected.
        rng: Not used.
    """
    del rng
    for cost, a, b in _problems(known):
        for regularisation in _REGULARISATIONS:
            # What does not converge is no proposal; there are others.
            with suppress(SolverError):
                yield from blends(known, entropic(cost, a, b, regularisation=regularisation).plan)


def unbalanced_transport(known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
    """Yield blends with plans that leave mass behind where it is too far from every selected channel.

    Args:
        known: What is known about the group's C channels, and which K are selected.
        rng: Not used.
    """
    del rng
    for cost, a, b in _problems(known):
        for reach in _REACHES:
            yield from blends(known, unbalanced(cost, a, b, reach=reach))


def partial_transport(known: Known, rng: np.random.Generator, /) -> Iterator[FloatArray]:
    """Yield blends with plans that move a share of the mass.

    Args:
        known: What is known about the group's C channels, and which K are selected.
        rng: Not used.
    """
    del rng
    for cost, a, b in _problems(known):
        for share in _SHARES:
            yield from blends(known, partial(cost, a, b, share=share))


def ground_costs(known: Known) -> tuple[FloatArray, FloatArray]:
    """Return how unlike all channels are to the selected ones, in function space and in weight space, shape (C, K).

    Args:
        known: What is known about the group's C channels, and which K are selected.
    """
    vectors = known.features.vectors()
    covariance = np.sum([reading.covariance for reading in known.readings], axis=0)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)).clip(min=0.0))
    correlation = np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0)
    return (
        np.maximum(1.0 - correlation[:, known.selected], 0.0),
        ground_cost(vectors, vectors[known.selected], p=1.0, normalised=True),
    )


def _problems(known: Known) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
    """Yield ground costs with masses: by what readers hear, by importance, and uniform ones."""
    heard = [np.diag(reading.covariance) * np.diag(reading.strength) for reading in known.readings]
    loudness = np.sqrt(np.sum(heard, axis=0).clip(min=0.0))
    scores = IMPORTANCES["l1"](known.features, np.random.default_rng(0))
    for cost in ground_costs(known):
        for mass in (loudness, scores, np.ones(known.features.channels)):
            if mass[known.selected].sum() > 0:
                yield cost, mass / mass.sum(), mass[known.selected] / mass[known.selected].sum()


def blends(known: Known, plan: FloatArray) -> Iterator[FloatArray]:
    """Yield mixtures of the selection and a plan's means; a channel to which nothing is sent stays itself.

    Args:
        known: What is known about the group's C channels, and which K are selected.
        plan: What each channel sends to each selected one, shape (C, K), ``>= 0``.
    """
    selection, received = known.selection, plan.sum(axis=0)[:, None]
    means = np.where(received > 0, plan.T / np.where(received > 0, received, 1.0), selection)
    for share in _BLENDS:
        yield (1.0 - share) * selection + share * means
