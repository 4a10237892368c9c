"""One file per operator family; `DEFAULT_RULES` lists them all.

To add an operator: write a function from `Site` to constraints in the file of its family (or a new one), enter it in
that file's ``RULES``, and list a new file here. The tests run every rule through the same laws. Rules of other packages
are sets of their own in `RULE_SETS`; what is known in the end is `known_rules`.
"""

from collections.abc import Sequence

from onnxfuse.coupling.constraints import Rule
from onnxfuse.coupling.rules import (
    attention,
    contrib,
    convolution,
    einsum,
    elementwise,
    indexing,
    integers,
    linear,
    normalisation,
    pooling,
    quantisation,
    recurrent,
    sampling,
    selection,
    shape,
)
from onnxfuse.registry import Registry

__all__ = ["DEFAULT_RULES", "RULE_SETS", "known_rules"]

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
    *attention.RULES,
    *integers.RULES,
)

RULE_SETS: Registry[Sequence[Rule]] = Registry("rule set")
RULE_SETS.register("onnxfuse")(DEFAULT_RULES)


def known_rules() -> tuple[Rule, ...]:
    """Return the rules of all sets, those of onnxfuse first."""
    return tuple(rule for rules in RULE_SETS.values() for rule in rules)
