"""The proof of the coupling on the very model at hand: permuting a group's channels must not change the outputs.

Whatever the coupling analysis inferred, a permutation of channels, applied through the same maps and edits that fusion
uses, leaves the network's function as it was if and only if every axis that follows the channels was found. So the
channels of all groups are permuted at random, the model is run, and the outputs are compared. Groups that change them
are found by bisection; they are defects of the analysis, and freezing them makes those harmless.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx

from onnxfuse.coupling.groups import CouplingGroup
from onnxfuse.errors import OnnxFuseError
from onnxfuse.proof.runtime import Feeds, Session

__all__ = ["CouplingProof", "Permute", "prove_coupling"]

Permute: TypeAlias = Callable[[Sequence[CouplingGroup]], onnx.ModelProto]
"""Return the model with the channels of the given groups permuted."""

_Outputs: TypeAlias = dict[str, np.ndarray[Any, np.dtype[Any]]]

# Relative L2 difference that reordered sums may cause, by the outputs' item size in bytes: a wrong coupling is off by
# the size of the outputs themselves, rounding by a few units in the last place for each layer.
_TOLERANCE = {2: 0.1, 4: 1e-2, 8: 1e-5}


@dataclass(frozen=True)
class CouplingProof:
    """What the proof found.

    Attributes:
        proven: Number of groups whose channels were permuted without a change of the outputs.
        refuted: Why a group failed, by its name.
        note: Why no proof was possible; empty if there was one.
        largest: Largest relative L2 difference of an output over the groups that are proven together.
    """

    proven: int
    refuted: dict[str, str]
    note: str = ""
    largest: float = 0.0


def prove_coupling(original: Session, groups: Sequence[CouplingGroup], permute: Permute, feeds: Feeds) -> CouplingProof:
    """Permute the channels of groups, run, compare, and bisect out the groups that change the outputs.

    Args:
        original: The model as it is.
        groups: The groups to prove.
        permute: Makes the model with the channels of some groups permuted.
        feeds: Inputs for one run.

    Returns:
        The proof; empty of refutations if the analysis is right.
    """
    if not groups:
        return CouplingProof(0, {})
    expected = _numeric(original.run(feeds))
    again = _numeric(original.run(feeds))
    if any(_distance(y, again[name]) > 0 for name, y in expected.items()):
        return CouplingProof(0, {}, "its outputs differ from run to run on the same inputs")
    if not any(np.isfinite(y).all() and np.ptp(y) > 0 for y in expected.values() if y.size > 1):
        return CouplingProof(0, {}, "its outputs are all the same number, so that they would not show a change")
    trial = _Trial(original, permute, feeds, expected)
    refuted = trial.bisect(list(groups))
    return CouplingProof(len(groups) - len(refuted), refuted, largest=trial.largest)


@dataclass
class _Trial:
    """One model and its expected outputs, against which sets of groups are tried."""

    original: Session
    permute: Permute
    feeds: Feeds
    expected: _Outputs
    largest: float = 0.0

    def bisect(self, groups: list[CouplingGroup]) -> dict[str, str]:
        problem = self._problem(groups)
        if not problem:
            return {}
        if len(groups) == 1:
            return {groups[0].name: problem}
        middle = len(groups) // 2
        found = {**self.bisect(groups[:middle]), **self.bisect(groups[middle:])}
        # Each half may hold by itself and the whole may not; then the groups depend on each other in an unknown way.
        return found or {group.name: f"only together with other groups: {problem}" for group in groups}

    def _problem(self, groups: list[CouplingGroup]) -> str:
        try:
            session = Session(self.permute(groups), self.original.provider, name="the model with permuted channels")
            outputs = _numeric(session.run(self.feeds))
        except OnnxFuseError as error:
            return error.what
        largest = 0.0
        for name, y in self.expected.items():
            z = outputs.get(name)
            if z is None or z.shape != y.shape:
                return f"permuting its channels changes the shape of output {name!r}"
            distance = _distance(y, z)
            if distance > _TOLERANCE.get(y.dtype.itemsize, 0.0):
                return f"permuting its channels changes output {name!r} by {distance:.2g} of its size"
            largest = max(largest, distance)
        self.largest = max(self.largest, largest)
        return ""


def _numeric(outputs: dict[str, Any]) -> _Outputs:
    return {name: y for name, y in outputs.items() if isinstance(y, np.ndarray) and y.dtype.kind in "fiubV"}


def _distance(y: np.ndarray[Any, np.dtype[Any]], z: np.ndarray[Any, np.dtype[Any]]) -> float:
    """Relative L2 distance, against the outputs' own variation; 0 for equal outputs, NaN matching NaN."""
    a, b = np.nan_to_num(y.astype(np.float64)), np.nan_to_num(z.astype(np.float64))
    gap = float(np.linalg.norm(a - b))
    if gap == 0:
        return 0.0
    spread = float(np.linalg.norm(a - a.mean())) or float(np.linalg.norm(a)) or 1.0
    return gap / spread
