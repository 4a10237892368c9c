"""The rows that a convolution reads: products with the flattened filters are what a convolution computes."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxfuse.arrays import IntArray
from onnxfuse.statistics.patches import convolution_pads, patch_rows, place_count
from tests.builders import AnyArray, Net, run_ort, run_reference

AUTO = ("SAME_UPPER", "SAME_LOWER", "VALID")


@dataclass(frozen=True)
class Case:
    """A convolution: its sizes, one entry for each spatial axis."""

    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    samples: int
    channels: int
    filters: int
    seed: int

    @property
    def window(self) -> list[int]:
        """Extents of the dilated filter."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    def net(self, auto_pad: str = "") -> Net:
        """Write a network of this one convolution, in float64 where pads are stated."""
        net = Net(17, seed=self.seed, dtype=1 if auto_pad else 11)
        x = net.input(self.samples, self.channels, *self.sizes)
        padding = {"auto_pad": auto_pad} if auto_pad else {"pads": self.pads}
        weight = net.weight(self.filters, self.channels, *self.kernel, name="w")
        strides, dilations = list(self.strides), list(self.dilations)
        net.output(net.node("Conv", x, weight, name="conv", strides=strides, dilations=dilations, **padding))
        return net

    def padded(self, x: AnyArray, auto_pad: str = "NOTSET") -> AnyArray:
        """Pad an input as the package says that the convolution does."""
        pads = convolution_pads(auto_pad, self.sizes, self.window, self.strides, self.pads)
        return np.pad(x, ((0, 0), (0, 0), *pads))

    def places(self, padded: AnyArray) -> IntArray:
        """Return every place in order."""
        count = place_count(padded, self.kernel, self.strides, self.dilations)
        return np.stack(np.divmod(np.arange(self.samples * count), count), axis=1).astype(np.int64)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw convolutions in one to three dimensions whose filter fits at least once."""
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank)))

    kernel, dilations, strides = each(1, 3), each(1, 2), each(1, 3)
    window = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    sizes = tuple(extent + extra for extent, extra in zip(window, each(0, 3), strict=True))
    few = st.integers(1, 3)
    return Case(
        sizes,
        kernel,
        strides,
        dilations,
        each(0, 2) + each(0, 2),
        draw(few),
        draw(few),
        draw(few),
        draw(st.integers(0, 99)),
    )


def by_channel(y: AnyArray) -> AnyArray:
    """Turn a map into rows: one for each sample and place, channels along it."""
    return np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_patches_times_filters_are_the_convolution(case: Case) -> None:
    """Patches times filters are the convolution."""
    net = case.net()
    (expected,) = run_reference(net.model(), net.feeds).values()
    padded = case.padded(net.feeds["x0"])
    rows = patch_rows(padded, case.kernel, case.strides, case.dilations, case.places(padded))
    assert rows.dtype == np.float64
    np.testing.assert_allclose(rows @ net.values["w"].reshape(case.filters, -1).T, by_channel(expected), atol=1e-12)


@pytest.mark.parametrize("auto_pad", AUTO)
@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_automatic_pads_are_those_of_the_runtime(auto_pad: str, case: Case) -> None:
    """Automatic pads are those of the runtime, which knows SAME only without dilations."""
    if auto_pad != "VALID":
        case = replace(case, dilations=(1,) * len(case.sizes))
    net = case.net(auto_pad)
    (expected,) = run_ort(net.model(), net.feeds).values()
    padded = case.padded(net.feeds["x0"], auto_pad)
    assert place_count(padded, case.kernel, case.strides, case.dilations) == np.prod(expected.shape[2:])
    rows = patch_rows(padded, case.kernel, case.strides, case.dilations, case.places(padded))
    actual = rows @ net.values["w"].astype(np.float64).reshape(case.filters, -1).T
    np.testing.assert_allclose(actual, by_channel(expected), atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(case=cases(), seed=st.integers(0, 99))
def test_rows_are_those_of_the_places_asked_for_in_their_order(case: Case, seed: int) -> None:
    """Rows are those of the places asked for, in their order, repetitions included."""
    x = np.random.default_rng(seed).normal(size=(case.samples, case.channels, *case.sizes))
    padded = case.padded(x)
    places = case.places(padded)
    rows = patch_rows(padded, case.kernel, case.strides, case.dilations, places)
    chosen = np.random.default_rng(seed).integers(0, len(places), 5)
    some = patch_rows(padded, case.kernel, case.strides, case.dilations, places[chosen])
    np.testing.assert_array_equal(some, rows[chosen])


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_same_padding_keeps_the_size_over_the_stride_and_is_even(case: Case) -> None:
    """SAME pads give ceil(size / stride) places, the two sides differ by at most one, and LOWER mirrors UPPER."""
    upper = convolution_pads("SAME_UPPER", case.sizes, case.window, case.strides, [])
    lower = convolution_pads("SAME_LOWER", case.sizes, case.window, case.strides, [])
    assert lower == tuple((b, a) for a, b in upper)
    assert all(0 <= b - a <= 1 for a, b in upper)
    padded = np.pad(np.zeros((1, 1, *case.sizes)), ((0, 0), (0, 0), *upper))
    expected = np.prod([-(-size // step) for size, step in zip(case.sizes, case.strides, strict=True)])
    assert place_count(padded, case.kernel, case.strides, case.dilations) == expected


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_channels_come_first_in_a_row(case: Case) -> None:
    """A row without one channel is the row of the input without that channel."""
    assume(case.channels > 1)
    x = np.random.default_rng(case.seed).normal(size=(case.samples, case.channels, *case.sizes))
    places = case.places(x)
    rows = patch_rows(x, case.kernel, case.strides, case.dilations, places)
    fewer = patch_rows(x[:, 1:], case.kernel, case.strides, case.dilations, places)
    np.testing.assert_array_equal(rows[:, int(np.prod(case.kernel)) :], fewer)
