"""Matrices that are kept sparse: whatever is done with them gives what it gives with plain ones."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxfuse import matrices
from onnxfuse.arrays import FloatArray
from onnxfuse.fusion.maps import ChannelMap, OutputNorm
from onnxfuse.matrices import (
    Matrix,
    added,
    as_dense,
    count_entries,
    entries_at,
    from_entries,
    has_finite_entries,
    magnitudes,
    product,
    rows_to_one,
    transposed,
)

seeds = st.integers(0, 2**16)


def both(seed: int, rows: int, columns: int) -> tuple[Matrix, FloatArray]:
    """Return a matrix with a few entries as it is kept where it is large, and as a plain array."""
    rng = np.random.default_rng(seed)
    places = np.flatnonzero(rng.random(rows * columns) < 0.2)
    plain = np.zeros((rows, columns))
    plain.flat[places] = rng.normal(size=len(places))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "_WORTH_A_LOOK", 0)
        sparse = from_entries(plain.flat[places], places // columns, places % columns, (rows, columns))
    assert not isinstance(sparse, np.ndarray)
    return sparse, plain


@given(seed=seeds, rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_sparse_matrices_are_the_plain_ones(seed: int, rows: int, columns: int) -> None:
    """Every function gives the same for both."""
    sparse, plain = both(seed, rows, columns)
    other, plain_other = both(seed + 1, rows, columns)
    np.testing.assert_array_equal(as_dense(sparse), plain)
    np.testing.assert_array_equal(as_dense(transposed(sparse)), plain.T)
    np.testing.assert_array_equal(as_dense(magnitudes(sparse)), np.abs(plain))
    np.testing.assert_array_equal(as_dense(added(sparse, other)), plain + plain_other)
    np.testing.assert_array_equal(as_dense(added(sparse, plain_other)), plain + plain_other)
    shares = as_dense(rows_to_one(magnitudes(sparse)))
    np.testing.assert_allclose(shares, as_dense(rows_to_one(np.abs(plain))), rtol=1e-15)
    np.testing.assert_allclose(shares.sum(axis=1), plain.any(axis=1), rtol=1e-12)
    everywhere = np.divmod(np.arange(rows * columns), columns)
    np.testing.assert_array_equal(entries_at(sparse, *everywhere), plain.ravel())
    assert count_entries(sparse) == count_entries(plain) == np.count_nonzero(plain)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@given(seed=seeds, rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_products_are_those_of_plain_matrices(dtype: type, seed: int, rows: int, columns: int) -> None:
    """In the type of what is multiplied, whatever the matrix is."""
    sparse, plain = both(seed, rows, columns)
    block: np.ndarray[Any, np.dtype[Any]] = np.random.default_rng(seed).normal(size=(columns, 3)).astype(dtype)
    wanted = plain @ block.astype(np.float64)
    for matrix in (sparse, plain):
        found = product(matrix, block)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted, rtol=0, atol=8 * float(np.finfo(dtype).eps))


def test_what_is_not_finite_is_found() -> None:
    """In plain and in sparse matrices."""
    for bad in (np.nan, np.inf):
        sparse, plain = both(0, 4, 4)
        assert has_finite_entries(sparse)
        assert has_finite_entries(plain)
        plain[1, 2] = bad
        assert not has_finite_entries(plain)
        one = np.array([bad]), np.array([0]), np.array([1])
        assert not has_finite_entries(from_entries(*one, (2, 2)))
        assert not has_finite_entries(from_entries(*one, (300, 300)))


def test_only_large_matrices_are_sparse() -> None:
    """A small one is a plain array, which needs no SciPy."""
    ones = np.ones(2), np.arange(2), np.arange(2)
    assert isinstance(from_entries(*ones, (2, 2)), np.ndarray)
    assert not isinstance(from_entries(*ones, (2, 2**15)), np.ndarray)


@pytest.mark.parametrize("norm", ["sum", "mean"])
@given(seed=seeds, kept=st.integers(1, 8))
def test_sparse_plans_make_the_same_maps(norm: OutputNorm, seed: int, kept: int) -> None:
    """As plain ones, channels and targets without mass included."""
    rng = np.random.default_rng(seed)
    sparse, plain = both(seed, 8, kept)
    anchors = rng.permutation(8)[:kept].astype(np.int64)
    one = ChannelMap.from_plan(magnitudes(sparse), anchors, output_norm=norm)
    two = ChannelMap.from_plan(np.abs(plain), anchors, output_norm=norm)
    np.testing.assert_allclose(one.output, two.output, rtol=1e-14)
    np.testing.assert_allclose(one.input, two.input, rtol=1e-14)
    np.testing.assert_allclose(as_dense(one.carried), as_dense(two.carried), rtol=1e-14)
    assert one.is_selection == two.is_selection


@given(seed=seeds)
def test_maps_of_many_channels_are_what_they_say(seed: int) -> None:
    """Selections, clusters and scalings that are kept sparse."""
    channels, kept = 300, 250
    rng = np.random.default_rng(seed)
    order = rng.permutation(channels).astype(np.int64)
    selection = ChannelMap.selection(order[:kept], channels)
    assert not isinstance(selection.making, np.ndarray)
    np.testing.assert_array_equal(selection.output, np.eye(channels)[order[:kept]])
    np.testing.assert_array_equal(selection.input, selection.output.T)
    np.testing.assert_array_equal(as_dense(selection.carried), selection.output)
    assert selection.is_selection
    assert not selection.is_identity
    assert ChannelMap.identity(channels).is_identity
    assert ChannelMap.permutation(order).is_identity == (order == np.arange(channels)).all()
    labels = np.concatenate([np.arange(kept), rng.integers(0, kept, channels - kept)])
    clusters = ChannelMap.clusters(labels, kept)
    np.testing.assert_array_equal(clusters.input, np.eye(kept)[labels])
    np.testing.assert_allclose(clusters.output.sum(axis=1), 1.0, rtol=1e-12)
    assert not clusters.is_selection
    factors = 2.0 ** rng.choice([-1, 1], channels)
    scaling = ChannelMap.scaling(factors)
    np.testing.assert_array_equal(scaling.output, np.diag(factors))
    np.testing.assert_array_equal(scaling.input, np.diag(1 / factors))
