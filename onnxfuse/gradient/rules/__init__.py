"""One file per operator family; `DEFAULT_RULES` lists them all.

To add an operator: write a function from `Site` to one expression for each input in the file of its family, and enter
it in that file's ``RULES``. The tests compare every rule with finite differences, so add an example there.
"""

from onnxfuse.gradient.expressions import Rule
from onnxfuse.gradient.rules import elementwise, indexing, linear, normalisation, pooling, quantisation, reduction

__all__ = ["DEFAULT_RULES"]

DEFAULT_RULES: tuple[Rule, ...] = (
    *linear.RULES,
    *elementwise.RULES,
    *normalisation.RULES,
    *pooling.RULES,
    *reduction.RULES,
    *indexing.RULES,
    *quantisation.RULES,
)
