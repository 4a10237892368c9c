"""One file per operator family; `DEFAULT_RULES` lists them all.

To add an operator: write a function from `Site` to constraints in the file of its family (or a new one), enter it in
that file's ``RULES``, and list a new file here. The tests run every rule through the same laws.
"""

from onnxfuse.coupling.constraints import Rule
from onnxfuse.coupling.rules import (
    contrib,
    convolution,
    einsum,
    elementwise,
    indexing,
    linear,
    normalisation,
    pooling,
    quantisation,
    recurrent,
    sampling,
    selection,
    shape,
)

__all__ = ["DEFAULT_RULES"]

DEFAULT_RULES: tuple[Rule, ...] = (
    *convolution.RULES,
    *linear.RULES,
    *elementwise.RULES,
    *normalisation.RULES,
    *pooling.RULES,
    *shape.RULES,
    *indexing.RULES,
    *selection.RULES,
    *sampling.RULES,
    *einsum.RULES,
    *recurrent.RULES,
    *quantisation.RULES,
    *contrib.RULES,
)
