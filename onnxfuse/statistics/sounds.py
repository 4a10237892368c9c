"""Made-up sounds: what dead leaves are for images.

Tones with harmonics that glide, and coloured noise, each with an onset, a decay and silence around it, over a quiet
floor of noise of some colour. Spectra of natural sounds fall off by a power of the frequency (Voss and Clarke, "1/f
noise in music and speech", Nature 1975), and their loudness is far from Gaussian, since most of the time little happens
(Attias and Schreiner, "Temporal low-order statistics of natural sounds", NIPS 1996).
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxfuse.arrays import FloatArray

__all__ = ["sounds"]

Waves: TypeAlias = NDArray[np.float32]

# How many events a sound has at most; their loudness differs by this factor of e.
_EVENTS, _LOUDNESS = 4, 0.7
# Frequencies of tones in cycles a sample, and how many harmonics they have at most, falling by some power.
_LOWEST, _HIGHEST, _HARMONICS, _ROLL = 0.004, 0.25, 12, (0.3, 2.0)
# By how much of itself the pitch changes over the whole, and the steepest spectrum of noise, as a power.
_GLIDE, _STEEPEST = 0.3, 1.2
# The level of a whole sound: typical, and by how much of e it differs; as recordings from -1 to 1 have.
_LEVEL, _SPREAD = 0.1, 0.8


def sounds(count: int, length: int, rng: np.random.Generator) -> Waves:
    """Make sounds.

    Args:
        count: How many.
        length: Samples of each.
        rng: Source of randomness.

    Returns:
        Shape (count, length), about as loud as recordings that go from -1 to 1, which few of these leave.

    Example:
        >>> waves = sounds(3, 100, np.random.default_rng(0))
        >>> waves.shape, bool(np.isfinite(waves).all())
        ((3, 100), True)
    """
    found = np.empty((count, length), np.float32)
    for wave in found:
        heard = _noise(length, rng) * np.exp(rng.uniform(-6.0, -1.0))
        for _ in range(rng.integers(1, _EVENTS + 1)):
            made = _tone(length, rng) if rng.random() < 0.5 else _noise(length, rng)
            heard = heard + np.exp(rng.normal(0.0, _LOUDNESS)) * _envelope(length, rng) * made
        wave[:] = _unit(heard) * _LEVEL * np.exp(rng.normal(0.0, _SPREAD))
    return found


def _envelope(length: int, rng: np.random.Generator) -> FloatArray:
    """Return an onset somewhere and a slower decay, of a duration from a twentieth of the whole on."""
    duration = max(length * float(np.exp(rng.uniform(np.log(0.05), 0.0))), 2.0)
    onset = max(duration * rng.uniform(0.005, 0.3), 1.0)
    time = np.arange(length) - float(rng.integers(0, length))
    decayed = np.minimum(time / onset, 1.0) * np.exp(-np.maximum(time - onset, 0.0) / duration)
    return np.where(time >= 0, decayed, 0.0)


def _tone(length: int, rng: np.random.Generator) -> FloatArray:
    """Return a tone with harmonics, those above half a cycle a sample left out."""
    pitch = float(np.exp(rng.uniform(np.log(_LOWEST), np.log(_HIGHEST))))
    time = np.arange(length, dtype=np.float64)
    turns = pitch * time * (1.0 + rng.normal(0.0, _GLIDE) * time / (2 * length))
    roll = rng.uniform(*_ROLL)
    orders = np.arange(1, _HARMONICS + 1)
    orders = orders[orders * pitch < 0.5]
    phases = rng.uniform(0.0, 2 * np.pi, len(orders))
    waves: FloatArray = np.sin(2 * np.pi * orders[:, None] * turns + phases[:, None])
    return _unit(np.asarray(np.power(orders, -roll) @ waves, np.float64))


def _noise(length: int, rng: np.random.Generator) -> FloatArray:
    """Return noise whose spectrum falls by some power of the frequency."""
    frequency = np.fft.rfftfreq(length)
    amplitude = np.zeros_like(frequency)
    amplitude[1:] = frequency[1:] ** -rng.uniform(0.0, _STEEPEST)
    parts = rng.normal(size=(2, len(frequency)))
    return _unit(np.fft.irfft(amplitude * (parts[0] + 1j * parts[1]), length))


def _unit(wave: FloatArray) -> FloatArray:
    size = float(np.sqrt(np.square(wave).mean()))
    return np.asarray(wave / size if size > 0 else wave, np.float64)
