"""Sections on a worker whose blocks change nothing: which tokens a term acts on, whatever happens to requests."""

from __future__ import annotations

import random
from typing import Any

import fakes
import numpy as np
import pytest
import torch
from torch import nn

from probes.models.markers import UNREAD, Markers
from steer.serving.engine.admission import Admission
from steer.serving.engine.proving.forms import Form, Proved
from steer.serving.engine.resolved import RESOLVED, ResolvedRequest, names_of
from steer.serving.engine.worker import sections
from steer.serving.engine.worker.gates import GateTable
from steer.serving.engine.worker.slots import Unsteerable
from steer.serving.engine.worker.steering_worker import SteeringWorker
from steer.serving.settings import Settings, check
from vectors.errors import ExpressionError, UsageError
from vectors.expression import parse
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector

MARKERS = Markers(thinking=(((1,), (2,)), ((3,),)), tools=(((4,),), ((5,),)))
SEVERAL = Markers(thinking=(((1, 2), (4,)), ((2, 1, 1), (3, 3))), tools=(((5,),), ((3, 1),)))  # of several tokens
VOCABULARY, ROWS = 9, 65
SOURCES: dict[str, SteeringVector | Probe] = {
    **fakes.vectors(),
    "anger": Probe({0: Readout(torch.randn(fakes.HIDDEN, generator=torch.Generator().manual_seed(4)), 0.1)}),
}


class Block(nn.Module):
    """A block that adds nothing to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        return stream


class Served:
    """A worker, its embedding and its blocks; `run` is a step."""

    def __init__(self, markers: Markers = MARKERS) -> None:
        self.markers = markers
        self.blocks = [Block() for _ in range(fakes.LAYERS)]
        self.embedding = nn.Embedding(VOCABULARY, fakes.HIDDEN)
        with torch.no_grad():
            self.embedding.weight.copy_(
                torch.randn(VOCABULARY, fakes.HIDDEN, generator=torch.Generator().manual_seed(1))
            )
        decoder = {layer: Proved(block, Form(None)) for layer, block in enumerate(self.blocks)}
        settings = {"rows": 64, "directions": 2, "gates": 3, "gate_layers": [0], "steps": 2}
        self.state = SteeringWorker(decoder, settings, 256, fakes.HIDDEN, 16)
        assert isinstance(self.state.gates, GateTable)
        table = sections.SectionTable(markers, ROWS, torch.device("cpu"))
        sections.join(self.embedding, self.state.gates, self.state.token_slots, table)
        for source in SOURCES.values():
            self.state.load(source.encode())

    def begin(self, name: str, text: str, ids: list[int], prompt: int, computed: int = 0) -> None:
        composition = parse(text)
        digests = {each: SOURCES[each].digest for each in names_of(composition)}
        resolved = ResolvedRequest(str(composition), digests).values()
        self.state.begin(name, prompt, {"steer": text, RESOLVED: resolved})
        self.state.place(name, ids, computed)

    def run(self, ids: dict[str, list[int]], steps: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
        starts, counts = (np.array([step[i] for step in steps.values()]) for i in (0, 1))
        self.state.point(list(steps), starts, counts)
        flat = [token for name, (start, count) in steps.items() for token in ids[name][start : start + count]]
        with torch.no_grad():
            h = self.embedding(torch.tensor([*flat, 1, 4]))  # as padded to the size of a CUDA graph
            for block in self.blocks:
                h = block(h)
        assert torch.equal(h[-2:], self.embedding.weight[[1, 4]]), "padding is unsteered"
        return dict(zip(steps, h[:-2].split([count for _, count in steps.values()]), strict=True))


def inside(ids: list[int], kind: str, markers: Markers) -> list[bool]:
    """Whether each token lies inside, one token after the other."""
    begins, ends = markers.of(kind)
    state, result = False, []
    for stop in range(1, len(ids) + 1):
        for side, value in ((ends, False), (begins, True)):
            if any(tuple(ids[max(0, stop - len(marker)) : stop]) == marker for marker in side):
                state = value
        result.append(state)
    return result


def expected(served: Served, text: str, ids: list[int], prompt: int) -> tuple[torch.Tensor, list[int]]:
    """The stream behind the last block, and on how many tokens each term acted."""
    terms = parse(text).terms
    result, acted = served.embedding.weight.detach()[ids].clone(), [0] * len(terms)
    in_section = {
        kind: inside(ids, kind, served.markers) for kind in ("answer", "outside-tools")
    }  # thinking, and tools
    for position in range(len(ids)):
        plain = served.embedding.weight.detach()[ids[position]]
        for number, term in enumerate(terms):
            assert term.scope is not None
            start, stop = term.scope.span(prompt)
            holds = [
                {
                    "thinking": in_section["answer"][position],
                    "answer": not in_section["answer"][position],
                    "outside-tools": not in_section["outside-tools"][position],
                    "while": bool(each.holds(SOURCES["anger"].at(0).scores(plain))) if each.name else True,  # type: ignore[union-attr]
                }[each.kind]
                for each in term.conditions
            ]
            if start <= position < stop and all(holds):
                acted[number] += 1
                for layer in term.layers or ():
                    result[position] += term.value * SOURCES[term.name].layers[layer]  # type: ignore[operator]
    return result, acted


TEXTS = [
    "2*calm[2,3]@answer",
    "2*calm[1]@thinking - formal[2]@outside-tools",
    "warm[3]@first:4@answer@outside-tools + calm[2]@response",
    "0.5*warm[2]@thinking@while:anger>0 + formal[3]@while:anger<=0.5",
]


@pytest.mark.parametrize("markers", [MARKERS, SEVERAL], ids=["single", "several"])
def test_every_token_is_steered_by_its_section_over_chunks_batches_and_interruptions(markers: Markers) -> None:
    chance = random.Random(5)
    served = Served(markers)
    for trial in range(12):
        names = [f"{trial}.{i}" for i in range(4)]
        texts = {name: chance.choice(TEXTS) for name in names}
        prompts = {name: chance.randint(2, 9) for name in names}
        ids = {name: chance.choices(range(VOCABULARY), k=prompts[name] + chance.randint(1, 14)) for name in names}
        at = {name: chance.choice([0, 0, prompts[name] - 1]) for name in names}  # a prefix hit
        first = dict(at)
        outputs = {name: torch.zeros(len(ids[name]), fakes.HIDDEN) for name in names}
        for name in names:
            served.begin(name, texts[name], ids[name], prompts[name], at[name])
        while unfinished := [name for name in names if at[name] < len(ids[name])]:
            for name in unfinished:
                if chance.random() < 0.1:  # preempted: it goes on behind what the cache holds
                    first[name] = at[name] = chance.randint(0, min(at[name], prompts[name] - 1))
                    served.begin(name, texts[name], ids[name], prompts[name], at[name])
            batch = chance.sample(unfinished, chance.randint(1, len(unfinished)))
            left = {name: prompts[name] - at[name] for name in batch}
            counts = {name: chance.randint(1, left[name]) if left[name] > 0 else 1 for name in batch}
            for name, rows in served.run(ids, {name: (at[name], counts[name]) for name in batch}).items():
                outputs[name][at[name] : at[name] + counts[name]] = rows
                at[name] += counts[name]
        for name in names:
            reference, _ = expected(served, texts[name], ids[name], prompts[name])
            computed = slice(min(first[name], prompts[name] - 1), None)
            found = outputs[name][computed]
            assert torch.allclose(found, reference[computed], atol=1e-5), (texts[name], ids[name], prompts[name])
        served.state.end(names)


def test_the_tokens_on_which_a_section_holds_are_counted_by_request() -> None:
    served = Served()
    text, ids, prompt = TEXTS[1], [6, 1, 7, 3, 8, 4, 6, 5, 2, 7], 3
    served.begin("a", text, ids, prompt)
    served.begin("b", TEXTS[0], ids, prompt)
    served.run({"a": ids, "b": ids}, {"a": (0, 5), "b": (0, 10)})
    served.run({"a": ids}, {"a": (5, 5)})
    assert served.state.gates is not None
    from steer.serving.engine.phases import gated_counts

    for name, each in (("a", text), ("b", TEXTS[0])):
        counts = served.state.gates.counts[served.state.gates.requests[name].row].reshape(8, -1).tolist()
        _, acted = expected(served, each, ids, prompt)
        assert list(gated_counts(parse(each), counts).values()) == acted


def test_a_state_is_that_behind_the_tokens() -> None:
    table = sections.SectionTable(MARKERS, 2, torch.device("cpu"))
    for ids, state in (([], 0), ([6, 2], 1), ([1, 3], 0), ([4, 7, 1], 3), ([5], 0), ([3, 4], 2)):
        assert table.state_after(ids) == state
    table = sections.SectionTable(SEVERAL, 2, torch.device("cpu"))
    for ids, state in (([1], 0), ([1, 2], 1), ([1, 2, 1, 1], 0), ([5, 3, 3], 2), ([5, 3, 1, 2], 1)):
        assert table.state_after(ids) == state
    table.enter(1, [5, 3])
    assert table.states[1].tolist() == [2, 5, 3]


def test_a_model_whose_tokens_no_section_sees_and_a_prompt_of_embeddings_are_refused() -> None:
    served = Served()
    served.begin("a", TEXTS[0], [1], 1)
    with pytest.raises(Unsteerable, match="not of embeddings"):
        served.state.place("a", None, 0)
    assert served.state.gates is not None
    served.state.gates.sections = None
    with pytest.raises(Unsteerable, match="looks up its tokens where sections can't see them"):
        served.begin("b", TEXTS[0], [1], 1)


def admission(markers: Markers | None, gates: int = 2) -> Admission:
    return Admission(Settings(fakes.vectors(), gates=gates), fakes.HIDDEN, fakes.LAYERS, None, torch.float32, markers)


def test_a_server_with_sections_alone_reads_no_layer() -> None:
    found = Admission(
        Settings(fakes.vectors(), gates=1, gate_layers=(), probes=fakes.probes()),
        fakes.HIDDEN, fakes.LAYERS, None, torch.float32, MARKERS,
    )  # fmt: skip
    assert found.resolve("warm@answer").expression == "warm@answer"
    with pytest.raises(ExpressionError, match="was started to read none: --steer-gate-layers 0"):
        found.resolve("warm[2]@while:anger>0")


def test_an_arm_with_a_section_passes_the_check_before_the_tokenizer_is_read() -> None:
    arms = {"a": parse("warm@answer - calm@outside-tools")}
    settings = Settings(fakes.vectors(), arms, gates=2)
    sizes = fakes.HIDDEN, fakes.LAYERS, None
    assert Admission(settings, *sizes, markers=UNREAD).arms == arms
    with pytest.raises(UsageError, match="arm 'a': @answer needs the model's markers"):
        Admission(settings, *sizes, markers=Markers())


def test_sections_are_admitted_where_the_model_has_their_markers() -> None:
    assert admission(MARKERS).resolve("warm@answer").expression == "warm@answer"
    for markers, gates, reason in (
        (None, 2, "@answer is decided by tokens, which a server with --skip-tokenizer-init"),
        (Markers(), 2, "@answer needs the model's markers of thinking, and its tokenizer has none of the known ones"),
        (Markers(tools=(((4,),), ())), 2, "<|channel|>analysis<|message|>): --steer-markers thinking=BEGIN,END gives"),
        (MARKERS, 0, "--steer-gates 1"),
    ):
        with pytest.raises(ExpressionError) as caught:
            admission(markers, gates).resolve("warm@answer")
        assert reason in str(caught.value)


def test_markers_of_the_settings_are_pairs(tmp_path: Any) -> None:
    assert check({"markers": {"thinking": ["<a>", "</a>"]}}, tmp_path).markers == {"thinking": ("<a>", "</a>")}
    for wrong in ({"thinking": ["<a>"]}, {"speech": ["a", "b"]}, {"tools": ["", "b"]}, ["a"]):
        with pytest.raises(UsageError, match="not thinking and tools, each with"):
            check({"markers": wrong}, tmp_path)
