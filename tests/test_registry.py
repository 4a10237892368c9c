"""Registries: names are found, offered when misspelt, and never replaced in silence."""

from typing import Any

import pytest

from onnxfuse.errors import RegistryError
from onnxfuse.fusion.methods import METHODS
from onnxfuse.importance import IMPORTANCES
from onnxfuse.registry import Registry
from onnxfuse.transport import MASSES, SOLVERS, TARGETS

ALL: list[Registry[Any]] = [METHODS, IMPORTANCES, TARGETS, MASSES, SOLVERS]


@pytest.fixture
def tools() -> Registry[int]:
    """A registry with two members."""
    registry: Registry[int] = Registry("tool")
    registry.register("saw")(1)
    registry.register("hammer")(2)
    return registry


def test_a_mapping_in_the_order_of_registration(tools: Registry[int]) -> None:
    """A mapping in the order of registration."""
    assert list(tools) == ["saw", "hammer"]
    assert dict(tools) == {"saw": 1, "hammer": 2}
    assert len(tools) == 2
    assert "saw" in tools
    assert "drill" not in tools
    assert tools.get("hammer") == 2


def test_register_is_a_decorator_that_changes_nothing(tools: Registry[int]) -> None:
    """Register is a decorator that changes nothing."""
    assert tools.register("drill")(3) == 3
    assert tools["drill"] == 3


def test_an_unknown_name_lists_the_known_ones(tools: Registry[int]) -> None:
    """An unknown name lists the known ones."""
    with pytest.raises(RegistryError) as caught:
        tools["screwdriver"]
    assert str(caught.value) == "there is no tool called 'screwdriver'\n  mend: Known: saw, hammer"
    with pytest.raises(LookupError) as close:
        tools["hamer"]
    assert str(close.value) == ("there is no tool called 'hamer'\n  mend: did you mean 'hammer'? Known: saw, hammer")


def test_get_has_a_default(tools: Registry[int]) -> None:
    """Get has a default."""
    assert tools.get("drill") is None
    assert tools.get("drill", 4) == 4


def test_a_name_is_never_replaced(tools: Registry[int]) -> None:
    """A name is never replaced."""
    with pytest.raises(RegistryError) as caught:
        tools.register("saw")(9)
    assert str(caught.value) == "there is a tool called 'saw' already\n  mend: choose another name"
    assert tools["saw"] == 1


@pytest.mark.parametrize("registry", ALL, ids=lambda registry: registry.kind)
def test_the_names_of_the_package_are_kebab_case(registry: Registry[Any]) -> None:
    """The names of the package are kebab case."""
    assert len(registry) > 1
    assert all(name == name.lower() and name.replace("-", "").isalnum() for name in registry)
    assert all((registry[name].__doc__ or "").strip() for name in registry)
