"""All options of a compression in one frozen, checked object: the same names in Python, in JSON and as flags."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from numbers import Integral, Real
from typing import Any

from onnxfuse.errors import ConfigError, RegistryError
from onnxfuse.fusion.methods import METHODS
from onnxfuse.fusion.options import FusionOptions
from onnxfuse.target import Keep, Target

__all__ = ["DEFAULT_RATIO", "CompressionConfig", "Order", "Pixels", "Provider", "Scope", "flag_of"]

AUTO = "auto"
DEFAULT_RATIO = 0.3


class Scope(StrEnum):
    """Which groups may change."""

    ALL = "all"
    """Every group that is not frozen."""
    HIDDEN = "hidden"
    """Only groups that no addition of computed tensors ties together: the insides of residual blocks."""


class Order(StrEnum):
    """In which order groups are fused; each one sees the weights that the groups before it have changed."""

    BACKWARD = "backward"
    """From the output to the input, as the paper's released code does."""
    FORWARD = "forward"
    """From the input to the output."""


class Pixels(StrEnum):
    """How pixels of images become the numbers of an input."""

    AUTO = "auto"
    """As the network seems to expect them."""
    STANDARDISED = "standardised"
    """From 0 to 1, less ImageNet's mean, divided by its deviation, for every colour."""
    BYTES = "0..255"
    SIGNED = "-128..127"
    SYMMETRIC = "-1..1"
    UNIT = "0..1"


class Provider(StrEnum):
    """Where ONNX Runtime runs."""

    AUTO = "auto"
    """On CUDA where it really works, else on the CPU."""
    CPU = "cpu"
    CUDA = "cuda"
    """On CUDA, or not at all."""


@dataclass(frozen=True, slots=True)
class CompressionConfig:
    """What to compress, how much, and how.

    Attributes:
        ratio: Share of each group's channels to remove: 0 or more, and less than 1; 0.3 where neither this nor a target
            is given. Of C channels floor(C (1 - ratio)) stay, at least 1.
        target: What may stay of the whole network, instead of a ratio for every group: ``macs=0.5``, ``params=40%``,
            ``macs=300M``, ``bytes=2M`` (bytes are those of the weights, without what the file has around them). Each
            group keeps as many channels as is best for the whole.
        round_to: Widths are multiples of this, where a group has as many; runtimes like multiples of 8.
        min_channels: How many channels each group keeps at least.
        method: ``auto`` chooses for every group the channels, and the weights behind them, with which the layers that
            read it lose least. ``intra-fusion`` transports all channels to the most important ones, ``prune`` drops
            the least important ones, ``fold`` merges clusters of similar ones.
        scope: Which groups may change: ``all`` that are not frozen, or ``hidden``, those that no addition ties
            together (the insides of residual blocks).
        keep: How many channels the groups whose name fits a shell pattern keep, such as ``'/layer1/*=12'`` or, as a
            share, ``'/layer1/*=0.75'``. May be given several times; the last one that fits holds.
        only: A shell pattern such as ``'/layer1/*'``: only groups whose name fits change. May be given several times;
            ``inspect`` lists the names.
        skip: A shell pattern: groups whose name fits do not change. May be given several times.
        order: In which order groups are fused; each one sees the weights that those before it have changed.
            ``backward`` is from the output to the input, as the paper's released code does.
        refit: Whether to fit the layers behind fused channels anew on the calibration samples, front to back; by
            default with ``auto`` only.
        effort: How much to do besides: parts of the network are fitted as a whole after the refit, in many small steps,
            and images that are made up are moved towards classes.
            0 leaves that out; 1 takes a minute or two on two cores for small networks and some minutes for others; more
            helps where much was removed.
        pixels: How the pixels of pictures, or of made-up images, become the numbers of an input: ``standardised`` (less
            ImageNet's mean, divided by its deviation), ``0..255``, ``-128..127``, ``-1..1`` or ``0..1``; ``auto``
            finds out from the network.
        prove: Whether to prove the coupling on this model first, by permuting the channels of every group in ONNX
            Runtime; groups that fail are kept as they are.
        provider: Where ONNX Runtime runs: ``cuda`` or not at all, ``cpu``, or ``auto``, which is CUDA where it
            really works.
        seed: Seed of everything random, a whole number from 0 on.
        fusion: The options of the method.

    Raises:
        ConfigError: A field has a value that it can't have; the message names the flag.

    Example:
        >>> CompressionConfig(ratio=1.5)
        Traceback (most recent call last):
        ...
        onnxfuse.errors.ConfigError: the ratio is 1.5
          at:   --ratio
          mend: give the share of channels to remove: 0 or more, and less than 1
    """

    ratio: float | None = None
    target: str = ""
    round_to: int = 1
    min_channels: int = 1
    method: str = AUTO
    scope: Scope = Scope.ALL
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    order: Order = Order.BACKWARD
    refit: bool | None = None
    effort: float = 1.0
    pixels: Pixels = Pixels.AUTO
    prove: bool = True
    provider: Provider = Provider.AUTO
    seed: int = 0
    fusion: FusionOptions = field(default_factory=FusionOptions)

    def __post_init__(self) -> None:
        """Check every field; strings are accepted for the enumerations."""
        if self.ratio is not None and (not _is_number(self.ratio, Real) or not 0 <= self.ratio < 1):
            what = f"the ratio is {self.ratio!r}"
            mend = "give the share of channels to remove: 0 or more, and less than 1"
            raise ConfigError(what, where="--ratio", mend=mend)
        self._check_widths()
        if not _is_number(self.effort, Real) or not 0 <= self.effort < math.inf:
            what = f"the effort is {self.effort!r}"
            raise ConfigError(what, where="--effort", mend="give a number from 0 on; 1 is the usual effort")
        if self.method != AUTO:
            try:
                METHODS[self.method]
            except RegistryError as error:
                raise ConfigError(error.what, where="--method", mend=f"{error.mend}, {AUTO}") from None
        if not _is_number(self.seed, Integral) or self.seed < 0:
            what = f"the seed is {self.seed!r}"
            raise ConfigError(what, where="--seed", mend="give a whole number from 0 on")
        for name, kind in (("scope", Scope), ("order", Order), ("pixels", Pixels), ("provider", Provider)):
            object.__setattr__(self, name, _member(kind, getattr(self, name), f"--{name}"))
        for name in ("keep", "only", "skip"):
            given: tuple[str, ...] | str = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        for rule in self.keep:
            Keep.parse(rule)

    def _check_widths(self) -> None:
        """Check what decides how many channels stay."""
        for name in ("round_to", "min_channels"):
            if not _is_number(getattr(self, name), Integral) or getattr(self, name) < 1:
                flag = flag_of(name)
                what = f"{flag} is {getattr(self, name)!r}"
                raise ConfigError(what, where=flag, mend="give a whole number from 1 on")
        if self.target:
            Target.parse(self.target)
        if self.target and self.ratio is not None:
            what = "both a ratio and a target are given, and each decides how much goes"
            raise ConfigError(what, where="--ratio, --target", mend="leave one of them out")

    @property
    def removed(self) -> float:
        """The share of each group's channels to remove: the ratio, or what is usual."""
        return DEFAULT_RATIO if self.ratio is None else self.ratio

    @property
    def is_auto(self) -> bool:
        """Whether maps are chosen by what the readers of each group lose."""
        return self.method == AUTO

    @property
    def refits(self) -> bool:
        """Whether readers are fitted anew: as asked for, or with ``auto``."""
        return self.is_auto if self.refit is None else self.refit

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain data, for reports; the fusion options stand beside the others."""
        plain = asdict(self)
        plain.update(plain.pop("fusion"))
        plain["ratio"] = None if self.target else self.removed
        return plain

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "CompressionConfig":
        """Build a config from flat options, as keyword arguments give them.

        Raises:
            ConfigError: An option is unknown or has a value that it can't have.
        """
        own = {f.name for f in fields(cls)} - {"fusion"}
        fusion = {f.name for f in fields(FusionOptions)}
        for name in options:
            if name not in own | fusion:
                what = f"there is no option called {name!r}"
                raise ConfigError(what, mend=f"known: {', '.join(sorted(own | fusion))}")
        return cls(
            **{k: v for k, v in options.items() if k in own},
            fusion=FusionOptions(**{k: v for k, v in options.items() if k in fusion}),
        )


def flag_of(name: str) -> str:
    """Return an option as the command line writes it.

    Example:
        >>> flag_of("min_channels")
        '--min-channels'
    """
    return f"--{name.replace('_', '-')}"


def _is_number(value: object, kind: type[Any]) -> bool:
    """Whether a value is a number at all; NumPy's are."""
    return isinstance(value, kind)


def _member(kind: type[StrEnum], value: str, flag: str) -> StrEnum:
    try:
        return kind(value)
    except ValueError:
        what = f"there is no {flag.removeprefix('--')} called {value!r}"
        raise ConfigError(what, where=flag, mend=f"known: {', '.join(kind)}") from None
