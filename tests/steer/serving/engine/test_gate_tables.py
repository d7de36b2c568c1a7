"""Gates on a worker whose blocks change nothing: which slot each token reads, whatever happens to requests."""

from __future__ import annotations

import math
from typing import Any

import fakes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steer.serving.engine import metrics
from steer.serving.engine.capacity import Capacity
from steer.serving.engine.phases import gated_counts, gated_sets, gates, opens, phases, slots_needed, variants
from steer.serving.engine.proving.forms import Form, Proved
from steer.serving.engine.receipts import HttpRequest
from steer.serving.engine.resolved import RESOLVED, ResolvedRequest, names_of
from steer.serving.engine.worker.steering_worker import SteeringWorker
from vectors.expression import Composition, parse
from vectors.probe import Probe, Readout, reading_of
from vectors.steering import SteeringVector

VECTORS = fakes.vectors()
PROBES = fakes.probes()
SOURCES: dict[str, SteeringVector | Probe] = {**VECTORS, **PROBES}
TEXTS = [
    "2*calm[2,3]@when:anger>0",
    "2*calm[2,3]@while:anger>0",
    "warm@prompt + formal[2]@when:anger<=0 + 2*calm[3]@while:joy<0.5",
    "0.5*warm + ablate(calm[2])@while:anger>0@while:joy>-1 + clamp(formal[3], 1)@after:2@while:anger>0",
    "calm[2]@first:3@while:anger>0 + warm[3]@while:anger>0",
    "calm[3]@while:warm[1]>0",
    "calm[2]@first:3@while:anger>0 + warm",
    "formal[2]@after:2@while:joy>0 + calm[3]@first:4@when:anger<0 - calm[2]@first:1@while:anger>0",
    "warm",
    None,
]


class Block(nn.Module):
    """A block that adds nothing to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, stream: Tensor) -> Tensor:
        return stream


def extra(text: str) -> dict[str, Any]:
    composition = parse(text)
    digests = {name: SOURCES[name].digest for name in names_of(composition)}
    return {"steer": text, RESOLVED: ResolvedRequest(str(composition), digests).values()}


class Served:
    """A worker and its blocks; `run` is a step, and `state` its worker."""

    def __init__(self) -> None:
        self.blocks = [Block() for _ in range(fakes.LAYERS)]
        decoder = {layer: Proved(block, Form(None)) for layer, block in enumerate(self.blocks)}
        settings = {"rows": 64, "directions": 2, "gates": 3, "gate_layers": [0, 1]}
        self.state = SteeringWorker(decoder, settings, 256, fakes.HIDDEN, 16)
        for source in SOURCES.values():
            assert self.state.load(source.encode()) == source.digest

    def run(self, streams: dict[str, Tensor], steps: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        """A step over `steps` (start and count by request), given the streams of whole sequences: their ends."""
        starts, counts = (np.array([step[i] for step in steps.values()]) for i in (0, 1))
        self.state.point(list(steps), starts, counts)
        parts = [streams[name][start : start + count] for name, (start, count) in steps.items()]
        h = torch.cat([*parts, torch.full((3, fakes.HIDDEN), 9.0)])  # as padded to the size of a CUDA graph
        for block in self.blocks:
            h = block(h)
        self.state.launched()
        assert torch.equal(h[-3:], torch.full((3, fakes.HIDDEN), 9.0)), "padding is unsteered"
        return dict(zip(steps, h[:-3].split([count for _, count in steps.values()]), strict=True))


def expected(text: str | None, stream: Tensor, prompt: int) -> tuple[Tensor, list[tuple[float, int, int]]]:
    """The stream behind the last block, and what each gate read: (value, held, read), one token after the other."""
    composition = parse(text) if text else Composition(())
    result, values = stream.clone(), {condition: [] for condition in composition.conditions}  # type: ignore[var-annotated]
    once: dict[Any, float] = {}

    def in_scope(condition: Any, position: int) -> bool:
        """Whether a token is one of those on which a term with this condition may act."""
        scopes = [term.scope for term in composition.terms if condition in term.conditions]
        return any(start <= position < stop for start, stop in (scope.span(prompt) for scope in scopes if scope))

    for position in range(len(stream)):
        h = stream[position].double()
        for layer in range(fakes.LAYERS):
            change = torch.zeros_like(h)
            for term in composition.terms:
                start, stop = term.scope.span(prompt) if term.scope else (0, math.inf)
                if layer not in VECTORS[term.name].acting(term.layers) or not start <= position < stop:
                    continue
                read = [once[c] if c.kind == "when" else values[c][-1] for c in term.conditions]
                if not all(c.holds(value) for c, value in zip(term.conditions, read, strict=True)):
                    continue
                v = VECTORS[term.name].layers[layer].double()
                u = v / v.norm()
                change += {
                    "add": term.value * v,
                    "ablate": -term.value * (h @ u) * u,
                    "clamp": (term.value * v.norm() - h @ u) * u,
                }[term.operation]
            h = h + change
            for condition in composition.conditions:
                at, readout = reading_of(SOURCES[condition.name], condition.layer)
                if at != layer:
                    continue
                value = float(readout.weight.double() @ h + readout.bias)
                if condition.kind == "when" and position == prompt - 1:
                    once[condition] = value
                if condition.kind == "while" and in_scope(condition, position):
                    values[condition].append(value)
        result[position] = h.float()
    found = []
    for condition in composition.conditions:
        read = [once[condition]] if condition.kind == "when" else values[condition]
        found.append((sum(read) / max(len(read), 1), sum(condition.holds(value) for value in read), len(read)))
    return result, found


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_chunked_preempted_or_cached_each_token_reads_the_slot_that_its_gates_choose(seed: int) -> None:
    chosen = np.random.default_rng(seed)
    served, capacity = Served(), Capacity(64)
    generator = torch.Generator().manual_seed(seed)
    prompts, ends, streams, right = {}, {}, {}, {}
    texts = {f"r{i}": TEXTS[(i + seed) % len(TEXTS)] for i in range(12)}
    for name, text in texts.items():
        prompts[name], ends[name] = int(chosen.integers(1, 7)), int(chosen.integers(8, 14))
        streams[name] = torch.randn(ends[name], fakes.HIDDEN, generator=generator)
        right[name] = expected(text, streams[name], prompts[name])
        served.state.begin(name, prompts[name], extra(text) if text else None)
        request = fakes.request(name, extra(text) if text else None, prompt=[5] * prompts[name])
        assert capacity.enter(request)
    at = dict.fromkeys(texts, 0)
    while any(at[name] < ends[name] for name in texts):
        running = [name for name in texts if at[name] < ends[name] and chosen.random() < 0.7]
        chosen.shuffle(running)
        if not running:
            continue
        if chosen.random() < 0.3:  # preempted, and computed again behind what is cached; on V2 it begins anew
            name = running[0]
            at[name] = int(chosen.integers(0, at[name] + 1))
            if chosen.random() < 0.5 and texts[name]:
                served.state.begin(name, prompts[name], extra(texts[name]))
        steps = {name: (at[name], int(chosen.integers(1, ends[name] - at[name] + 1))) for name in running}
        steps = {
            name: (start, count if start < prompts[name] or chosen.random() < 0.2 else 1)
            for name, (start, count) in steps.items()
        }
        for name, found in served.run(streams, steps).items():
            start, count = steps[name]
            torch.testing.assert_close(found, right[name][0][start : start + count], atol=2e-5, rtol=1e-5)
            at[name] = start + count
        assert not capacity.record({name: count for name, (_, count) in steps.items()}, served.state.report)
    for name, text in texts.items():
        receipt = capacity.leave(name)
        if not text:
            assert receipt is None
            continue
        assert receipt is not None
        for gate, (value, held, read) in zip(receipt.get("gates", ()), right[name][1], strict=True):
            assert (gate["held"], gate["read"]) == (held, read), (text, gate)
            assert gate["value"] == (pytest.approx(value, abs=1e-4) if read else None)
    served.state.end(list(texts))
    assert served.state.state()["gated"] == 0


def test_a_decision_is_made_once_even_where_the_prompt_is_computed_again_and_differs() -> None:
    served = Served()
    text = TEXTS[0]
    stream = torch.randn(6, fakes.HIDDEN, generator=torch.Generator().manual_seed(1))
    flipped = stream.clone()
    readout = PROBES["anger"].at()
    for sequence, score in ((stream, 1.0), (flipped, -1.0)):
        sequence[2] += (score - readout.scores(sequence[2])) / readout.weight.square().sum() * readout.weight
    served.state.begin("a", 3, extra(text))
    first = served.run({"a": stream}, {"a": (0, 5)})["a"]
    again = served.run({"a": flipped}, {"a": (0, 5)})["a"]
    assert torch.equal(first[3:], again[3:])
    assert not torch.equal(first[3:], stream[3:5])
    assert torch.equal(again[:3], flipped[:3]), "the prompt is unsteered"


def test_a_token_that_is_computed_again_is_not_counted_again() -> None:
    served = Served()
    stream = torch.randn(9, fakes.HIDDEN, generator=torch.Generator().manual_seed(2))
    served.state.begin("a", 3, extra("calm[2]@while:anger>-100"))
    row = served.state.gates.requests["a"].row  # type: ignore[union-attr]
    counted = []
    for start, count in ((0, 4), (4, 1), (5, 1), (0, 5), (5, 2), (7, 1), (2, 7)):
        served.run({"a": stream}, {"a": (start, count)})
        counted.append(int(served.state.gates.counts[row].sum()))  # type: ignore[union-attr]
    assert counted == [1, 2, 3, 3, 4, 5, 6]


def test_rows_are_given_back_and_more_requests_than_rows_fail_alone() -> None:
    served = Served()
    assert served.state.gates is not None
    free = len(served.state.gates.free)
    for i in range(3 * free):
        served.state.begin(str(i), 3, extra(TEXTS[0]))
        served.state.end([str(i)])
    for i in range(free):
        served.state.begin(str(i), 3, extra(TEXTS[0]))
    with pytest.raises(RuntimeError, match="rows of gated requests are held"):
        served.state.begin("more", 3, extra(TEXTS[0]))
    served.state.end([str(i) for i in range(free)])
    assert served.state.state()["gated"] == 0
    served.state.begin("more", 3, extra(TEXTS[0]))


def test_a_worker_without_gates_steers_no_request_with_conditions() -> None:
    decoder = {layer: Proved(Block(), Form(None)) for layer in range(fakes.LAYERS)}
    state = SteeringWorker(decoder, {"rows": 8, "directions": 2}, 64, fakes.HIDDEN)
    for source in SOURCES.values():
        state.load(source.encode())
    assert state.gates is None
    with pytest.raises(RuntimeError, match="has 1 gates, more than this worker"):
        state.begin("a", 3, extra(TEXTS[0]))


def test_a_phase_has_a_slot_for_each_set_of_open_gates_that_makes_a_difference() -> None:
    composition = parse("0.5*warm + calm@when:a>0 + formal@first:3@when:a>0@while:b<1 + 0*dry@when:c>0")
    assert [str(gate) for gate in gates(composition)] == ["@when:a>0", "@while:b<1"]
    assert [phase.terms for phase in phases(composition)] == [(0,), (0, 1, 2), (0, 1)]
    assert variants(composition, (0, 1, 2)) == ((0,), (0, 1), (0,), (0, 1, 2))
    assert gated_sets(composition) == ((0, 1, 2), (0, 1))
    assert slots_needed(composition) == 3
    assert gated_counts(composition, [[4, 3, 2, 1], [0, 5, 0, 6]]) == {1: 15, 2: 1, 3: 0}


@pytest.mark.parametrize(
    ("comparison", "below", "at", "above"), [(">", 0, 0, 1), (">=", 0, 1, 1), ("<", 1, 0, 0), ("<=", 1, 1, 0)]
)
def test_a_gate_compares_in_float32(comparison: str, below: int, at: int, above: int) -> None:
    (gate,) = parse(f"warm@when:a{comparison}0.1").conditions
    third = float(np.float32(0.1))
    found = [
        opens(gate, value) for value in (np.nextafter(np.float32(0.1), -1), third, np.nextafter(np.float32(0.1), 1))
    ]
    assert found == [bool(each) for each in (below, at, above)]
    served = Served()
    probe = Probe({0: Readout(torch.eye(fakes.HIDDEN)[0], 0.0)})
    served.state.load(probe.encode())
    SOURCES["exact"] = probe
    try:
        for name, value, opened in (("below", np.nextafter(np.float32(0.1), -1), below), ("at", third, at)):
            stream = torch.zeros(3, fakes.HIDDEN)
            stream[1, 0] = float(value)
            served.state.begin(name, 2, extra(f"warm[3]@when:exact{comparison}0.1"))
            assert bool(served.run({name: stream}, {name: (0, 3)})[name][2].any()) == bool(opened)
    finally:
        del SOURCES["exact"]


def test_a_receipt_of_several_answers_lists_the_gates_of_each_and_the_metrics_count_their_decisions() -> None:
    http = HttpRequest("calmer", TEXTS[0], fakes.resolve("warm", VECTORS))
    gate = {"condition": "@when:anger>0", "probe": "a probe of this test", "digest": "sha256:1", "value": 0.5}
    receipt = {"digest": "sha256:2", "expression": "e", "prompt_tokens": 3, "cached_tokens": 0, "response_tokens": 4}
    term = {"term": "2*calm[2,3]@when:anger>0", "prompt_tokens": 0, "response_tokens": 4}
    for name, held in (("1", 1), ("2", 0)):
        each = {**receipt, "terms": [term], "gates": [{**gate, "held": held, "read": 1}]}
        http.expect(name)
        http.add(name, each)
        metrics.began(http)
        metrics.ended(http, each)
    many = {**gate, "condition": "@while:anger>0", "held": 3, "read": 7}
    metrics.began(None)
    metrics.ended(None, {**receipt, "terms": [], "gates": [many]})
    total = http.total()
    assert total is not None
    assert [each["held"] for each in total["gates"]] == [1, 0]
    assert total["terms"][0]["response_tokens"] == 8
    counted = {
        decision: metrics.get().gates.labels("a probe of this test", decision)._value.get()
        for decision in ("open", "closed")
    }
    assert counted == {"open": 4, "closed": 5}


@pytest.mark.parametrize("text", ["calm[2,3]@first:0@when:anger>0", "warm + calm[2,3]@first:0@when:anger>0"])
def test_a_gated_term_that_acts_on_no_token_decides_nothing_and_holds_nothing(text: str) -> None:
    served = Served()
    served.state.begin("a", 3, extra(text))
    served.run({"a": torch.randn(5, fakes.HIDDEN)}, {"a": (0, 5)})
    served.state.end(["a"])
    assert (served.state.state()["rows_held"], served.state.state()["gated"]) == (0, 0)
