"""Quantisation, with the straight-through estimator: rounding counts as the identity, saturation as a constant.

Bengio, Leonard and Courville, "Estimating or propagating gradients through stochastic neurons for conditional
computation", 2013; in this form Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", CVPR 2018. Gradients of integers are those of the numbers behind their steps.
"""

import numpy as np

from onnxfuse.gradient.expressions import Expr, Gradients, Rule, Site, call, integers

__all__ = ["RULES"]


# Half a step, and what rounding may add to it.
_HALF = 0.501


def _along(site: Site, slot: int) -> Expr:
    """Return a scale or zero point, broadcast along the axis that it is for."""
    size = int(np.prod(site.dims_in(slot)))
    if len(site.dims_in(slot)) > 1:
        site.refuse("it has scales for blocks")
    dims = [1] * len(site.dims_in())
    if size > 1:
        dims[int(site.attribute("axis", 1))] = size
    return call("Reshape", site.input(slot), integers(dims))


def quantise(site: Site) -> Gradients:
    """QuantizeLinear: nothing goes through where it saturates, that is where it moves numbers by more than it rounds.

    The largest and the smallest integer do not tell: they also stand for what they stand for exactly.
    """
    scale = _along(site, 1)
    kind = {"to": site.types[site.node.inputs[0]]}
    steps = call("Cast", site.y, **kind)
    if site.has(2):
        steps = steps - call("Cast", _along(site, 2), **kind)
    inside = call("Less", call("Abs", site.x / scale - steps), _HALF)
    return {0: call("Where", inside, site.g / scale, 0.0)}


def dequantise(site: Site) -> Gradients:
    """DequantizeLinear."""
    return {0: site.g * _along(site, 1)}


RULES = tuple(
    Rule(op, rule, domain=domain)
    for op, rule in (("QuantizeLinear", quantise), ("DequantizeLinear", dequantise))
    for domain in ("", "com.microsoft")
)
