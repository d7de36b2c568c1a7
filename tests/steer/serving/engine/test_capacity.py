"""The gate: no more compositions live than there are rows, in order of arrival; receipts count what was reported."""

from __future__ import annotations

from typing import Any

import fakes
import pytest

from steer.serving.engine.capacity import Gate

VECTORS = fakes.vectors()


def steered(name: str, expression: str, **more: Any) -> Any:
    return fakes.request(name, fakes.pinned(expression, VECTORS), **more)


def report(requests: dict[str, tuple[Any, int]]) -> dict[str, Any]:
    """A worker's report: by request, the key it ran under and where it went on from."""
    return {
        "requests": list(requests),
        "keys": [key for key, _ in requests.values()],
        "starts": [start for _, start in requests.values()],
    }


def key(gate: Gate, name: str) -> str:
    return gate.progress[name].pinned.key


def test_unsteered_requests_pass_whatever_waits() -> None:
    gate = Gate(1)
    assert gate.enter(steered("a", "warm"))
    assert not gate.enter(steered("b", "formal"))
    assert gate.enter(fakes.request("plain"))
    assert gate.leave("plain") is None


def test_requests_of_one_composition_share_its_rows() -> None:
    gate = Gate(1)
    assert gate.enter(steered("a", "2*warm"))
    assert gate.enter(steered("b", "2 * warm"))
    assert gate.held == 1
    gate.leave("a")
    assert gate.held == 1
    gate.leave("b")
    assert gate.held == 0


def test_a_composition_holds_one_row_for_each_of_its_phases() -> None:
    gate = Gate(3)
    assert gate.enter(steered("a", "warm@prompt + calm"))
    assert gate.held == 2
    assert not gate.enter(steered("b", "warm@response + calm@first:2"))
    gate.leave("a")
    assert [one.request_id for one in gate.next_in()] == ["b"]


def test_those_who_wait_go_on_in_order_and_nobody_overtakes() -> None:
    gate = Gate(1)
    gate.enter(steered("a", "warm"))
    assert not gate.enter(steered("b", "formal"))
    assert not gate.enter(steered("c", "warm")), "its row lives, but it came later"
    assert gate.next_in() == []
    gate.leave("a")
    assert [one.request_id for one in gate.next_in()] == ["b"]
    gate.leave("b")
    assert [one.request_id for one in gate.next_in()] == ["c"]
    assert gate.state() == {"rows": 1, "rows_held": 1, "waiting": 0}


def test_an_abort_takes_those_who_wait() -> None:
    gate = Gate(1)
    for name in "abc":
        gate.enter(steered(name, f"{ord(name)}*warm"))
    assert [one.request_id for one in gate.withdraw({"c", "a"})] == ["c"]
    assert [one.request_id for one in gate.withdraw(None)] == ["b"]


def test_a_receipt_counts_what_the_worker_reported() -> None:
    gate = Gate(4)
    gate.enter(steered("a", "2*warm@response + calm", prompt=range(10)))
    steps = [(6, 0), (4, 6), (1, 10), (1, 11)]
    for scheduled, start in steps:
        gate.record({"a": scheduled, "plain": 1}, report({"a": (key(gate, "a"), start), "plain": (None, 3)}))
    receipt = gate.leave("a")
    assert receipt is not None
    assert (receipt["prompt_tokens"], receipt["cached_tokens"], receipt["response_tokens"]) == (10, 0, 2)
    assert [(t["term"], t["prompt_tokens"], t["response_tokens"]) for t in receipt["terms"]] == [
        ("2*warm@response", 0, 2),
        ("calm", 10, 2),
    ]
    assert receipt["terms"][0]["vector_digest"] == VECTORS["warm"].digest


def test_what_is_computed_again_after_preemption_counts_once_and_what_was_cached_is_said() -> None:
    gate = Gate(4)
    gate.enter(steered("a", "warm", prompt=range(10)))
    for scheduled, start in [(2, 8), (1, 10), (1, 11), (12, 0), (1, 12)]:
        gate.record({"a": scheduled}, report({"a": (key(gate, "a"), start)}))
    receipt = gate.leave("a")
    assert receipt is not None
    assert (receipt["prompt_tokens"], receipt["cached_tokens"], receipt["response_tokens"]) == (10, 8, 3)


@pytest.mark.parametrize("found", [None, "other", "missing", "unsteered"])
def test_a_steered_request_that_ran_otherwise_is_an_error_and_no_answer(found: str | None) -> None:
    gate = Gate(4)
    gate.enter(steered("a", "warm"))
    told = {
        None: None,
        "other": report({"a": ("sha256:0", 0)}),
        "missing": report({"b": (key(gate, "a"), 0)}),
        "unsteered": report({"a": (None, 0)}),
    }[found]
    with pytest.raises(RuntimeError, match="request a ran without its composition warm"):
        gate.record({"a": 3}, told)


def test_steps_without_steered_requests_need_no_report() -> None:
    gate = Gate(4)
    gate.enter(steered("a", "warm"))
    gate.record({"plain": 3}, None)
    assert gate.progress["a"].end == 0


def test_requests_with_stop_strings_are_marked_while_they_live() -> None:
    gate = Gate(4)
    gate.enter(steered("a", "warm", stop=["."]))
    gate.enter(steered("b", "warm"))
    assert gate.stops == {"a"}
    gate.leave("a")
    assert gate.stops == set()


def test_what_did_not_pass_admission_does_not_pass_the_gate() -> None:
    with pytest.raises(RuntimeError, match="did not pass admission"):
        Gate(4).enter(fakes.request("a", {"steer": "warm"}))
