"""One file per operator family; `DEFAULT_RULES` lists them all.

To add an operator: write a function from `Site` to what is known of each output in the file of its family, and enter it
in that file's ``RULES``. The tests compare every rule with samples, so add an example in `tests/test_analytic.py`. What
has no rule (a softmax, attention, recurrent layers) has no moments, and neither has anything behind it, up to the next
batch normalisation.
"""

from onnxfuse.analytic.moments import Rule
from onnxfuse.analytic.rules import combination, elementwise, linear, normalisation, pooling, shape

__all__ = ["DEFAULT_RULES"]

DEFAULT_RULES: tuple[Rule, ...] = (
    *linear.RULES,
    *elementwise.RULES,
    *normalisation.RULES,
    *combination.RULES,
    *pooling.RULES,
    *shape.RULES,
)
