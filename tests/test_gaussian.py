"""Moments of activations of Gaussian channels, against closed forms, samples and laws."""

from collections.abc import Mapping
from math import erf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxfuse.arrays import FloatArray
from onnxfuse.statistics.channels import GaussianChannels, ObservedChannels
from onnxfuse.statistics.gaussian import Elementwise, gaussian_moments, hermite_coefficients


def relu(x: FloatArray) -> FloatArray:
    """Return max(x, 0)."""
    return np.maximum(x, 0.0)


def gelu(x: FloatArray) -> FloatArray:
    """Return x times the probability that a Gaussian number is below x."""
    below: FloatArray = 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
    return x * below


FUNCTIONS: Mapping[str, Elementwise] = {
    "relu": relu,
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "leaky": lambda x: np.where(x > 0, x, 0.1 * x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "gelu": gelu,
    "step": lambda x: np.heaviside(x, 0.5),
}


def gaussian(seed: int, channels: int, rank: int | None = None) -> tuple[FloatArray, FloatArray]:
    """Return means and a covariance."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(rank or channels, channels))
    return rng.normal(size=channels), mixing.T @ mixing


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, np.pi / 2, 2.0, 3.0, np.pi])
def test_relu_has_the_arc_cosine_kernel(angle: float) -> None:
    """Second moments of ReLU at mean 0 are the arc-cosine kernel of degree 1 (Cho and Saul, 2009, equation 6)."""
    scales = np.array([0.7, 3.0])
    covariance = np.outer(scales, scales) * np.array([[1.0, np.cos(angle)], [np.cos(angle), 1.0]])
    mean, found = gaussian_moments(relu, np.zeros(2), covariance)
    np.testing.assert_allclose(mean, scales / np.sqrt(2 * np.pi), rtol=1e-4)
    kernel = (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    assert found[0, 1] + mean[0] * mean[1] == pytest.approx(scales.prod() * kernel, abs=2e-4 * scales.prod())
    np.testing.assert_allclose(np.diag(found), np.square(scales) * (0.5 - 0.5 / np.pi), rtol=1e-4)


def test_steps_have_the_arc_sine_law() -> None:
    """The signs of two Gaussian numbers agree with a probability that their correlation gives (Sheppard, 1899)."""
    for correlation in (-0.9, -0.5, 0.0, 0.4, 0.8):
        covariance = np.array([[1.0, correlation], [correlation, 1.0]])
        _, found = gaussian_moments(FUNCTIONS["step"], np.zeros(2), covariance)
        assert found[0, 1] == pytest.approx(np.arcsin(correlation) / (2 * np.pi), abs=4e-3)


def test_coefficients_of_an_exponential() -> None:
    """Those of exp(s x) are exp(s^2 / 2) s^k / sqrt(k!)."""
    found = hermite_coefficients(np.exp, np.zeros(1), np.array([0.8]), 10)[0]
    factorials = np.cumprod([1.0, *range(1, 10)])
    np.testing.assert_allclose(found, np.exp(0.32) * 0.8 ** np.arange(10) / np.sqrt(factorials), atol=1e-9)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "step"])
def test_moments_are_those_of_samples(name: str) -> None:
    """Mean and covariance of f(z), and of f(A z) with f(z), are within the error of a million samples."""
    mean, covariance = gaussian(0, 5)
    rng = np.random.default_rng(1)
    samples = rng.multivariate_normal(mean, covariance, size=400_000)
    output = rng.normal(size=(2, 5))
    exact = GaussianChannels(FUNCTIONS[name], mean, covariance).fused(output)
    drawn = ObservedChannels(FUNCTIONS[name], samples).fused(output)
    scale, fused_scale = np.sqrt(np.diag(exact.whole)), np.sqrt(np.diag(exact.inside))
    np.testing.assert_allclose(exact.mean / scale, drawn.mean / scale, atol=0.01)
    np.testing.assert_allclose(exact.fused_mean / fused_scale, drawn.fused_mean / fused_scale, atol=0.01)
    np.testing.assert_allclose(exact.whole, drawn.whole, atol=0.015 * np.square(scale).max())
    np.testing.assert_allclose(exact.cross, drawn.cross, atol=0.015 * scale.max() * fused_scale.max())
    np.testing.assert_allclose(exact.inside, drawn.inside, atol=0.015 * np.square(fused_scale).max())


@pytest.mark.parametrize("name", FUNCTIONS)
@given(st.integers(0, 99), st.integers(2, 8))
def test_laws_of_covariances(name: str, seed: int, channels: int) -> None:
    """They are positive semidefinite, also where channels depend on each other, and a permutation moves them along."""
    mean, covariance = gaussian(seed, channels, rank=max(1, channels // 2))
    found_mean, found = gaussian_moments(FUNCTIONS[name], mean, covariance)
    assert np.linalg.eigvalsh(found).min() >= -1e-9 * np.trace(found)
    order = np.random.default_rng(seed).permutation(channels)
    moved_mean, moved = gaussian_moments(FUNCTIONS[name], mean[order], covariance[np.ix_(order, order)])
    np.testing.assert_allclose(moved_mean, found_mean[order], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(moved, found[np.ix_(order, order)], atol=1e-9 * np.trace(found))


@given(st.integers(0, 99), st.integers(1, 8))
def test_linear_functions_are_exact(seed: int, channels: int) -> None:
    """Those of a z + b are a m + b and a^2 S."""
    mean, covariance = gaussian(seed, channels)
    found_mean, found = gaussian_moments(lambda x: 3 * x - 2, mean, covariance)
    np.testing.assert_allclose(found_mean, 3 * mean - 2, atol=1e-9)
    np.testing.assert_allclose(found, 9 * covariance, atol=1e-9 * np.trace(covariance))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_copies_and_constants(name: str) -> None:
    """A copy of a channel keeps all of its variance in common with it, kinks or not; a constant has none."""
    mean, covariance = gaussian(2, 3)
    taken = np.array([0, 1, 2, 0])
    covariance = covariance[np.ix_(taken, taken)]
    covariance[2] = covariance[:, 2] = 0.0
    found_mean, found = gaussian_moments(FUNCTIONS[name], mean[taken], covariance)
    assert found[0, 3] == pytest.approx(found[0, 0], rel=1e-9)
    np.testing.assert_allclose(found[2], 0.0, atol=1e-12)
    assert found_mean[2] == pytest.approx(float(FUNCTIONS[name](mean[2:3])[0]))
    selected = GaussianChannels(FUNCTIONS[name], mean[taken], covariance).fused(np.eye(4)[:2])
    np.testing.assert_allclose(selected.cross, selected.whole[:, :2], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(selected.inside, selected.whole[:2, :2], rtol=1e-9, atol=1e-12)
