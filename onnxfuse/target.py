"""Budgets: how much of a network may stay, counted in what; and how much of single groups."""

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from onnxfuse.errors import ConfigError

__all__ = ["Keep", "Measure", "Target"]

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
# A smaller number above 1 without a unit is a slip: percent without their sign, or a share that is wrong.
_LEAST_AMOUNT = 100
_FORM = re.compile(r"(?P<measure>[a-z]+)=(?P<number>[0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)(?P<unit>[kMG%]?)", re.ASCII)


class Measure(StrEnum):
    """What a budget is counted in."""

    MACS = "macs"
    """Multiply-accumulates of one sample's run."""
    PARAMS = "params"
    """Learned numbers."""
    BYTES = "bytes"
    """Size of the learned numbers in the file, without the graph and the names around them."""


@dataclass(frozen=True, slots=True)
class Target:
    """A budget.

    Attributes:
        measure: What is counted.
        share: The share of the original that may stay, above 0 and at most 1; None for an absolute amount.
        amount: The absolute amount, > 0; None for a share.

    Example:
        >>> Target.parse("macs=0.5"), Target.parse("params=300k").amount
        (Target(measure=<Measure.MACS: 'macs'>, share=0.5, amount=None), 300000.0)
    """

    measure: Measure
    share: float | None = None
    amount: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read a target as users write it: ``macs=0.5``, ``params=40%``, ``macs=300M``, ``bytes=2M``.

        Raises:
            ConfigError: It has another form, or is out of range.
        """
        found = _FORM.fullmatch(text.strip())
        mend = "write macs=0.5 (the share that stays), params=40%, macs=300M or bytes=2M"
        if found is None or found["measure"] not in list(Measure):
            what = f"the target is {text!r}"
            raise ConfigError(what, where="--target", mend=mend)
        measure, number, unit = Measure(found["measure"]), float(found["number"]), found["unit"]
        if unit == "%":
            number, unit = number / 100, ""
        elif unit or number > 1:
            if not unit and (number < _LEAST_AMOUNT or number != int(number)):
                what = f"the target is {text!r}, which is no share, as it is above 1, and too small for an amount"
                what = what if number < _LEAST_AMOUNT else f"the target is {text!r}, and {measure} are whole numbers"
                mend = f"a share is above 0 and at most 1; {mend}"
                raise ConfigError(what, where="--target", mend=mend)
            return cls(measure, None, number * _UNITS[unit])
        if not 0 < number <= 1:
            what = f"the target is {text!r}"
            raise ConfigError(what, where="--target", mend=mend)
        return cls(measure, number)

    def limit(self, original: float) -> float:
        """Return the amount that may stay of an original amount."""
        return float(self.amount) if self.amount is not None else float(self.share or 0.0) * original

    def __str__(self) -> str:
        """Return the form that `parse` reads."""
        if self.amount is None:
            return f"{self.measure}={self.share}"
        small = self.amount < _LEAST_AMOUNT or self.amount != int(self.amount)
        return f"{self.measure}={self.amount / 1e3:g}k" if small else f"{self.measure}={self.amount:.0f}"


@dataclass(frozen=True, slots=True)
class Keep:
    """How many channels some groups keep, whatever the others do.

    Attributes:
        pattern: A shell pattern on names of groups.
        number: A count of channels, or a share of them where it has a decimal point.
        is_share: Whether it is a share.

    Example:
        >>> Keep.parse("/layer1/*=0.75").width(16), Keep.parse("head=12").width(16), Keep.parse("head=12").width(8)
        (12, 12, 8)
    """

    pattern: str
    number: float
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> "Keep":
        """Read a rule as users write it: ``PATTERN=12`` or ``PATTERN=0.75``.

        Raises:
            ConfigError: It has another form, or is out of range.
        """
        pattern, _, written = text.rpartition("=")
        mend = "write PATTERN=12, a number of channels, or PATTERN=0.75, a share of them"
        try:
            number, is_share = float(written), "." in written
        except ValueError:
            number, is_share = math.nan, False
        if not pattern or not 0 < number < math.inf or (number > 1 if is_share else number != int(number)):
            what = f"{text!r} does not say what to keep"
            raise ConfigError(what, where="--keep", mend=mend)
        return cls(pattern, number, is_share)

    def width(self, channels: int) -> int:
        """Return how many of C channels stay."""
        wanted = math.floor(self.number * channels + 1e-9) if self.is_share else int(self.number)
        return min(max(wanted, 1), channels)
