"""What other packages add: found by its entry point, used like the rest, and refused with a word on how to mend it."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import pytest

import onnxfuse
from onnxfuse.coupling.rules import RULE_SETS
from onnxfuse.errors import PluginError
from onnxfuse.plugins import PLUGIN_GROUPS, load_plugins
from onnxfuse.registry import Registry
from tests.builders import Net
from tests.conftest import Command

Registries: TypeAlias = Mapping[str, Registry[Any]]
Install: TypeAlias = Callable[..., None]

RULES = """
from onnxfuse.coupling.constraints import Rule
from onnxfuse.coupling.rules.elementwise import unary

RULES = (Rule("Binarizer", unary, domain="ai.onnx.ml"),)
TAKEN = (Rule("Relu", unary),)
NONE = ("Relu",)
"""
METHOD = """
import numpy as np
from onnxfuse.fusion.maps import ChannelMap


def keep_first(features, kept, options, rng, /):
    '''Keep the first channels.'''
    return ChannelMap.selection(np.arange(kept), features.channels)


NUMBER = 3
"""


@pytest.fixture
def registries() -> Registries:
    """Registries with what there is, which forget what is added."""
    copies: dict[str, Registry[Any]] = {}
    for group, registry in PLUGIN_GROUPS.items():
        copies[group] = Registry(registry.kind)
        for name, member in registry.items():
            copies[group].register(name)(member)
    return copies


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package where Python finds it, with its entry points by group; its modules are gone afterwards."""
    before = set(sys.modules)

    def put(entries: Mapping[str, str], **modules: str) -> None:
        place = tmp_path / "site"
        info = place / "acme_fuse-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-fuse\nVersion: 1.2\n", encoding="utf-8")
        lines = [f"[{group}]\n{entry}\n" for group, entry in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        for name, text in modules.items():
            (place / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(place)

    yield put
    for name in set(sys.modules) - before:
        if name.startswith("acme"):
            del sys.modules[name]


def binarised() -> Net:
    """A network with an operator of ai.onnx.ml, for which onnxfuse has no rule."""
    net = Net(17, seed=2)
    net.domains["ai.onnx.ml"] = 3
    h = net.gemm(net.input(2, 5), 8, name="first")
    h = net.node("Binarizer", h, domain="ai.onnx.ml", like=h, name="signs", threshold=0.1)
    net.output(net.gemm(h, 3, name="last"))
    return net


def reason(model: onnx.ModelProto) -> str | None:
    """Return why the group between the two layers is frozen."""
    return next(g.frozen for g in onnxfuse.inspect(model).groups if g.name == "first")


def test_nothing_is_there_without_a_package(registries: Registries) -> None:
    """An environment without other packages adds nothing."""
    assert load_plugins(registries) == ()


def test_rules_of_another_package(install: Install, registries: Registries, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule for another domain is used once it is loaded, not before, and is proven on the model."""
    model = binarised().model()
    install({"onnxfuse.rules": "acme = acme_rules:RULES"}, acme_rules=RULES)
    assert reason(model) == "there is no rule for 'signs' (ai.onnx.ml::Binarizer)"
    assert load_plugins(registries) == ("onnxfuse.rules: acme",)
    monkeypatch.setattr("onnxfuse.coupling.rules.RULE_SETS", registries["onnxfuse.rules"])
    assert reason(model) is None
    assert "acme" not in RULE_SETS


def test_loading_again_adds_nothing(install: Install, registries: Registries) -> None:
    """Loading twice is loading once."""
    install({"onnxfuse.rules": "acme = acme_rules:RULES"}, acme_rules=RULES)
    assert load_plugins(registries)
    assert load_plugins(registries) == ()


def test_every_group_has_its_registry(install: Install, registries: Registries) -> None:
    """A function goes to the registry of its group, under the name of the entry point."""
    groups = [group for group in PLUGIN_GROUPS if group != "onnxfuse.rules"]
    install(dict.fromkeys(groups, "acme-first = acme_method:keep_first"), acme_method=METHOD)
    assert load_plugins(registries) == tuple(f"{group}: acme-first" for group in groups)
    for group in groups:
        assert registries[group]["acme-first"].__name__ == "keep_first"


BROKEN = {
    "no such module": ("onnxfuse.rules", "acme = acme_absent:RULES", "ModuleNotFoundError"),
    "no such name": ("onnxfuse.rules", "acme = acme_rules:ABSENT", "AttributeError"),
    "no rules": ("onnxfuse.rules", "acme = acme_rules:NONE", "a sequence of rules, and is a tuple"),
    "taken operator": (
        "onnxfuse.rules",
        "acme = acme_rules:TAKEN",
        "a rule for Relu since version 1, and so has 'onnxfuse'",
    ),
    "no function": ("onnxfuse.methods", "acme = acme_method:NUMBER", "a function, and is a int"),
    "taken name": ("onnxfuse.methods", "prune = acme_method:keep_first", "a method called 'prune' already"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named(case: str, install: Install, registries: Registries) -> None:
    """An error says which entry point of which package it is, and what to do."""
    group, entry, what = BROKEN[case]
    install({group: entry}, acme_rules=RULES, acme_method=METHOD)
    with pytest.raises(PluginError) as caught:
        load_plugins(registries)
    name, _, value = entry.partition(" = ")
    assert what in caught.value.what
    assert caught.value.where == f"entry point {name!r} = {value!r} of the group {group!r}"
    assert caught.value.mend == "update acme-fuse 1.2, or uninstall it"


def test_the_command_line_loads_them(
    install: Install, process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method of another package is listed, and compresses."""
    root = Path(onnxfuse.__file__).parent.parent
    install({"onnxfuse.methods": "acme-first = acme_method:keep_first"}, acme_method=METHOD)
    net = Net(17, seed=2)
    net.output(net.gemm(net.gemm(net.input(2, 5), 8, name="first"), 3, name="last"))
    onnx.save(net.model(), tmp_path / "net.onnx")
    assert process("compress", "net.onnx", "-o", "small.onnx", "--method", "acme-first").code == 2
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{root}")
    assert "acme-first" in process("methods").out
    outcome = process("compress", "net.onnx", "-o", "small.onnx", "--method", "acme-first", "--ratio", "0.5")
    assert (outcome.code, outcome.err) == (0, "")
    small = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "small.onnx").graph.initializer}
    np.testing.assert_array_equal(small["first_w"], net.values["first_w"][:, :4])


def test_the_command_line_stops_at_a_broken_one(
    install: Install, process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with an exit code of its own and three lines."""
    root = Path(onnxfuse.__file__).parent.parent
    install({"onnxfuse.methods": "acme = acme_absent:method"})
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{root}")
    outcome = process("methods")
    assert outcome.code == 12
    assert [line[:8] for line in outcome.err.splitlines()] == ["onnxfuse", "  at:   ", "  mend: "]
    assert "update acme-fuse 1.2" in outcome.err
