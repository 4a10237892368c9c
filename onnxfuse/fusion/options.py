"""The options of the fusion methods; the defaults are what the paper and its released code use."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from onnxfuse.errors import ConfigError, RegistryError
from onnxfuse.fusion.candidates import CANDIDATES
from onnxfuse.fusion.maps import OutputNorm
from onnxfuse.importance import IMPORTANCES
from onnxfuse.transport import MASSES, SOLVERS, TARGETS

__all__ = ["FusionOptions"]


@dataclass(frozen=True, slots=True)
class FusionOptions:
    """What a fusion method may be told. Each method uses the options that concern it.

    Attributes:
        importance: What makes a channel worth keeping: ``l1``, ``l2`` or ``linf``, the norm of its weights;
            ``lamp``, its share in what is left once all smaller ones are gone; ``bn-scale``, the scale of its
            batch normalisation; ``geometric-median``, its distance from all others; ``random``. From samples:
            ``activation-l1`` or ``activation-l2``, the norm of what it does; ``taylor``, what the loss changes by to
            first order; ``chip``, what it adds to the nuclear norm; ``damage``, what its readers lose without it.
        transport_target: What channels are transported to: the ``most-important`` channels, the centres of ``kmeans``
            clusters, or the means of a ``gaussian-mixture``.
        source_mass: How much each channel counts in the transport: ``uniform``, by ``importance``, or by the
            ``softmax`` of the importances.
        target_mass: How much each target gets: ``uniform``, by ``importance``, or by the ``softmax`` of the
            importances.
        p: Order of the norm of the ground cost, from 1 up to and including inf.
        normalised: Whether channels are compared at Euclidean length 1, that is by direction.
        bias_in_cost: Whether biases are compared too (in the paper's text; not in its code).
        solver: How the transport is solved: ``exact``, or ``entropic`` (Sinkhorn; smoother plans).
        regularisation: Weight of the entropic term, in mean ground costs, above 0; for ``entropic``.
        output_norm: Whether a fused channel is the ``sum`` of its shares, as in the paper's released code, or
            their ``mean``.
        candidates: What proposes fused channels to ``auto``, in place of selected ones; what does least damage is
            taken. ``descent`` on the damage, from the selection on; ``principal``, the best directions where there is
            no activation; ``transport``, ``entropic-transport``, ``unbalanced-transport`` and ``partial-transport``,
            blends of the selection with transport plans; ``clusters``, means of like channels, and such blends too.
            May be given several times. By default ``descent`` and ``principal``, but none where samples are given and
            parts of the network are fitted as a whole (effort), which does as well by itself.

    Raises:
        ConfigError: An option has a value that it can't have; it says which are possible.

    Example:
        >>> FusionOptions(solver="exakt")
        Traceback (most recent call last):
        ...
        onnxfuse.errors.ConfigError: there is no solver called 'exakt'
          at:   --solver
          mend: did you mean 'exact'? Known: exact, entropic
    """

    importance: str = "l1"
    transport_target: str = "most-important"
    source_mass: str = "uniform"
    target_mass: str = "uniform"
    p: float = 1.0
    normalised: bool = True
    bias_in_cost: bool = False
    solver: str = "exact"
    regularisation: float = 0.05
    output_norm: OutputNorm = "sum"
    candidates: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check every option."""
        _check_known(IMPORTANCES, self.importance, "--importance")
        _check_known(TARGETS, self.transport_target, "--transport-target")
        _check_known(MASSES, self.source_mass, "--source-mass")
        _check_known(MASSES, self.target_mass, "--target-mass")
        _check_known(SOLVERS, self.solver, "--solver")
        if self.candidates is not None:
            object.__setattr__(self, "candidates", _names(self.candidates))
        for name in self.candidates or ():
            _check_known(CANDIDATES, name, "--candidates")
        if not self.p >= 1:
            what = f"the order of the norm is {self.p}"
            raise ConfigError(what, where="--p", mend="give a number from 1 on, or inf")
        if not 0 < self.regularisation < math.inf:
            what = f"the regularisation is {self.regularisation}"
            raise ConfigError(what, where="--regularisation", mend="give a finite number above 0, such as 0.05")
        if self.output_norm not in get_args(OutputNorm):
            what = f"there is no output norm called {self.output_norm!r}"
            raise ConfigError(what, where="--output-norm", mend=f"known: {', '.join(get_args(OutputNorm))}")


def _names(given: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return the names that were given, one alone too."""
    return (given,) if isinstance(given, str) else tuple(given)


def _check_known(registry: Mapping[str, object], name: str, flag: str) -> None:
    """Raise the registry's own complaint, which lists the names, as one about an option."""
    try:
        registry[name]
    except RegistryError as error:
        raise ConfigError(error.what, where=flag, mend=error.mend) from None
