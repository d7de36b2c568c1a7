"""SteeringVector: its algebra keeps the identities of vectors, its metadata the history, its file every bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vectors.documents.artifacts import SKETCH
from vectors.errors import ArtifactError, OutputError
from vectors.steering import SteeringVector

HIDDEN = 16
BASE = {"digest": "sha256:ab", "architecture": "LlamaForCausalLM", "name": "tiny"}
METADATA: dict[str, Any] = {
    "base": BASE,
    "licence": "mit",
    "method": {"name": "diffmean", "parameters": {"shrinkage": 0.1}},
    "measured": {"auroc": 0.1 + 0.2, "low": 1e-300, "none": None},
}


def build(seed: int, layers: tuple[int, ...] = (2, 5, 9), **metadata: Any) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({i: torch.randn(HIDDEN, generator=generator) for i in layers}, METADATA | metadata)


def distance(a: SteeringVector, b: SteeringVector) -> float:
    """The largest difference of a value, where both hold the same layers."""
    assert list(a.layers) == list(b.layers)
    return max(float((a.layers[i] - b.layers[i]).abs().max()) for i in a.layers)


def same_bits(a: SteeringVector, b: SteeringVector) -> bool:
    return {i: t.numpy().tobytes() for i, t in a.layers.items()} == {
        i: t.numpy().tobytes() for i, t in b.layers.items()
    }


seeds = st.integers(0, 1000)
strengths = st.floats(-100, 100)
steady = settings(database=None, derandomize=True, deadline=None, max_examples=30)


@steady
@given(seeds, seeds)
def test_adding_a_vector_and_taking_it_away_leaves_the_first(one: int, two: int) -> None:
    a, b = build(one), build(two)
    assert distance(a + b - b, a) < 1e-5


@steady
@given(seeds, seeds)
def test_the_order_of_a_sum_does_not_change_its_values(one: int, two: int) -> None:
    a, b = build(one), build(two)
    assert same_bits(a + b, b + a)


@steady
@given(seeds, strengths, strengths)
def test_strengths_distribute_over_sums(seed: int, s: float, t: float) -> None:
    a, b = build(seed), build(seed + 1)
    assert distance(s * (a + b), s * a + s * b) < 1e-3
    assert distance((s + t) * a, s * a + t * a) < 1e-3


def test_twice_a_vector_is_the_vector_added_to_itself() -> None:
    a = build(0)
    assert same_bits(2 * a, a + a)
    assert same_bits(2 * a, a * 2)


def test_the_negative_of_a_vector_is_its_opposite_and_twice_negated_itself() -> None:
    a = build(0)
    opposite = -a
    assert all(torch.equal(opposite.layers[i], -a.layers[i]) for i in a.layers)
    assert same_bits(-opposite, a)
    assert max((a - a).norm().values()) == 0


@steady
@given(seeds, strengths)
def test_the_norm_scales_with_the_strength(seed: int, s: float) -> None:
    a = build(seed)
    scaled = (s * a).norm()
    assert all(scaled[i] == pytest.approx(abs(s) * length, rel=1e-5, abs=1e-30) for i, length in a.norm().items())


def test_the_norm_is_the_euclidean_length_by_layer() -> None:
    assert SteeringVector({4: torch.tensor([3.0, 4.0]), 1: torch.zeros(2)}).norm() == {1: 0.0, 4: 5.0}


@steady
@given(seeds, seeds)
def test_the_cosine_is_symmetric_and_between_minus_one_and_one(one: int, two: int) -> None:
    a, b = build(one), build(two)
    assert a.cosine(b) == b.cosine(a)
    assert all(-1 - 1e-12 <= value <= 1 + 1e-12 for value in a.cosine(b).values())


def test_the_cosine_knows_parallel_opposite_and_orthogonal_vectors() -> None:
    a = SteeringVector({0: torch.tensor([1.0, 0.0])})
    b = SteeringVector({0: torch.tensor([0.0, 2.0])})
    assert a.cosine(3 * a) == {0: pytest.approx(1)}
    assert a.cosine(-a) == {0: pytest.approx(-1)}
    assert a.cosine(b) == {0: 0}
    assert a.cosine(a + b * 0.5) == {0: pytest.approx(math.sqrt(0.5))}


def test_the_cosine_is_given_at_the_layers_that_both_hold() -> None:
    assert list(build(0, (1, 2, 3)).cosine(build(1, (2, 3, 4)))) == [2, 3]
    with pytest.raises(ArtifactError, match="share no layer: 1-2 against 5"):
        build(0, (1, 2)).cosine(build(1, (5,)))


@steady
@given(seeds, seeds.map(lambda seed: seed + 2000))
def test_what_was_projected_out_has_no_component_left(one: int, two: int) -> None:
    a, b = build(one), build(two)
    assert all(abs(value) < 1e-6 for value in a.project_out(b).cosine(b).values())


def test_projecting_out_keeps_what_is_orthogonal_and_what_the_other_does_not_hold() -> None:
    a = SteeringVector({0: torch.tensor([1.0, 2.0]), 1: torch.tensor([3.0, 4.0]), 2: torch.tensor([5.0, 6.0])})
    b = SteeringVector({0: torch.tensor([0.0, 7.0]), 2: torch.zeros(2), 3: torch.ones(2)})
    left = a.project_out(b)
    assert {i: t.tolist() for i, t in left.layers.items()} == {0: [1, 0], 1: [3, 4], 2: [5, 6]}
    assert distance(left.project_out(b), left) == 0


def test_projecting_out_leaves_the_vector_acting_where_it_acted(tmp_path: Path) -> None:
    a, b = build(0, (2, 3), apply=[3]), build(1, (3, 7), apply=[7])
    left = a.project_out(b)
    assert left.apply == (3,)
    left.save(tmp_path / "left.safetensors")
    assert SteeringVector.load(tmp_path / "left.safetensors").apply == (3,)


def test_a_layer_that_one_part_lacks_counts_as_zero() -> None:
    a, b = build(0, (1, 2)), build(1, (2, 3))
    both = 2 * a - b
    assert list(both.layers) == [1, 2, 3]
    assert torch.equal(both.layers[1], 2 * a.layers[1])
    assert torch.equal(both.layers[3], -b.layers[3])


def test_a_vector_acts_at_all_its_layers_unless_its_metadata_names_some() -> None:
    assert build(0).apply == (2, 5, 9)
    assert build(0, apply=[5]).apply == (5,)
    assert build(0, apply=[]).apply == (2, 5, 9)


def test_a_sum_acts_where_any_of_its_parts_acts() -> None:
    assert (build(0, apply=[5]) + build(1, apply=[2])).apply == (2, 5)
    assert (3 * build(0, apply=[5])).apply == (5,)


def test_a_part_of_a_sum_adds_nothing_where_it_does_not_act_but_the_other_does() -> None:
    a, b = build(0, apply=[5]), build(1, apply=[2, 5])
    both = a - 2 * b
    assert both.apply == (2, 5)
    assert torch.equal(both.layers[2], -2 * b.layers[2])
    assert torch.equal(both.layers[5], a.layers[5] - 2 * b.layers[5])
    assert torch.equal(both.layers[9], a.layers[9] - 2 * b.layers[9])  # neither acts there


def test_sums_of_vectors_that_act_elsewhere_may_be_grouped_anyhow() -> None:
    a, b, c = build(0, apply=[5]), build(1, apply=[2]), build(2, apply=[9, 2])
    left, right = (a + b) + c, a + (b + c)
    assert left.apply == right.apply
    for i in left.layers:
        torch.testing.assert_close(left.layers[i], right.layers[i])


def test_selecting_keeps_these_layers_bit_for_bit_and_all_of_them_act() -> None:
    a = build(0, apply=[5])
    selected = a.select([9, 2, 9])
    assert list(selected.layers) == [2, 9]
    assert selected.apply == (2, 9)
    assert torch.equal(selected.layers[9], a.layers[9])
    assert selected.metadata["method"] == a.metadata["method"]
    assert a.apply == (5,)


def test_selecting_layers_that_are_not_held_names_all_of_them_and_what_is_held() -> None:
    with pytest.raises(ArtifactError, match="holds no layer 3, 4") as caught:
        build(0).select([2, 4, 3])
    assert caught.value.hint == "it holds 2,5,9"
    with pytest.raises(ArtifactError, match="at least one layer"):
        build(0).select([])


def test_the_parents_of_a_sum_are_its_parts_by_digest_and_strength() -> None:
    a, b = build(0), build(1)
    assert (a - b).metadata["parents"] == [
        {"digest": a.digest, "strength": 1.0},
        {"digest": b.digest, "strength": -1.0},
    ]
    assert (0.5 * a).metadata["parents"] == [{"digest": a.digest, "strength": 0.5}]
    assert a.project_out(b).metadata["method"] == {"name": "project_out"}


def test_a_derived_vector_keeps_its_base_and_licence_but_not_what_was_measured_of_its_parts() -> None:
    derived = build(0) + build(1)
    assert derived.base == BASE
    assert derived.metadata["licence"] == "mit"
    assert "measured" not in derived.metadata


COMBINED: dict[str, Callable[[SteeringVector, SteeringVector], SteeringVector]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "project_out": lambda a, b: a.project_out(b),
    "a scaled sum": lambda a, b: 0.5 * (a + 2.0 * b),
}


@pytest.mark.parametrize("combine", COMBINED.values(), ids=COMBINED)
def test_a_derived_vector_records_the_examples_of_all_its_parts(combine: Any) -> None:
    a = build(0, data={"digests": {"positive": "x"}, "example_digests": ["03", "01"], "prompt_digests": ["11"]})
    b = build(1, data={"example_digests": ["01", "02"]}, chosen_on={"example_digests": ["04"], "prompt_digests": []})
    derived = combine(a, b)
    assert derived.metadata["data"] == {"example_digests": ["01", "02", "03"], "prompt_digests": ["11"]}
    assert derived.metadata["chosen_on"] == {"example_digests": ["04"]}
    assert derived.encode()  # metadata that a file may hold


def test_of_many_examples_a_derived_vector_records_what_one_vector_of_all_would() -> None:
    digests = [f"{number:04x}" for number in range(3000)]
    one, two, both = (sorted(part)[:SKETCH] for part in (digests[::2], digests[1::2], digests))
    derived = build(0, data={"example_digests": one}) + build(1, data={"example_digests": two})
    assert derived.metadata["data"]["example_digests"] == both


def test_what_is_no_list_of_digests_is_not_handed_on() -> None:
    derived = build(0, data={"example_digests": "0123", "examples": {"positive": 3}}) + build(1)
    assert "data" not in derived.metadata


OPERATIONS: dict[str, Callable[[SteeringVector, SteeringVector], object]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "cosine": lambda a, b: a.cosine(b),
    "project_out": lambda a, b: a.project_out(b),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_vectors_of_different_models_are_not_combined(operation: Any) -> None:
    other = build(1, base={"digest": "sha256:cd", "name": "other"})
    with pytest.raises(ArtifactError, match="belong to different models: tiny and other"):
        operation(build(0), other)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_vectors_of_different_hidden_sizes_are_not_combined(operation: Any) -> None:
    other = SteeringVector({2: torch.ones(HIDDEN + 1)})
    with pytest.raises(ArtifactError, match="hidden sizes 16 and 17"):
        operation(build(0), other)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_vector_of_unknown_base_combines_with_any_of_its_size(operation: Any) -> None:
    operation(build(0), SteeringVector({2: torch.ones(HIDDEN)}))


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ({}, "at least one layer"),
        ({-1: torch.ones(2)}, "layer -1 is negative"),
        ({0: torch.ones(2, 2)}, r"layer 0 has shape \[2, 2\], not \[hidden\]"),
        ({0: torch.tensor(1.0)}, r"layer 0 has shape \[\]"),
        ({0: torch.ones(0)}, r"layer 0 has shape \[0\]"),
        ({0: torch.tensor([1.0, math.nan])}, "layer 0 holds values that are not finite"),
        ({0: torch.tensor([1e300], dtype=torch.float64)}, "not finite"),  # past float32
        ({0: torch.ones(2), 1: torch.ones(3)}, "different hidden sizes: 2, 3"),
    ],
)
def test_layers_that_are_no_directions_are_refused(layers: dict[int, torch.Tensor], problem: str) -> None:
    with pytest.raises(ArtifactError, match=problem):
        SteeringVector(layers)


def test_all_problems_of_a_vector_are_reported_at_once() -> None:
    with pytest.raises(ArtifactError) as caught:
        SteeringVector({-1: torch.ones(2), 0: torch.ones(1, 2), 1: torch.tensor([math.inf, 0, 0])})
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("strength", [math.inf, math.nan, 1e39])
def test_a_strength_that_makes_values_infinite_is_refused(strength: float) -> None:
    with pytest.raises(ArtifactError, match="not finite"):
        build(0) * strength


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32])
def test_directions_of_any_dtype_become_float32(dtype: torch.dtype) -> None:
    vector = SteeringVector({0: torch.tensor([1, 2, 3]).to(dtype)})
    assert vector.layers[0].dtype == torch.float32
    assert vector.layers[0].tolist() == [1, 2, 3]


def test_layers_are_in_order_whatever_order_they_came_in() -> None:
    generator = torch.randn(3, 4)
    assert list(SteeringVector({9: generator[0], 0: generator[1], 5: generator[2]}).layers) == [0, 5, 9]


def test_changing_the_tensor_it_was_made_from_does_not_change_a_vector() -> None:
    source = torch.ones(4, requires_grad=True)
    vector = SteeringVector({0: source, 1: source})
    before = vector.digest
    with torch.no_grad():
        source.zero_()
    assert vector.digest == before
    assert not vector.layers[0].requires_grad


def test_no_operation_changes_its_operands() -> None:
    a, b = build(0), build(1)
    before = a.digest, b.digest
    _ = a + b, a - b, 3 * a, -a, a.project_out(b), a.select([2]), a.cosine(b), repr(a)
    assert (a.digest, b.digest) == before


@pytest.mark.parametrize("make", [lambda a, b: a, *list(OPERATIONS.values())[:2], lambda a, b: a.project_out(b)])
def test_a_saved_vector_is_loaded_bit_for_bit_with_its_metadata(tmp_path: Path, make: Any) -> None:
    vector = make(build(0, apply=[5]), build(1))
    path = tmp_path / "a.safetensors"
    digest = vector.save(path)
    loaded = SteeringVector.load(path)
    assert same_bits(loaded, vector)
    assert digest == vector.digest == loaded.digest
    assert loaded.apply == vector.apply
    assert dict(loaded.metadata) | dict(vector.metadata) == dict(loaded.metadata)  # only what is derived was added
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_the_smallest_and_largest_floats_survive_the_file(tmp_path: Path) -> None:
    extreme = SteeringVector({0: torch.tensor([-0.0, 1e-45, -1e-42, 3.4028234e38, 1.0000001])})
    extreme.save(str(tmp_path / "a.safetensors"))
    assert same_bits(SteeringVector.load(str(tmp_path / "a.safetensors")), extreme)


def test_floats_in_the_metadata_survive_the_file_exactly(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, 5e-324, 1.7976931348623157e308, -0.0, 1.0, 1 / 3]
    build(0, notes=values).save(tmp_path / "a.safetensors")
    loaded = SteeringVector.load(tmp_path / "a.safetensors").metadata["notes"]
    assert [value.hex() for value in loaded] == [value.hex() for value in values]


def test_the_metadata_of_every_vector_is_json() -> None:
    for vector in (build(0), 2 * build(0), build(0) - build(1), build(0).project_out(build(1)), build(0).select([2])):
        assert json.loads(json.dumps(vector.metadata, allow_nan=False)) == dict(vector.metadata)


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), torch.ones(1)])
def test_metadata_that_is_no_json_is_refused_and_no_file_is_made(tmp_path: Path, value: object) -> None:
    vector = build(0, measured={"auroc": value})
    with pytest.raises(ArtifactError, match="metadata is not JSON"):
        vector.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_vector_is_not_saved_where_no_file_can_be(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        build(0).save(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        build(0).save(tmp_path / "none" / "a.safetensors")


def test_the_digest_depends_on_every_value_and_on_the_metadata() -> None:
    a = build(0)
    changed = {i: t.clone() for i, t in a.layers.items()}
    changed[9][HIDDEN - 1] += 1e-6
    assert SteeringVector(changed, a.metadata).digest != a.digest
    assert build(0, licence="other").digest != a.digest
    assert build(0).digest == a.digest


def test_the_repr_tells_method_layers_size_and_where_it_acts() -> None:
    vector = build(0, (1, 2, 3, 7), apply=[3, 7])
    assert repr(vector) == "SteeringVector(diffmean, layers 1-3,7, hidden size 16, acts at 3,7)"
    assert "unknown method" in repr(SteeringVector({0: torch.ones(2)}))


def test_a_term_acts_at_the_layers_it_names_or_where_the_vector_does_by_default() -> None:
    vector = SteeringVector({1: torch.ones(2), 2: torch.ones(2)}, {"apply": [2]})
    assert vector.acting(None) == (2,)
    assert vector.acting([1, 2]) == (1, 2)
    assert vector.acting(()) == ()
