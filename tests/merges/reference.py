"""Every method once more: slow, obvious, float64, over whole arrays, from the formulas. The oracle of the fast ones.

Each function takes the deltas or the weights [inputs, ...] in float64 (float32 numbers), and the options; it returns
the merged delta or the merged weights.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np

MASK = (1 << 64) - 1


def splitmix(key: int, index: int) -> int:
    """64 random bits, in Python's own integers."""
    x = (key + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def half(key: int, index: int) -> float:
    """The random number of one element: 32 of the bits that it shares with its neighbour."""
    return ((splitmix(key, index // 2) >> (32 * (index % 2))) & 0xFFFFFFFF) / 2**32


def keep_count(density: float, size: int) -> int:
    return min(max(math.floor(Decimal(str(density)) * size), 1), size)


def trimmed(d: np.ndarray, density: float, gamma: float = 0.0) -> np.ndarray:
    """The greatest `gamma` dropped, of the rest the greatest `density` kept, with all that ties at the ends."""
    ordered = sorted(np.abs(d).ravel().tolist(), reverse=True)
    first = min(int(gamma * d.size), d.size - keep_count(density, d.size))
    last = first + keep_count(density, d.size) - 1
    most = math.inf if first == 0 else ordered[first]
    return np.where((np.abs(d) >= ordered[last]) & (np.abs(d) <= most), d, 0.0)


def elected(
    d: np.ndarray, weight: np.ndarray, elect: str = "before", combine: str = "mean", zero: str = "none"
) -> np.ndarray:
    flat = d.reshape(len(d), -1)
    out = np.zeros(flat.shape[1])
    for i in range(flat.shape[1]):
        votes = sum(
            (float(np.sign(w)) if elect == "before" else w) * x for w, x in zip(weight, flat[:, i], strict=True)
        )
        sign = np.sign(votes) or (1.0 if zero == "positive" else 0.0)
        total = mass = 0.0
        for w, x in zip(weight, flat[:, i], strict=True):
            if np.sign(w) * x * sign > 0:
                total, mass = total + abs(w) * (np.sign(w) * x), mass + abs(w)
        out[i] = total if combine == "sum" else total / mass if mass else 0.0
    return out.reshape(d.shape[1:])


def summed(d: np.ndarray, weight: np.ndarray, normalize: bool = False) -> np.ndarray:
    out = np.zeros(d.shape[1:])
    for w, x in zip(weight, d, strict=True):
        out = out + (w / np.sum(weight) if normalize else w) * x
    return out


def ties(d: np.ndarray, weight: np.ndarray, density: np.ndarray, **how: str) -> np.ndarray:
    return elected(np.stack([trimmed(x, k) for x, k in zip(d, density, strict=True)]), weight, **how)


def dropped(d: np.ndarray, density: np.ndarray, keys: list[int], rescale: str) -> tuple[np.ndarray, np.ndarray]:
    """The deltas after DARE's mask, and the factors that rescale them."""
    out, factors = np.zeros_like(d), []
    for m, x in enumerate(d):
        mask = np.array([half(keys[m], i) < density[m] for i in range(x.size)]).reshape(x.shape)
        out[m] = np.where(mask, x, 0)
        left = np.abs(out[m]).sum()
        factors.append({"density": 1 / density[m], "none": 1.0, "l1": np.abs(x).sum() / left if left else 1.0}[rescale])
    return out, np.array(factors)


def pruned(d: np.ndarray, density: np.ndarray, epsilon: float, keys: list[int], rescale: str) -> np.ndarray:
    """DELLA's mask, row by row, and its rescaling."""
    out = np.zeros_like(d)
    for m, x in enumerate(d):
        rows = x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)
        kept = np.zeros_like(rows)
        for r, row in enumerate(rows):
            for rank, c in enumerate(sorted(range(row.size), key=lambda c, row=row: (abs(row[c]), c))):
                share = rank / (row.size - 1) if row.size > 1 else 0.5
                chance = density[m] - epsilon + 2 * epsilon * share
                if (splitmix(keys[m], r * row.size + c) >> 11) / 2**53 < chance:
                    kept[r, c] = np.float32(row[c] / chance) if rescale == "density" else row[c]
        out[m] = kept.reshape(x.shape)
        if rescale == "l1" and np.abs(out[m]).sum():
            out[m] *= np.abs(x).sum() / np.abs(out[m]).sum()
    return out


def slerp(a: np.ndarray, b: np.ndarray, t: float, chord: float = 0.9995) -> np.ndarray:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = float((a * b).sum() / lengths) if lengths else 1.0
    if abs(cosine) > chord:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def sphere_mean(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The weighted mean on the sphere by steps in the whole space, times the weighted mean length."""
    share = np.asarray(weight, float) / np.sum(weight)
    flat = x.reshape(len(x), -1)
    lengths = np.linalg.norm(flat, axis=1)
    units = flat / lengths[:, None]
    point = share @ units
    point /= np.linalg.norm(point)
    for _ in range(300):
        tangent = np.zeros_like(point)
        for s, u in zip(share, units, strict=True):
            along = float(np.clip(u @ point, -1, 1))
            across = u - along * point
            if np.linalg.norm(across) > 1e-14:
                tangent += s * math.acos(along) * across / np.linalg.norm(across)
        step = float(np.linalg.norm(tangent))
        if step < 1e-14:
            break
        point = math.cos(step) * point + math.sin(step) * tangent / step
        point /= np.linalg.norm(point)
    return (float(share @ lengths) * point).reshape(x.shape[1:])


def stock(d: np.ndarray) -> np.ndarray:
    n, flat = len(d), d.reshape(len(d), -1)
    cosines = []
    for i in range(n):
        for j in range(i):
            lengths = np.linalg.norm(flat[i]) * np.linalg.norm(flat[j])
            cosines.append(float(flat[i] @ flat[j] / lengths) if lengths else 0.0)
    c = float(np.mean(cosines))
    return (min(n * c / (1 + (n - 1) * c), 1.0) if c > 0 else 0.0) * d.mean(0)


def sce(d: np.ndarray, select_topk: float) -> np.ndarray:
    variance = d.var(0).astype(np.float32)
    if select_topk < 1 and (variance > 0).any():
        ordered = sorted(variance[variance > 0].tolist(), reverse=True)
        least = ordered[keep_count(select_topk, len(ordered)) - 1]
        d = np.where(variance >= np.float32(least), d, 0)
    energy = np.array([(x**2).sum() for x in d])
    weight = energy / energy.sum() if energy.sum() else np.full(len(d), 1 / len(d))
    flat = d.reshape(len(d), -1)
    out = np.zeros(flat.shape[1])
    for i in range(flat.shape[1]):
        sign = np.sign(sum(flat[:, i]))
        agree = flat[:, i] * sign > 0
        mass = sum(weight[agree])
        out[i] = sum(weight[agree] * flat[agree, i]) / mass if mass > 0 else 0
    return out.reshape(d.shape[1:])


def fusion(b: np.ndarray, x: np.ndarray) -> np.ndarray:
    rows_b, rows_x = (a.reshape(-1, a.shape[-1]) if a.ndim > 1 else a.reshape(1, -1) for a in (b, x))
    importance = np.zeros_like(rows_b)
    for r in range(len(rows_b)):
        log_q = rows_b[r] - rows_b[r].max()
        log_q = log_q - np.log(np.exp(log_q).sum())
        log_p = rows_x[r] - rows_x[r].max()
        log_p = log_p - np.log(np.exp(log_p).sum())
        importance[r] = np.abs(rows_x[r] - rows_b[r]) * max(float((np.exp(log_p) * (log_p - log_q)).sum()), 0)
    importance = importance.astype(np.float32).astype(float)
    q1, q2, q3 = np.quantile(importance, [0.25, 0.5, 0.75], method="lower")
    return np.where(importance >= q2 + 1.5 * (q3 - q1), rows_x, rows_b).reshape(b.shape)


def tsv(d: np.ndarray) -> np.ndarray:
    if d.ndim != 3 or min(d.shape[1:]) < len(d):
        return d.mean(0)
    kept = min(d.shape[1:]) // len(d)
    lefts, values, rights = [], [], []
    for x in d:
        u, s, v = np.linalg.svd(x, full_matrices=False)
        lefts.append(u[:, :kept])
        values += s[:kept].tolist()
        rights.append(v[:kept])

    def orthonormal(a: np.ndarray) -> np.ndarray:
        # A (A^T A)^(-1/2), the polar factor, by the eigenvectors of A^T A.
        w, q = np.linalg.eigh(a.T @ a)
        return a @ (q / np.sqrt(w)) @ q.T

    return orthonormal(np.concatenate(lefts, 1)) @ np.diag(values) @ orthonormal(np.concatenate(rights).T).T


def iso(d: np.ndarray) -> np.ndarray:
    if d.ndim != 3:
        return d.mean(0)
    u, s, v = np.linalg.svd(d.sum(0), full_matrices=False)
    return u @ np.diag(np.full(len(s), s.mean())) @ v


def regmean(x: np.ndarray, grams: np.ndarray, alpha: float) -> np.ndarray:
    scaled = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in grams]
    return sum(w @ g for w, g in zip(x, scaled, strict=True)) @ np.linalg.inv(sum(scaled))


Options = dict[str, Any]
