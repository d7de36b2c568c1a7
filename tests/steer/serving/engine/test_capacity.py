"""No more compositions live than there are slots, in order of arrival; receipts count what was reported."""

from __future__ import annotations

from typing import Any

import fakes
import hypothesis.strategies as st
import pytest
from hypothesis import given

from steer.serving.engine import resolved
from steer.serving.engine.capacity import MOST_COST, Capacity, cost
from vectors.expression import Term, parse

VECTORS = fakes.vectors()


def steered(name: str, expression: str, **more: Any) -> Any:
    return fakes.request(name, fakes.resolved(expression, VECTORS), **more)


def report(requests: dict[str, tuple[Any, int]]) -> dict[str, Any]:
    """A worker's report: by request, the key it ran under and where it went on from."""
    return {
        "requests": list(requests),
        "keys": [key for key, _ in requests.values()],
        "starts": [start for _, start in requests.values()],
    }


def key(capacity: Capacity, name: str) -> str:
    return capacity.progress[name].resolved.key


def test_unsteered_requests_pass_whatever_waits() -> None:
    capacity = Capacity(1)
    assert capacity.enter(steered("a", "warm"))
    assert not capacity.enter(steered("b", "formal"))
    assert capacity.enter(fakes.request("plain"))
    assert capacity.leave("plain") is None


def test_requests_of_one_composition_share_its_rows() -> None:
    capacity = Capacity(1)
    assert capacity.enter(steered("a", "2*warm"))
    assert capacity.enter(steered("b", "2 * warm"))
    assert capacity.held == 1
    capacity.leave("a")
    assert capacity.held == 1
    capacity.leave("b")
    assert capacity.held == 0


def test_a_composition_holds_one_row_for_each_of_its_phases() -> None:
    capacity = Capacity(3)
    assert capacity.enter(steered("a", "warm@prompt + calm"))
    assert capacity.held == 2
    assert not capacity.enter(steered("b", "warm@response + calm@first:2"))
    capacity.leave("a")
    assert [one.request_id for one in capacity.next_in()] == ["b"]


def test_those_who_wait_go_on_in_order_and_nobody_overtakes() -> None:
    capacity = Capacity(1)
    capacity.enter(steered("a", "warm"))
    assert not capacity.enter(steered("b", "formal"))
    assert not capacity.enter(steered("c", "warm")), "its slot is held, but it came later"
    assert capacity.next_in() == []
    capacity.leave("a")
    assert [one.request_id for one in capacity.next_in()] == ["b"]
    capacity.leave("b")
    assert [one.request_id for one in capacity.next_in()] == ["c"]
    assert capacity.state() == {"rows": 1, "rows_held": 1, "waiting": 0}


def clamps(number: int) -> str:
    """A composition of 8 phases, no two alike."""
    return " + ".join(f"clamp(warm, {number + 1})@after:{i}" for i in range(8))


def test_the_slots_that_one_step_writes_are_bounded_and_those_who_wait_enter_with_the_next() -> None:
    capacity = Capacity(256)
    one = cost(parse(clamps(0)))
    allowed = MOST_COST // one
    assert 1 < allowed < 10
    entered = [capacity.enter(steered(str(i), clamps(i))) for i in range(12)]
    assert entered == [True] * allowed + [False] * (12 - allowed)
    assert not capacity.enter(steered("same", clamps(0))), "it came later, though its slots are written"
    assert capacity.enter(fakes.request("plain"))
    names = [str(i) for i in range(allowed, 12)] + ["same"]
    while names:
        ready = [request.request_id for request in capacity.next_step()]
        assert ready == names[: len(ready)]
        assert 1 <= len(ready) <= allowed + ("same" in ready)
        names = names[len(ready) :]
    assert capacity.held == 96


def test_a_composition_that_costs_more_than_a_step_may_enters_alone() -> None:
    capacity = Capacity(1000)
    wide = " + ".join(f"warm@after:{i}" for i in range(60))
    assert cost(parse(wide)) > MOST_COST
    assert not [one for one in "abc" if not capacity.enter(steered(one, "calm"))]
    assert not capacity.enter(steered("wide", wide))
    assert not capacity.enter(steered("after", "formal"))
    assert [one.request_id for one in capacity.next_step()] == ["wide"]
    assert [one.request_id for one in capacity.next_step()] == ["after"]
    assert capacity.next_step() == []


@given(st.lists(st.sampled_from(["enter", "wide", "step", "leave", "abort"]), max_size=60))
def test_in_whatever_order_requests_come_and_go_all_enter_in_order(actions: list[str]) -> None:
    capacity = Capacity(24)
    running: list[str] = []
    expected: list[str] = []
    for i, action in enumerate(actions):
        if action in ("enter", "wide"):
            expected.append(str(i))
            if capacity.enter(steered(str(i), clamps(i) if action == "wide" else f"{i % 5 + 1}*warm")):
                running.append(str(i))
        elif action == "leave" and running:
            capacity.leave(expected.pop(expected.index(running.pop(0))))
            running += [one.request_id for one in capacity.next_in()]
        elif action == "abort" and capacity.waiting:
            (gone,) = capacity.withdraw({capacity.waiting[0].request_id})
            expected.remove(gone.request_id)
        elif action == "step":
            running += [one.request_id for one in capacity.next_step()]
        assert running == expected[: len(running)]
    while running or capacity.waiting:
        if running:
            capacity.leave(expected.pop(expected.index(running.pop(0))))
        running += [one.request_id for one in capacity.next_step()]
        assert running == expected[: len(running)]
    assert (capacity.held, expected) == (0, [])


def test_an_abort_takes_those_who_wait() -> None:
    capacity = Capacity(1)
    for name in "abc":
        capacity.enter(steered(name, f"{ord(name)}*warm"))
    assert [one.request_id for one in capacity.withdraw({"c", "a"})] == ["c"]
    assert [one.request_id for one in capacity.withdraw(None)] == ["b"]


def test_a_receipt_counts_what_the_worker_reported() -> None:
    capacity = Capacity(4)
    capacity.enter(steered("a", "2*warm@response + calm", prompt=range(10)))
    steps = [(6, 0), (4, 6), (1, 10), (1, 11)]
    for scheduled, start in steps:
        capacity.record({"a": scheduled, "plain": 1}, report({"a": (key(capacity, "a"), start), "plain": (None, 3)}))
    receipt = capacity.leave("a")
    assert receipt is not None
    assert (receipt["prompt_tokens"], receipt["cached_tokens"], receipt["response_tokens"]) == (10, 0, 2)
    assert [(t["term"], t["prompt_tokens"], t["response_tokens"]) for t in receipt["terms"]] == [
        ("2*warm@response", 0, 2),
        ("calm", 10, 2),
    ]
    assert receipt["terms"][0]["vector_digest"] == VECTORS["warm"].digest


def test_what_is_computed_again_after_preemption_counts_once_and_what_was_cached_is_said() -> None:
    capacity = Capacity(4)
    capacity.enter(steered("a", "warm", prompt=range(10)))
    for scheduled, start in [(2, 8), (1, 10), (1, 11), (12, 0), (1, 12)]:
        capacity.record({"a": scheduled}, report({"a": (key(capacity, "a"), start)}))
    receipt = capacity.leave("a")
    assert receipt is not None
    assert (receipt["prompt_tokens"], receipt["cached_tokens"], receipt["response_tokens"]) == (10, 8, 3)


@pytest.mark.parametrize("found", [None, "other", "missing", "unsteered"])
def test_a_steered_request_that_ran_otherwise_is_an_error_and_no_answer(found: str | None) -> None:
    capacity = Capacity(4)
    capacity.enter(steered("a", "warm"))
    told = {
        None: None,
        "other": report({"a": ("sha256:0", 0)}),
        "missing": report({"b": (key(capacity, "a"), 0)}),
        "unsteered": report({"a": (None, 0)}),
    }[found]
    assert capacity.record({"a": 3}, told) == {"a": "steer: it ran without its composition warm"}
    assert capacity.progress["a"].end == 0


def test_steps_without_steered_requests_need_no_report() -> None:
    capacity = Capacity(4)
    capacity.enter(steered("a", "warm"))
    capacity.record({"plain": 3}, None)
    assert capacity.progress["a"].end == 0


def test_requests_with_stop_strings_are_marked_while_they_live() -> None:
    capacity = Capacity(4)
    capacity.enter(steered("a", "warm", stop=["."]))
    capacity.enter(steered("b", "warm"))
    assert capacity.stops == {"a"}
    capacity.leave("a")
    assert capacity.stops == set()


def test_what_did_not_pass_admission_does_not_pass_the_gate() -> None:
    with pytest.raises(RuntimeError, match="did not pass admission"):
        Capacity(4).enter(fakes.request("a", {"steer": "warm"}))


def test_what_stays_the_same_is_computed_once_and_not_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request with stop strings has a receipt at every step, and every request's key is compared at every step."""
    capacity = Capacity(1)
    assert capacity.enter(steered("a", "warm - 0.5*calm"))
    name = key(capacity, "a")
    for texts in ((Term, "__str__"), (resolved, "digest_bytes"), (resolved, "parse")):
        monkeypatch.setattr(*texts, None)
    for step in range(3):
        assert not capacity.record({"a": 1}, report({"a": (name, step)}))
        receipt = capacity.receipt(capacity.progress["a"])
        assert [term["term"] for term in receipt["terms"]] == ["warm", "-0.5*calm"]
        assert receipt["prompt_tokens"] + receipt["response_tokens"] == step + 1


def test_a_response_that_is_given_counts_as_a_response() -> None:
    capacity = Capacity(2)
    extra = {**fakes.resolved("warm@response + formal@prompt", VECTORS), resolved.GIVEN: 2}
    capacity.enter(fakes.request("a", extra, prompt=range(6)))
    assert not capacity.record({"a": 7}, report({"a": (key(capacity, "a"), 0)}))
    receipt = capacity.leave("a")
    assert receipt is not None
    assert (receipt["prompt_tokens"], receipt["response_tokens"]) == (4, 3)
    assert [(term["prompt_tokens"], term["response_tokens"]) for term in receipt["terms"]] == [(0, 3), (4, 0)]
