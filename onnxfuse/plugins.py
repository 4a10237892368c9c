"""What other packages add: rules, importances, transport, methods and candidates, found by their entry points.

A package states in its ``pyproject.toml`` what it has, by one of the groups in `PLUGIN_GROUPS`; the name of the entry
point is the name under which it is found. Nothing is loaded when onnxfuse is imported: the command line does it, and a
program that wants it calls `load_plugins`.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from onnxfuse.coupling.constraints import Rule
from onnxfuse.coupling.rules import RULE_SETS
from onnxfuse.errors import PluginError, RegistryError
from onnxfuse.fusion.candidates import CANDIDATES
from onnxfuse.fusion.methods import METHODS
from onnxfuse.importance import IMPORTANCES
from onnxfuse.registry import Registry
from onnxfuse.transport import MASSES, SOLVERS, TARGETS

__all__ = ["PLUGIN_GROUPS", "load_plugins"]

_RULES = "onnxfuse.rules"
PLUGIN_GROUPS: Mapping[str, Registry[Any]] = MappingProxyType(
    {
        _RULES: RULE_SETS,
        "onnxfuse.importances": IMPORTANCES,
        "onnxfuse.targets": TARGETS,
        "onnxfuse.masses": MASSES,
        "onnxfuse.solvers": SOLVERS,
        "onnxfuse.methods": METHODS,
        "onnxfuse.candidates": CANDIDATES,
    }
)


def load_plugins(registries: Mapping[str, Registry[Any]] = PLUGIN_GROUPS) -> tuple[str, ...]:
    """Register what the packages in this environment offer; what is registered already stays as it is.

    Args:
        registries: Where each group of entry points goes.

    Returns:
        What was added, as ``group: name``, in the order of the groups.

    Raises:
        PluginError: Something can't be loaded, is not what its group asks for, or has a name or an operator that is
            taken; what came before it is registered.
    """
    added = []
    for group, registry in registries.items():
        for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
            member = _loaded(point)
            if registry.get(point.name) is member:
                continue
            _check(point, member, registries)
            try:
                registry.register(point.name)(member)
            except RegistryError as error:
                raise PluginError(error.what, where=_where(point), mend=_mend(point)) from error
            added.append(f"{group}: {point.name}")
    return tuple(added)


def _loaded(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        what = f"a plugin can't be loaded: {type(error).__name__}: {error}"
        raise PluginError(what, where=_where(point), mend=_mend(point)) from error


def _check(point: EntryPoint, member: Any, registries: Mapping[str, Registry[Any]]) -> None:
    """Refuse what is not of its kind, and a rule for an operator that has one for the same version."""
    if point.group != _RULES:
        if not callable(member):
            what = f"a plugin is to be a function, and is a {type(member).__name__}"
            raise PluginError(what, where=_where(point), mend=_mend(point))
        return
    if not isinstance(member, Sequence) or not member or not all(isinstance(rule, Rule) for rule in member):
        what = f"a plugin is to be a sequence of rules, and is a {type(member).__name__}"
        raise PluginError(what, where=_where(point), mend=_mend(point))
    known = {(rule.domain, rule.op, rule.since): name for name, rules in registries[_RULES].items() for rule in rules}
    for rule in member:
        owner = known.get((rule.domain, rule.op, rule.since))
        if owner is not None:
            operator = f"{rule.domain}::{rule.op}" if rule.domain else rule.op
            what = f"a plugin has a rule for {operator} since version {rule.since}, and so has {owner!r}"
            raise PluginError(what, where=_where(point), mend=_mend(point))


def _where(point: EntryPoint) -> str:
    return f"entry point {point.name!r} = {point.value!r} of the group {point.group!r}"


def _mend(point: EntryPoint) -> str:
    name = "the package that has it" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    return f"update {name}, or uninstall it"
