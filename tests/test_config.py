"""The options: checked when made, the same in Python, in JSON and as flags."""

import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest

from onnxfuse import CompressionConfig, FusionOptions, Order, Provider, Scope
from onnxfuse.errors import ConfigError, RegistryError
from onnxfuse.fusion.methods import METHODS
from onnxfuse.importance import IMPORTANCES
from onnxfuse.planning.widths import kept_channels
from onnxfuse.transport import MASSES, SOLVERS, TARGETS

RATIO = "give the share of channels to remove: 0 or more, and less than 1"


def test_the_defaults_of_the_transport_are_those_of_the_paper() -> None:
    """The defaults of the transport are those of the paper; the method chooses by itself."""
    config = CompressionConfig()
    assert (config.removed, config.method, config.scope) == (0.3, "auto", Scope.ALL)
    fusion = config.fusion
    assert (fusion.importance, fusion.transport_target, fusion.solver) == ("l1", "most-important", "exact")
    assert (fusion.p, fusion.normalised, fusion.output_norm) == (1, True, "sum")


def test_a_config_is_frozen() -> None:
    """A config is frozen."""
    config = CompressionConfig()
    with pytest.raises(FrozenInstanceError):
        object.__getattribute__(config, "__setattr__")("ratio", 0.5)
    with pytest.raises(FrozenInstanceError):
        object.__getattribute__(config.fusion, "__setattr__")("p", 2.0)


@pytest.mark.parametrize("ratio", [0, 0.0, 0.3, 0.999, np.float32(0.25), np.float64(0.5)])
def test_good_ratios(ratio: float) -> None:
    """Good ratios."""
    assert CompressionConfig(ratio=ratio).ratio == ratio


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 1.5, math.nan, math.inf, -math.inf, "0.3", [0.3]])
def test_bad_ratios(ratio: Any) -> None:
    """Bad ratios."""
    with pytest.raises(ConfigError) as caught:
        CompressionConfig(ratio=ratio)
    assert str(caught.value) == f"the ratio is {ratio!r}\n  at:   --ratio\n  mend: {RATIO}"


@pytest.mark.parametrize("seed", [-1, 1.5, "1", None])
def test_bad_seeds(seed: Any) -> None:
    """Bad seeds."""
    with pytest.raises(ConfigError) as caught:
        CompressionConfig(seed=seed)
    assert str(caught.value) == f"the seed is {seed!r}\n  at:   --seed\n  mend: give a whole number from 0 on"


@pytest.mark.parametrize(
    ("name", "known"), [("scope", "all, hidden"), ("order", "backward, forward"), ("provider", "auto, cpu, cuda")]
)
def test_unknown_members(name: str, known: str) -> None:
    """Unknown members."""
    with pytest.raises(ConfigError) as caught:
        CompressionConfig.from_options({name: "other"})
    assert str(caught.value) == f"there is no {name} called 'other'\n  at:   --{name}\n  mend: known: {known}"


def test_strings_become_members() -> None:
    """Strings become members."""
    config = CompressionConfig.from_options({"scope": "hidden", "order": "forward", "provider": "cuda"})
    assert (config.scope, config.order, config.provider) == (Scope.HIDDEN, Order.FORWARD, Provider.CUDA)
    assert isinstance(config.scope, Scope)


@pytest.mark.parametrize("given", ["/conv/*", ["/conv/*"], ("/conv/*",)])
def test_one_pattern_may_be_a_string(given: Any) -> None:
    """One pattern may be a string."""
    config = CompressionConfig(only=given, skip=given)
    assert config.only == config.skip == ("/conv/*",)


def test_unknown_options_are_listed() -> None:
    """Unknown options are listed."""
    with pytest.raises(ConfigError) as caught:
        CompressionConfig.from_options({"rato": 0.5})
    assert caught.value.what == "there is no option called 'rato'"
    assert "ratio, " in caught.value.mend
    assert "fusion" not in caught.value.mend


def test_an_unknown_method_lists_auto_too() -> None:
    """An unknown method lists auto too."""
    with pytest.raises(ConfigError) as caught:
        CompressionConfig(method="magic")
    assert caught.value.where == "--method"
    assert caught.value.mend.endswith(", auto")


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("method", ["auto", *METHODS]),
        ("importance", IMPORTANCES),
        ("transport_target", TARGETS),
        ("source_mass", MASSES),
        ("target_mass", MASSES),
        ("solver", SOLVERS),
        ("output_norm", ["sum", "mean"]),
    ],
)
def test_every_registered_name_is_accepted(option: str, names: Any) -> None:
    """Every registered name is accepted."""
    for name in names:
        assert CompressionConfig.from_options({option: name}).to_dict()[option] == name
    with pytest.raises(ConfigError) as caught:
        CompressionConfig.from_options({option: "no such name"})
    assert caught.value.where == f"--{option.replace('_', '-')}"
    assert not isinstance(caught.value, RegistryError)
    assert all(name in caught.value.mend for name in names)


@pytest.mark.parametrize("regularisation", [0.0, -1.0, math.inf, math.nan])
def test_bad_regularisations(regularisation: float) -> None:
    """Bad regularisations."""
    with pytest.raises(ConfigError) as caught:
        FusionOptions(regularisation=regularisation)
    assert str(caught.value) == (
        f"the regularisation is {regularisation}\n  at:   --regularisation\n"
        "  mend: give a finite number above 0, such as 0.05"
    )


def test_plain_data_holds_every_option_once() -> None:
    """Plain data holds every option once."""
    plain = CompressionConfig(fusion=FusionOptions(p=2.0), only=("a",)).to_dict()
    names = {f.name for f in fields(CompressionConfig)} | {f.name for f in fields(FusionOptions)}
    assert plain.keys() == names - {"fusion"}
    assert (plain["p"], plain["only"]) == (2.0, ("a",))
    assert CompressionConfig.from_options(plain).to_dict() == plain


@pytest.mark.parametrize(
    ("channels", "ratio", "kept"),
    [(10, 0.0, 10), (10, 0.3, 7), (64, 0.3, 44), (10, 0.7, 3), (10, 0.9, 1), (10, 0.95, 1), (1, 0.99, 1), (3, 0.4, 1)],
)
def test_kept_channels_are_counted_in_decimals(channels: int, ratio: float, kept: int) -> None:
    """Kept channels are counted in decimals."""
    assert kept_channels(channels, ratio) == kept
    assert kept_channels(channels, np.float64(ratio)) == kept
