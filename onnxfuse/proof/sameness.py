"""Proof that a graph which is written in another way computes the same numbers, bit for bit."""

import logging

import numpy as np
import onnx

from onnxfuse.config import Provider
from onnxfuse.errors import ModelError, RuntimeFailedError, UnsupportedGraphError
from onnxfuse.proof.runtime import Feeds, Session

__all__ = ["computes_the_same"]

logger = logging.getLogger(__name__)


def computes_the_same(name: str, before: onnx.ModelProto, after: onnx.ModelProto, feeds: Feeds) -> bool:
    """Whether two models make the same of inputs; if not, a message asks to report it.

    Args:
        name: What messages call the model.
        before: The model.
        after: The same, written in another way.
        feeds: Inputs of one run.

    Returns:
        True if all outputs are equal; False also where the model does not run.
    """
    name = f"the original model {name!r}"
    try:
        expected = Session(before, Provider.CPU, optimise=False, name=name).run(feeds)
    except RuntimeFailedError as error:
        logger.debug("its graph stays as it is written, since it does not run: %s", error.what)
        return False
    try:
        found = Session(after, Provider.CPU, optimise=False, name=f"{name}, written in another way").run(feeds)
    except (RuntimeFailedError, ModelError, UnsupportedGraphError) as error:
        logger.warning("a graph stays as it is written, please report this: %s", error.what)
        return False
    is_same = all(_is_equal(value, found[key]) for key, value in expected.items())
    if not is_same:
        logger.warning("a graph stays as it is written, please report this: another way of writing changes outputs")
    return is_same


def _is_equal(a: object, b: object) -> bool:
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
