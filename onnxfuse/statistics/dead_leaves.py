"""Dead leaves: images made of nothing but overlapping shapes, with the occlusion statistics of natural scenes.

Shapes of all sizes fall on one another like leaves; what is seen is the topmost. With radii from a power law, edges,
contrasts and correlations over distance are much like those of photographs (Lee, Mumford and Huang, "Occlusion models
for natural images", IJCV 2001), and filters that were trained on photographs respond to them in much the same way
(Baradad et al., "Learning to see by looking at noise", NeurIPS 2021).
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["dead_leaves"]

Images: TypeAlias = NDArray[np.float32]

# Radii follow r^-3 up to the largest, from a smallest on that differs from image to image as the scale of photographs
# does; in shares of the image's smaller side. Chosen on held-back training images of CIFAR-10 networks.
_SMALLEST, _LARGEST = (0.03, 0.3), 0.6
_LEAVES = 60
_NOISE = 0.02
_FLIPS: tuple[tuple[int, ...], ...] = ((), (2,), (1,), (1, 2))


def dead_leaves(count: int, height: int, width: int, channels: int, rng: np.random.Generator) -> Images:
    """Make images.

    Args:
        count: How many.
        height: Pixels.
        width: Pixels.
        channels: Colour channels; with three, colours vary as those of photographs do: mostly in brightness.
        rng: Source of randomness.

    Returns:
        Shape (count, channels, height, width), in [0, 1].

    Example:
        >>> images = dead_leaves(2, 8, 8, 3, np.random.default_rng(0))
        >>> images.shape, bool((images >= 0).all() and (images <= 1).all())
        ((2, 3, 8, 8), True)
    """
    images = np.empty((count, channels, height, width), np.float32)
    painted = -(-count // len(_FLIPS))
    for image in images[:painted]:
        _paint(image, rng)
    # A mirror image is as natural as the image itself, and costs nothing.
    for i in range(painted, count):
        images[i] = np.flip(images[i % painted], _FLIPS[i // painted])
    return images


def _paint(image: Images, rng: np.random.Generator) -> None:
    """Let leaves fall on one image, the lowest first."""
    channels, height, width = image.shape
    side = min(height, width)
    palette = _Palette(channels, rng)
    ys, xs = np.mgrid[0:height, 0:width].astype(np.float32)
    _fill(image, palette, ys, xs, side, rng)
    smallest = float(np.exp(rng.uniform(*np.log(_SMALLEST))))
    radii = _radii(_LEAVES, smallest, rng) * side
    for radius in radii:
        y, x = rng.uniform(-radius, height + radius), rng.uniform(-radius, width + radius)
        top, left = max(int(y - 2 * radius), 0), max(int(x - 2 * radius), 0)
        bottom, right = min(int(y + 2 * radius) + 2, height), min(int(x + 2 * radius) + 2, width)
        if top >= bottom or left >= right:
            continue
        window = np.s_[top:bottom, left:right]
        cover = _leaf(ys[window] - y, xs[window] - x, radius, rng)
        leaf = np.empty((channels, bottom - top, right - left), np.float32)
        _fill(leaf, palette, ys[window], xs[window], radius, rng)
        patch = image[:, top:bottom, left:right]
        patch += cover * (leaf - patch)
    image += rng.normal(0.0, _NOISE, image.shape)
    np.clip(image, 0.0, 1.0, out=image)


class _Palette:
    """The light of one image: its brightness, contrast and tint."""

    def __init__(self, channels: int, rng: np.random.Generator) -> None:
        self.mean = rng.normal(0.47, 0.12) + rng.normal(0.0, 0.06, channels)
        self.contrast = rng.uniform(0.10, 0.30)
        self.tint = rng.uniform(0.03, 0.12)

    def colour(self, channels: int, rng: np.random.Generator) -> np.ndarray:
        tint = rng.normal(0.0, self.tint, channels)
        return np.asarray(self.mean + self.contrast * rng.normal() + tint - tint.mean())


def _radii(count: int, smallest: float, rng: np.random.Generator) -> np.ndarray:
    """Draw from the density r^-3 between the bounds by inverting its distribution function; shuffled by nature."""
    low, high = smallest**-2, _LARGEST**-2
    return np.asarray((low + rng.random(count) * (high - low)) ** -0.5)


def _leaf(dy: np.ndarray, dx: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Return how much a leaf covers every pixel, 0 to 1: a disc, an ellipse, a bar or a rectangle, edges smooth."""
    angle, stretch = rng.uniform(0, np.pi), rng.uniform(0.2, 1.0)
    u = np.cos(angle) * dx + np.sin(angle) * dy
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / stretch
    distance = np.hypot(u, v) if rng.random() < 0.5 else np.maximum(np.abs(u), np.abs(v))
    blur = rng.uniform(0.3, 1.2)
    return np.asarray(np.clip((radius - distance) * stretch / blur + 0.5, 0.0, 1.0))


def _fill(
    area: np.ndarray, palette: _Palette, ys: np.ndarray, xs: np.ndarray, size: float, rng: np.random.Generator
) -> None:
    """Paint an area with one colour, shaded, and sometimes with stripes as texture."""
    channels = len(area)
    slope = rng.normal(0.0, 0.35 * palette.contrast / max(size, 1.0), 2)
    shade = slope[0] * (ys - ys.mean()) + slope[1] * (xs - xs.mean())
    if rng.random() < 0.3:
        angle, period = rng.uniform(0, np.pi), np.exp(rng.uniform(np.log(2.0), np.log(max(size, 2.5))))
        wave = np.sin((np.cos(angle) * xs + np.sin(angle) * ys) * (2 * np.pi / period) + rng.uniform(0, 2 * np.pi))
        shade = shade + rng.uniform(0.1, 0.6) * palette.contrast * wave
    area[:] = palette.colour(channels, rng)[:, None, None] + shade
