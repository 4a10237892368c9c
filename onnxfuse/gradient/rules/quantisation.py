"""Quantisation, with the straight-through estimator: rounding counts as the identity, saturation as a constant.

Bengio, Leonard and Courville, "Estimating or propagating gradients through stochastic neurons for conditional
computation", 2013; in this form Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference", CVPR 2018. Gradients of integers are those of the numbers behind their steps.
"""

import numpy as np
from onnx import TensorProto, helper

from onnxfuse.gradient.expressions import Expr, Gradients, Literal, Rule, Site, call, integers

__all__ = ["RULES"]


def _scale(site: Site) -> Expr:
    """Return the scale, broadcast along the axis that it is for."""
    size = int(np.prod(site.dims_in(1)))
    if len(site.dims_in(1)) > 1:
        site.refuse("it has scales for blocks")
    dims = [1] * len(site.dims_in())
    if size > 1:
        dims[int(site.attribute("axis", 1))] = size
    return call("Reshape", site.input(1), integers(dims))


def _whole(number: int) -> Literal:
    return Literal(np.array(number, np.int32))


def quantise(site: Site) -> Gradients:
    """QuantizeLinear: nothing goes through where it saturates."""
    limits = np.iinfo(helper.tensor_dtype_to_np_dtype(site.types[site.node.outputs[0]]))
    y = call("Cast", site.y, to=TensorProto.INT32)
    inside = call("And", call("Greater", y, _whole(limits.min)), call("Less", y, _whole(limits.max)))
    return {0: call("Where", inside, site.g / _scale(site), 0.0)}


def dequantise(site: Site) -> Gradients:
    """DequantizeLinear."""
    return {0: site.g * _scale(site)}


RULES = tuple(
    Rule(op, rule, domain=domain)
    for op, rule in (("QuantizeLinear", quantise), ("DequantizeLinear", dequantise))
    for domain in ("", "com.microsoft")
)
