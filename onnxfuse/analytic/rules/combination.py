"""Two tensors, or a tensor and numbers for every channel: sums, gates, and several tensors side by side."""

from collections.abc import Sequence

import numpy as np

from onnxfuse.analytic.moments import Gain, Made, Moments, Rule, Site, Unknown, clipped, scaled_rows
from onnxfuse.arrays import FloatArray

__all__ = ["RULES", "combined", "per_channel"]


def combined(site: Site) -> Sequence[Made] | Unknown:
    """Add, Sub, Sum, Mul, Div: what no single source explains."""
    op = site.node.op
    computed = [name for name in site.node.inputs if name in site.known]
    if len(computed) == len([name for name in site.node.inputs if name]):
        if op in {"Add", "Sum", "Sub"}:
            return _sum(site, computed, -1.0 if op == "Sub" else 1.0)
        return _gate(site, *computed) if op == "Mul" and len(computed) == 2 else site.unknown("two tensors meet in it")
    if len(computed) != 1 or len(site.node.inputs) != 2:
        return site.unknown("several tensors and constants meet in it")
    return _with_constant(site, computed[0])


def per_channel(value: FloatArray, dims: Sequence[int], axis: int) -> FloatArray | None:
    """Return a broadcast constant as one number for every index of an axis; None if it has more.

    Args:
        value: The constant.
        dims: The shape that it is broadcast to.
        axis: The axis.

    Example:
        >>> per_channel(np.ones((2, 1)), (5, 2, 3), 1).tolist()
        [1.0, 1.0]
    """
    padded = (1,) * (len(dims) - value.ndim) + value.shape
    if value.ndim > len(dims) or any(size != 1 for i, size in enumerate(padded) if i != axis):
        return None
    return np.broadcast_to(value.reshape(-1), dims[axis]).astype(np.float64)


def _with_constant(site: Site, name: str) -> Sequence[Made] | Unknown:
    """A number for every channel is added, or multiplies it."""
    x, dims = site.known[name], site.dims_out()
    first = site.node.inputs[0] == name
    constant = site.constant(1 if first else 0)
    numbers = None if constant is None or dims != site.dims[name] else per_channel(constant, dims, x.axis)
    op = site.node.op
    if numbers is None or (op == "Div" and not first) or op not in {"Add", "Sum", "Sub", "Mul", "Div"}:
        return site.unknown("its constant is not one number for every channel")
    ones = np.ones(len(x.mean))
    if op in {"Add", "Sum"}:
        scale, shift = ones, numbers
    elif op == "Sub":
        scale, shift = (ones, -numbers) if first else (-ones, numbers)
    else:
        with np.errstate(divide="ignore"):
            scale, shift = (numbers if op == "Mul" else 1.0 / numbers), np.zeros_like(ones)
    if not np.isfinite(scale).all():
        return site.unknown("it divides by zero")
    return [_scaled(x, scale, shift, name)]


def _scaled(x: Moments, scale: FloatArray, shift: FloatArray, name: str) -> Made:
    """Return what scaling and shifting every channel makes."""
    moments = Moments(x.axis, scale * x.mean + shift, np.outer(scale, scale) * x.covariance, x.decay)
    return Made(moments, {name: scaled_rows(scale)})


def _aligned(site: Site, names: Sequence[str]) -> list[Moments] | None:
    """Return the moments of operands as they are broadcast: what is repeated along an axis is the same all along it."""
    dims = site.dims_out()
    found = []
    for name in names:
        x, own = site.known[name], site.dims[name]
        if len(own) != len(dims) or own[x.axis] != dims[x.axis]:
            return None
        decay = tuple(1.0 if s == 1 and d != 1 else rho for rho, s, d in zip(x.decay, own, dims, strict=True))
        found.append(Moments(x.axis, x.mean, x.covariance, decay))
    return found if len({x.axis for x in found}) == 1 else None


def _sum(site: Site, names: Sequence[str], sign: float) -> Sequence[Made] | Unknown:
    r"""Sums of branches: :math:`\sum_{kl} Cov(x_k, x_l)`, what they have in common included."""
    terms = _aligned(site, names)
    if terms is None:
        return site.unknown("its operands have their channels in different places")
    signs = [1.0, *([sign] * (len(names) - 1))]
    mean = np.sum([s * x.mean for s, x in zip(signs, terms, strict=True)], axis=0)
    covariance, further = np.zeros_like(terms[0].covariance), np.zeros(len(terms[0].decay))
    gains: dict[str, float] = {}
    for s, x, name in zip(signs, terms, names, strict=True):
        gains[name] = gains.get(name, 0.0) + s
        for r, y, other in zip(signs, terms, names, strict=True):
            part = s * r * (x.covariance if name == other else site.cross(name, other))
            covariance += part
            further += float(np.trace(part)) * 0.5 * (np.array(x.decay) + np.array(y.decay))
    total = float(np.trace(covariance))
    decay = tuple(clipped(f / total) if total > 0 else 0.0 for f in further)
    moments = Moments(terms[0].axis, mean, 0.5 * (covariance + covariance.T), decay)
    return [Made(moments, {name: _times(s) for name, s in gains.items()})]


def _times(factor: float) -> Gain:
    return lambda cross: factor * cross


def _gate(site: Site, left: str, right: str) -> Sequence[Made] | Unknown:
    r"""Products of two tensors, exact where both are Gaussian (Isserlis, Biometrika 1918).

    .. math:: Cov(a_i b_i, a_j b_j) = m_i m_j B_{ij} + n_i n_j A_{ij} + m_i n_j D_{ij}^T + n_i m_j D_{ij}
              + A_{ij} B_{ij} + D_{ij} D_{ji}

    with means m, n, covariances A, B, and D = Cov(a, b).
    """
    operands = _aligned(site, (left, right))
    if operands is None:
        return site.unknown("its operands have their channels in different places")
    a, b = operands
    between = a.covariance if left == right else site.cross(left, right)
    mean = a.mean * b.mean + np.diag(between)
    mixed = a.mean[:, None] * b.mean * between.T
    covariance = np.outer(a.mean, a.mean) * b.covariance + np.outer(b.mean, b.mean) * a.covariance
    covariance += mixed + mixed.T + a.covariance * b.covariance + between * between.T
    total = float(np.trace(covariance))
    decay = []
    for rho, sigma in zip(a.decay, b.decay, strict=True):
        both = np.diag(between) * 0.5 * (rho + sigma)
        further = a.mean**2 * sigma * b.variance + b.mean**2 * rho * a.variance + 2 * a.mean * b.mean * both
        further += rho * sigma * a.variance * b.variance + both * both
        decay.append(clipped(float(further.sum()) / total) if total > 0 else 0.0)
    gains = {right: scaled_rows(a.mean), left: scaled_rows(b.mean)}
    if left == right:
        gains = {left: scaled_rows(2.0 * a.mean)}
    return [Made(Moments(a.axis, mean, covariance, tuple(decay)), gains)]


def concat(site: Site) -> Sequence[Made] | Unknown:
    """Concat along the channels: side by side, with what the parts have in common; constants never change."""
    names, dims = list(site.node.inputs), site.dims_out()
    known = [site.known[name] for name in names if name in site.known]
    axis = int(site.attribute("axis", 1)) % len(dims)
    if any(x.axis != axis for x in known):
        return site.unknown("it joins along places")
    sizes = [site.dims[name][axis] for name in names]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    mean, covariance = np.zeros(starts[-1]), np.zeros((starts[-1],) * 2)
    gains: dict[str, Gain] = {}
    places = {name: np.s_[starts[i] : starts[i + 1]] for i, name in enumerate(names)}
    if len(places) < len(names):
        return site.unknown("it joins a value with itself")
    for name, own in places.items():
        if name not in site.known:
            constant = site.constants(name)
            if constant is None:
                return site.unknown("a part is computed from shapes alone")
            moved = np.moveaxis(constant.astype(np.float64), axis, 0).reshape(constant.shape[axis], -1)
            mean[own] = moved.mean(axis=1)
            continue
        mean[own] = site.known[name].mean
        gains[name] = _placed(own, int(starts[-1]))
        for other, there in places.items():
            if other in site.known:
                part = site.known[name].covariance if other == name else site.cross(name, other)
                covariance[own, there] = part
    total = sum(x.total for x in known)
    decay = sum((x.total * np.array(x.decay) for x in known), np.zeros(len(dims))) / (total or 1.0)
    return [Made(Moments(axis, mean, covariance, tuple(map(clipped, decay))), gains)]


def _placed(where: slice, size: int) -> Gain:
    def gain(cross: FloatArray) -> FloatArray:
        found = np.zeros((size, cross.shape[1]))
        found[where] = cross
        return found

    return gain


RULES = (Rule("Concat", concat),)
