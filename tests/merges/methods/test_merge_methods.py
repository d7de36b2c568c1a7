"""Every method agrees with its slow reference on random and on adversarial tensors, and keeps its identities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from merges import methods
from merges.engine import tensor_task as tensor_
from merges.engine.jobs import run
from merges.engine.pool import Pool
from merges.engine.readers import Array
from merges.engine.tensor_task import Input, TensorTask
from vectors.errors import ArtifactError

NOT_HERE = {"passthrough"}  # tested by its identity below


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as made:
        yield made


def tensors(kind: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A base and `count` fine-tunes of it: float32 arrays."""
    draw = np.random.default_rng(seed)
    shape = {"one": (1,), "row": (37,), "cube": (3, 4, 5), "large": (60, 50)}.get(kind, (12, 9))
    base = draw.standard_normal(shape).astype(np.float32)
    deltas = 0.1 * draw.standard_normal((count, *shape)).astype(np.float32)
    if kind == "ties":  # few magnitudes, so that many are equal
        base, deltas = np.round(base * 4) / 4, np.round(deltas * 20) / 8
    elif kind == "zeros":
        deltas[draw.random(deltas.shape) < 0.7] = 0
    elif kind == "nothing":
        deltas[:] = 0
    elif kind == "opposite":
        base = np.round(base * 64) / 64
        deltas = np.round(deltas * 64) / 64
        deltas[1] = -deltas[0]
    elif kind == "denormal":
        base, deltas = base * np.float32(1e-39), deltas * np.float32(1e-40)
    return base, (base + deltas).astype(np.float32)


KINDS = ("random", "one", "row", "cube", "large", "ties", "zeros", "nothing", "opposite", "denormal")


def merged(
    pool: Pool,
    name: str,
    base: np.ndarray | None,
    models: np.ndarray,
    each: dict[str, Any] | None = None,
    extras: Any = None,
    dtype: str = "F32",
    **options: Any,
) -> np.ndarray:
    """What the engine makes of one tensor."""
    method = methods.find(name)
    given_ = each or {}
    numbers = {
        o.name: np.broadcast_to(np.asarray(given_.get(o.name, o.default), float), (len(models),)).copy()
        for o in method.options
        if o.each
    }
    plain = {o.name: options.get(o.name, o.default) for o in method.options if not o.each}
    inputs = tuple(Input(f"m{i}", Array(model), False, 1000 + i) for i, model in enumerate(models))
    shape = models[0].shape
    needed = base if method.base != "unused" else None
    tensor = TensorTask(
        "w", shape, dtype, inputs, None if needed is None else Array(needed), method, pool, numbers, plain, extras or {}
    )
    return np.concatenate([piece.copy() for _, piece in run([tensor], pool)]).reshape(shape)


def plus(base: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """float64 base plus a float64 delta, rounded once to float32."""
    return (base.astype(np.float64) + delta).astype(np.float32)


def deltas(base: np.ndarray, models: np.ndarray) -> np.ndarray:
    """The deltas as the engine defines them: rounded to float32."""
    return (models - base[None]).astype(np.float32).astype(np.float64)


W3, D3 = np.array([1.0, 0.5, -2.0]), np.array([0.2, 0.5, 0.05])
ARC = 1 - 1e-12  # nuslerp takes the chord for parallel vectors alone
KEYS = [1000, 1001, 1002]
WIDE = {"each": {"weight": W3, "density": D3}}


def _dare(combine: Callable[..., np.ndarray], d: np.ndarray, rescale: str, **how: str) -> np.ndarray:
    kept, factors = reference.dropped(d, D3, KEYS, rescale)
    return combine(kept * factors.reshape(-1, *[1] * (d.ndim - 1)), W3, **how)


def _stretched(d: np.ndarray, density: Any, gamma: float = 0.0) -> np.ndarray:
    kept = np.stack([reference.trimmed(x, k, gamma) for x, k in zip(d, density, strict=True)])
    before, after = (np.abs(x).reshape(len(d), -1).sum(1) for x in (d, kept))
    return kept * np.divide(before, after, out=np.ones_like(before), where=after > 0).reshape(-1, *[1] * (d.ndim - 1))


# By name: the engine's arguments, and the reference of (deltas, models) that gives a delta or weights.
CASES: list[tuple[str, dict[str, Any], Callable[[np.ndarray, np.ndarray], np.ndarray], bool]] = [
    ("task_arithmetic", WIDE | {"lambda": 0.7}, lambda d, x: 0.7 * reference.summed(d, W3), True),
    ("task_arithmetic", WIDE | {"normalize": True}, lambda d, x: reference.summed(d, W3, True), True),
    ("linear", {"each": {"weight": W3}}, lambda d, x: reference.summed(x, W3, True), False),
    ("linear", {"each": {"weight": W3}, "normalize": False}, lambda d, x: reference.summed(x, W3), False),
    ("ties", WIDE, lambda d, x: reference.ties(d, W3, D3), True),
    ("ties", {"lambda": 1.5}, lambda d, x: 1.5 * reference.ties(d, np.ones(3), np.full(3, 0.2)), True),
    (
        "ties",
        WIDE | {"elect": "after", "zero": "positive"},
        lambda d, x: reference.ties(d, W3, D3, elect="after", zero="positive"),
        True,
    ),
    ("ties", WIDE | {"combine": "sum"}, lambda d, x: reference.ties(d, W3, D3, combine="sum"), True),
    *(
        ("dare_linear", WIDE | {"rescale": how}, lambda d, x, how=how: _dare(reference.summed, d, how), True)
        for how in ("density", "l1", "none")
    ),
    *(
        ("dare_ties", WIDE | {"rescale": how}, lambda d, x, how=how: _dare(reference.elected, d, how), True)
        for how in ("density", "l1")
    ),
    *(
        (
            "della",
            {"each": {"weight": W3, "density": 0.5}, "rescale": how},
            lambda d, x, how=how: reference.elected(reference.pruned(d, np.full(3, 0.5), 0.15, KEYS, how), W3),
            True,
        )
        for how in ("density", "l1")
    ),
    (
        "della_linear",
        {"each": {"weight": W3, "density": 0.5, "epsilon": 0.3}},
        lambda d, x: reference.summed(reference.pruned(d, np.full(3, 0.5), 0.3, KEYS, "density"), W3),
        True,
    ),
    (
        "breadcrumbs",
        {"each": {"weight": W3, "density": D3, "gamma": 0.1}},
        lambda d, x: reference.summed(np.stack([reference.trimmed(v, k, 0.1) for v, k in zip(d, D3, strict=True)]), W3),
        True,
    ),
    (
        "ties",
        WIDE | {"rescale": "l1", "elect": "after"},
        lambda d, x: reference.elected(_stretched(d, D3), W3, "after"),
        True,
    ),
    (
        "breadcrumbs",
        {"each": {"density": 0.95, "gamma": 0.2}, "rescale": "l1"},
        lambda d, x: reference.summed(_stretched(d, [0.95] * 3, 0.2), np.ones(3)),
        True,
    ),
    (
        "breadcrumbs_ties",
        {"each": {"weight": W3, "density": D3, "gamma": [0, 0.01, 0.2]}},
        lambda d, x: reference.elected(
            np.stack([reference.trimmed(v, k, g) for v, k, g in zip(d, D3, [0, 0.01, 0.2], strict=True)]), W3
        ),
        True,
    ),
    ("slerp", {"t": 0.3}, lambda d, x: reference.slerp(x[0], x[1], 0.3), False),
    ("nuslerp", {"each": {"weight": [1, 3]}}, lambda d, x: reference.slerp(d[0], d[1], 0.75, ARC), True),
    (
        "nuslerp",
        {"each": {"weight": [1, 3]}, "along": "rows"},
        lambda d, x: _by_row(lambda r: reference.slerp(r[0], r[1], 0.75, ARC), d),
        True,
    ),
    (
        "nuslerp",
        {"each": {"weight": [1, 3]}, "along": "columns"},
        lambda d, x: _by_column(lambda r: reference.slerp(r[0], r[1], 0.75, ARC), d),
        True,
    ),
    (
        "multislerp",
        {"each": {"weight": [1, 2, 0.5]}},
        lambda d, x: reference.sphere_mean(d, np.array([1, 2, 0.5])),
        True,
    ),
    ("karcher", {}, lambda d, x: reference.sphere_mean(x, np.ones(3)), False),
    ("model_stock", {}, lambda d, x: reference.stock(d), True),
    ("model_stock", {"filter_wise": True}, lambda d, x: _by_row(reference.stock, d), True),
    ("sce", {}, lambda d, x: reference.sce(d, 1.0), True),
    ("sce", {"select_topk": 0.3}, lambda d, x: reference.sce(d, 0.3), True),
    ("nearswap", {"t": 0.05}, lambda d, x: _nearswap(x[0], x[1], 0.05), False),
    ("arcee_fusion", {}, lambda d, x: reference.fusion(x[0], x[1]), False),
    ("tsv", {}, lambda d, x: reference.tsv(d), True),
    ("iso_c", {}, lambda d, x: reference.iso(d), True),
]
TWO = {"slerp", "nuslerp", "nearswap", "arcee_fusion"}
# Sums over a whole tensor come in another order than the reference's, and singular vectors from another routine.
LOOSE = {
    "slerp",
    "nuslerp",
    "multislerp",
    "karcher",
    "model_stock",
    "sce",
    "dare_linear",
    "dare_ties",
    "della",
    "tsv",
    "iso_c",
}


def _by_row(function: Callable[[np.ndarray], np.ndarray], d: np.ndarray) -> np.ndarray:
    rows = d.reshape(len(d), -1, d.shape[-1])
    return np.stack([function(rows[:, i]) for i in range(rows.shape[1])]).reshape(d.shape[1:])


def _by_column(function: Callable[[np.ndarray], np.ndarray], d: np.ndarray) -> np.ndarray:
    if d.ndim < 3:
        return function(d)
    columns = np.moveaxis(d.reshape(len(d), -1, d.shape[-1]), -1, 1)
    return _by_row(function, columns).T.reshape(d.shape[1:])


def _nearswap(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    share = np.clip(t / np.maximum(np.abs(a - b), 1e-6), 0, 1)
    return share * b + (1 - share) * a


def test_every_method_is_tested() -> None:
    assert {case[0] for case in CASES} | NOT_HERE | {"fisher", "regmean"} == set(methods.available())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_a_method_agrees_with_its_reference(pool: Pool, case: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, arguments, expected, in_deltas = case
    if kind == "large":  # in many pieces and several tasks
        monkeypatch.setattr(tensor_, "CHUNK", 256)
        monkeypatch.setattr(tensor_, "GROUP", 1024)
    if name in ("tsv", "iso_c", "karcher", "multislerp") and kind in (
        "opposite",
        "nothing",
        "zeros",
        "ties",
        "denormal",
    ):
        pytest.skip("the result is not unique: directions of nothing, equal singular values, or antipodes")
    base, models = tensors(kind, 2 if name in TWO else 3)
    options = {key: value for key, value in arguments.items() if key != "each"}
    each = {k: v for k, v in arguments.get("each", {}).items() if k != "density" or name not in ("task_arithmetic",)}
    found = merged(pool, name, base, models, each, **options)
    d, x = deltas(base, models), models.astype(np.float64)
    wanted = expected(d, x)
    wanted = plus(base, wanted) if in_deltas else wanted.astype(np.float32)
    if name in LOOSE:
        np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=1e-7 if kind != "denormal" else 1e-44)
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", sorted(set(methods.available()) - {"fisher", "regmean"}))
def test_values_that_are_not_finite_are_refused_by_name(pool: Pool, name: str) -> None:
    base, models = tensors("random", {"passthrough": 1}.get(name, 2))
    for bad in (np.nan, np.inf, -np.inf):
        broken = models.copy()
        broken[-1, 3, 4] = bad
        with pytest.raises(ArtifactError, match=r"m\d holds a value that is not finite in w, at element 31"):
            merged(pool, name, base, broken, {"density": 0.5})


def test_slerp_ends_at_its_models_and_nuslerp_is_slerp(pool: Pool) -> None:
    _, models = tensors("random", 2)
    np.testing.assert_array_equal(merged(pool, "slerp", None, models, t=0.0), models[0])
    np.testing.assert_array_equal(merged(pool, "slerp", None, models, t=1.0), models[1])
    np.testing.assert_array_equal(
        merged(pool, "nuslerp", None, models, {"weight": [0.7, 0.3]}), merged(pool, "slerp", None, models, t=0.3)
    )


def test_the_mean_on_the_sphere_of_two_is_slerp_with_any_weights(pool: Pool) -> None:
    models = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    models /= np.linalg.norm(models, axis=1, keepdims=True)
    for share in (0.1, 0.5, 0.9):  # where mergekit's is off by 0.04
        found = merged(pool, "multislerp", None, models, {"weight": [1 - share, share]})
        np.testing.assert_allclose(found, merged(pool, "slerp", None, models, t=share), atol=2e-6)
    half = merged(pool, "karcher", None, models)
    np.testing.assert_allclose(half, merged(pool, "slerp", None, models, t=0.5), atol=1e-6)


def test_model_stock_of_equal_models_is_the_model_and_of_the_base_the_base(pool: Pool) -> None:
    base, models = tensors("random", 3)
    np.testing.assert_allclose(merged(pool, "model_stock", base, np.stack([models[0]] * 3)), models[0], rtol=1e-6)
    np.testing.assert_array_equal(merged(pool, "model_stock", base, np.stack([base] * 3)), base)
    opposite = np.stack([base + np.float32(0.5), base - np.float32(0.5)])
    assert np.isfinite(merged(pool, "model_stock", base, opposite)).all()


def test_sce_of_one_model_is_the_model_and_nearswap_has_its_limits(pool: Pool) -> None:
    base, models = tensors("random", 2)
    np.testing.assert_array_equal(merged(pool, "sce", base, models[:1]), models[0])
    np.testing.assert_array_equal(merged(pool, "nearswap", None, models, t=1e9), models[1])
    np.testing.assert_array_equal(merged(pool, "nearswap", None, models, t=0.0), models[0])
    np.testing.assert_array_equal(merged(pool, "passthrough", None, models[:1], {"scale": 2.0}), 2 * models[0])


def test_ties_of_one_model_keeps_its_whole_delta_whatever_the_weight(pool: Pool) -> None:
    base, models = tensors("random", 1)
    for weight in (0.1, 1.0, 3.0):
        np.testing.assert_array_equal(merged(pool, "ties", base, models, {"weight": weight, "density": 1.0}), models[0])
    same = np.stack([models[0]] * 3)
    np.testing.assert_array_equal(merged(pool, "ties", base, same, {"density": 1.0}), models[0])


def test_the_golden_values_of_ties(pool: Pool) -> None:
    t = np.array([[3, -1, 0.5, 2, 0], [-1, -2, 0.4, 1, 0], [1, 0.1, -3, -0.2, 0.3]], np.float32)
    base = np.zeros(5, np.float32)
    mine = merged(pool, "ties", base, t, {"density": 0.6})
    np.testing.assert_allclose(mine, [2, -1.5, -3, 1.5, 0.3], rtol=1e-6)
    after = merged(pool, "ties", base, t, {"density": 0.6, "weight": [1, 0.5, 2]}, elect="after")
    np.testing.assert_allclose(after, [1.666667, -1.333333, -3, 1.666667, 0.3], rtol=1e-6)
    total = merged(pool, "ties", base, t, {"density": 0.6, "weight": [1, 0.5, 2]}, elect="after", combine="sum")
    np.testing.assert_allclose(total, [5, -2, -6, 2.5, 0.6], rtol=1e-6)


def test_breadcrumbs_without_gamma_is_pruning_by_magnitude(pool: Pool) -> None:
    base, models = tensors("random", 1)
    found = merged(pool, "breadcrumbs", base, models, {"gamma": 0.0, "density": 0.3})
    np.testing.assert_array_equal(found, plus(base, reference.trimmed(deltas(base, models)[0], 0.3)))


def test_dare_has_the_right_mean_over_seeds(pool: Pool) -> None:
    base, models = tensors("random", 1)
    d, count = deltas(base, models)[0], 2000
    # The same model many times over, each time with its own random numbers.
    many = {"weight": 1 / count, "density": 0.25}
    mean = merged(pool, "dare_linear", base, np.repeat(models, count, 0), many) - base.astype(np.float64)
    # The standard error of an element's mean is |d| sqrt((1 - p) / p / count) = 0.039 |d|.
    assert np.abs(mean - d).max() < 0.16 * np.abs(d).max()
    assert abs((mean - d).sum()) / np.abs(d).sum() < 0.02


def test_fisher_with_equal_information_is_the_average_and_follows_it_otherwise(pool: Pool) -> None:
    _, models = tensors("random", 2)
    ones = {"fisher": tuple(Array(np.ones_like(m)) for m in models)}
    np.testing.assert_array_equal(
        merged(pool, "fisher", None, models, extras=ones), models.astype(float).mean(0).astype(np.float32)
    )
    information = np.random.default_rng(3).random(models.shape).astype(np.float32)
    information[:, 0] = 0
    f, x = information.astype(float), models.astype(float)
    wanted = np.where(f.sum(0) > 0, (f * x).sum(0) / np.where(f.sum(0) > 0, f.sum(0), 1), x.mean(0))
    found = merged(pool, "fisher", None, models, extras={"fisher": tuple(Array(i) for i in information)})
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_regmean_solves_its_least_squares_and_is_the_average_for_equal_products(pool: Pool) -> None:
    _, models = tensors("random", 3)
    draw = np.random.default_rng(5)
    grams = np.stack([x.T @ x for x in draw.standard_normal((3, 40, 9))]).astype(np.float32)
    found = merged(pool, "regmean", None, models, extras={"gram": tuple(Array(g) for g in grams)})
    np.testing.assert_allclose(
        found, reference.regmean(models.astype(float), grams.astype(float), 0.9), rtol=1e-5, atol=1e-6
    )
    same = merged(pool, "regmean", None, models, extras={"gram": tuple(Array(grams[0]) for _ in models)})
    np.testing.assert_allclose(same, models.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        merged(pool, "regmean", None, models, extras={"gram": ()}), models.mean(0), rtol=1e-6, atol=1e-7
    )


def test_iso_makes_all_singular_values_equal(pool: Pool) -> None:
    base, models = tensors("random", 3)
    found = merged(pool, "iso_c", np.zeros_like(base), models - base)
    values = np.linalg.svd(found, compute_uv=False)
    np.testing.assert_allclose(values, values.mean(), rtol=1e-5)


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    seed=st.integers(0, 2**20),
    count=st.integers(1, 4),
    density=st.floats(0.01, 1.0),
    grain=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_ties_agrees_with_its_reference_on_any_shape(
    shape: list[int], seed: int, count: int, density: float, grain: float
) -> None:
    draw = np.random.default_rng(seed)
    base = draw.standard_normal(shape).astype(np.float32)
    d = 0.1 * draw.standard_normal((count, *shape))
    models = (base + (np.round(d / grain) * grain if grain else d)).astype(np.float32)
    with Pool(1) as pool:
        found = merged(pool, "ties", base, models, {"density": density})
    wanted = plus(base, reference.ties(deltas(base, models), np.ones(count), np.full(count, density)))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della"])
def test_of_a_density_of_zero_nothing_is_kept(pool: Pool, name: str) -> None:
    """As mergekit takes it: the input counts as the base itself."""
    base, models = tensors("random", 2)
    found = merged(pool, name, base, models, {"density": [0.5, 0.0], "weight": [1.0, 2.0]})
    without = np.stack([models[0], base])
    expected = merged(pool, name, base, without, {"density": [0.5, 0.5], "weight": [1.0, 2.0]})
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(merged(pool, name, base, models, {"density": 0.0}), base)
