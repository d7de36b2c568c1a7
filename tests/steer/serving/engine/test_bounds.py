"""What one composition may ask for: phases, terms and sums are bounded, and what is admitted stays finite."""

from __future__ import annotations

from typing import Any

import fakes
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from steer.serving.engine import bounds
from steer.serving.engine.admission import Admission
from steer.serving.engine.phases import phases
from steer.serving.engine.worker.rows import Stack, rows_of
from steer.serving.settings import Settings
from vectors.errors import ExpressionError, UsageError
from vectors.expression import LONGEST, Composition, Scope, Term, parse, terms_in
from vectors.steering import SteeringVector

VECTORS = fakes.vectors()


def admission(dtype: torch.dtype = torch.float32, **given: Any) -> Admission:
    return Admission(Settings(**{"vectors": VECTORS, **given}), fakes.HIDDEN, fakes.LAYERS, None, dtype)


def refusal(found: Admission, text: str) -> str:
    with pytest.raises(ExpressionError) as caught:
        found.resolve(text)
    return "; ".join(caught.value.problems)


def clamps(count: int) -> str:
    return " + ".join(f"clamp(warm, 1)@after:{i}" for i in range(1, count + 1))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (clamps(9), "9 phases and in all of them 45 terms; the server was started with 8 phases, each with 16 terms: "),
        (clamps(9), "--steer-phases 9"),
        (clamps(124), "124 phases and in all of them 7750 terms"),
        (clamps(124), "--steer-phases 485"),
        (" + ".join(f"warm@after:{i}" for i in range(246)), "246 terms; the server was started with 8 phases"),
        ("+".join(["warm"] * 129), "129 terms; the server was started with 8 phases, each with 16 terms"),
        ("+".join(["warm"] * 129), "--steer-phases 9"),
        ("+".join(["w"] * 2048), "2048 terms"),
        ("+".join(["0*warm"] * 200), "200 terms"),
        (" + ".join(["calm"] * 17) + " + " + clamps(7), "8 phases and in all of them 164 terms"),
    ],
)
def test_phases_and_terms_are_bounded_and_the_refusal_names_count_bound_and_setting(text: str, reason: str) -> None:
    assert reason in refusal(admission(), text)


@pytest.mark.parametrize("text", [clamps(8), "+".join(["warm"] * 128), "+".join(["calm"] * 9) + " + " + clamps(7)])
def test_what_lies_within_the_bounds_is_admitted(text: str) -> None:
    assert admission().resolve(text).vectors["warm"] == VECTORS["warm"].digest


def test_the_bound_is_a_setting_and_holds_for_arms_too() -> None:
    assert admission(phases=124 * 4).resolve(clamps(124))
    assert "--steer-phases 3" in refusal(admission(phases=2), clamps(3))
    with pytest.raises(UsageError, match=r"arm 'a': the expression has 9 phases .*--steer-phases 9"):
        admission(arms={"a": parse(clamps(9))})


def test_a_refused_expression_is_not_repeated_in_its_error() -> None:
    for text in ("+".join(f"n{i}" for i in range(120)), clamps(100), " + ".join(["warm[0,9-200]"] * 30)):
        assert len(refusal(admission(), text)) < 2500
    long = Admission(Settings({f"{'n' * 190}{i}": VECTORS["warm"] for i in range(50)}), fakes.HIDDEN, 4, None)
    assert len(refusal(long, "nobody")) < 2500


@given(st.text(alphabet="ab+-*[](),'\"@:0123456789. e", max_size=60))
def test_terms_are_counted_without_parsing(text: str) -> None:
    try:
        composition = parse(text)
    except ExpressionError:
        assert terms_in(text) >= 1
        return
    assert terms_in(text) == len(composition.terms)


def test_terms_are_counted_in_every_form_of_a_term() -> None:
    text = "-1e-3*a[0-2,5-7] + ablate('b - c', 0.5)@first:3 - \"d+e\" + clamp(f[1-2], -1e+2)@after:1"
    assert terms_in(text) == len(parse(text).terms) == 4


def test_layers_that_an_expression_names_are_bounded() -> None:
    for text in ("a[" + ",".join(["0-1000"] * 500) + "]", "+".join(["a[0-1000]"] * 300)):
        assert len(text) <= LONGEST
        with pytest.raises(ExpressionError, match="names more than 8192 layers"):
            parse(text)
    assert len(parse("+".join(["a[0-79]"] * 100)).terms) == 100


# Sums that overflow.


@pytest.mark.parametrize(
    ("text", "dtype", "reason"),
    [
        ("1e39*warm", torch.float32, "too large for float32"),
        ("2e38*warm + 2e38*warm", torch.float32, "too large for float32"),
        ("3e37*warm" + " + 3e37*warm" * 20, torch.float32, "too large for float32"),
        ("clamp(warm, -1e39)", torch.float32, "too large for float32"),
        ("ablate(warm, 1e39)", torch.float32, "too large for float32"),
        ("1e30*warm", torch.float32, "over all layers; beyond 1e+12 the model would overflow"),
        ("1e30*warm", torch.bfloat16, "the model would overflow"),
        ("1e30*warm - 1e30*warm", torch.float32, "the model would overflow"),
        ("clamp(warm, 1e13)@response", torch.float32, "the model would overflow"),
        ("ablate(warm, 1e13)", torch.bfloat16, "the model would overflow"),
        ("1e5*warm", torch.float16, "too large for float16"),
        ("clamp(warm, -1e5)", torch.float16, "too large for float16"),
        ("6e4*warm + 6e4*warm", torch.float16, "too large for float16"),
    ],
)
def test_sums_that_overflow_are_refused_before_they_reach_the_table(text: str, dtype: torch.dtype, reason: str) -> None:
    assert reason in refusal(admission(dtype), text)


def test_large_strengths_that_a_model_can_hold_are_admitted() -> None:
    for text, dtype in (("1e5*warm", torch.float32), ("1e5*warm", torch.bfloat16), ("1e3*warm", torch.float16)):
        assert admission(dtype).resolve(text)


strengths = st.one_of(st.floats(-1e39, 1e39), st.sampled_from([1e38, 3e38, -3e38, 1e30, 1e18, 1.0, 1e-45]))
drawn = st.builds(
    Term,
    st.sampled_from(["add", "ablate", "clamp"]),
    st.sampled_from(["warm", "calm", "huge"]),
    strengths,
    scope=st.one_of(st.none(), st.just(Scope("prompt")), st.just(Scope("after", 2))),
)


@example([Term("clamp", "huge", 0.0)], torch.float32)
@given(st.lists(drawn, min_size=1, max_size=6), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
@settings(deadline=None)
def test_rows_of_what_is_admitted_are_finite_in_the_dtypes_of_table_and_model(
    listed: list[Term], dtype: torch.dtype
) -> None:
    vectors = {**VECTORS, "huge": SteeringVector({i: torch.full((fakes.HIDDEN,), 1e30) for i in range(fakes.LAYERS)})}
    composition = Composition(tuple(listed))
    if bounds.problems_of(composition, vectors, Settings(vectors), dtype):
        return
    sets = list(dict.fromkeys(phase.terms for phase in phases(composition) if phase.terms))
    if not sets:
        return
    stacks = {name: Stack(vector) for name, vector in vectors.items()}
    layers = range(fakes.LAYERS)
    found = rows_of(composition, sets, stacks, layers, fakes.HIDDEN, 4, torch.device("cpu"))
    assert torch.isfinite(found.added.to(dtype)).all()
    assert float(found.added.double().norm(dim=-1).sum(dim=-1).max()) < bounds.LONGEST
    if found.units is not None and found.factors is not None:
        assert torch.isfinite(found.units).all()
        assert torch.isfinite(found.factors).all()


def test_a_worker_refuses_what_overflows_by_itself() -> None:
    with pytest.raises(ValueError, match="too large: it adds a length of"):
        bounds.require_applicable(parse("3e38*warm"), VECTORS, 4)
    with pytest.raises(ValueError, match="needs 2 directions at one layer, the table has 1"):
        bounds.require_applicable(parse("ablate(warm) + ablate(calm)"), VECTORS, 1)
    bounds.require_applicable(parse("1e10*warm"), VECTORS, 0)
