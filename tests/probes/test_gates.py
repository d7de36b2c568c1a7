"""Conditions: what is read, when it is decided, and on which tokens a gated term acts, against hooks by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pico
import pytest
import torch
from torch import Tensor

from probes.arms.scores import Completions
from probes.gates import Decisions
from probes.interventions import steering
from probes.logits import completion_logits
from probes.models import residual
from probes.models.completions import Completion
from probes.models.markers import Markers, Place, inside, markers_of
from probes.steered import steered
from vectors.errors import ArtifactError, ExpressionError, UsageError
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector

CLOSE = 1e-4  # of logits, float32
ROWS = pico.sequences(6, 9, 9, seed=3)
IDS = torch.tensor(ROWS)
PROMPT = 4


def vector(seed: int, *layers: int) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: torch.randn(pico.HIDDEN, generator=generator) for layer in layers})


PROBE = Probe({0: Readout(vector(7, 0).layers[0], 0.25), 1: Readout(vector(8, 0).layers[0], 0.0)}, {
    "recommended": {"layer": 0}
})  # fmt: skip
NAMES = {"warm": vector(1, 1, 2), "cold": vector(2, 0, 1, 2), "anger": PROBE}


@pytest.fixture
def llama(pico_model: Callable[..., Any]) -> Any:
    return pico_model("llama")


def logits(model: Any, composition: str | Sequence[str] | None, ids: Tensor = IDS, **options: Any) -> Tensor:
    with torch.inference_mode():
        if composition is None:
            return model(input_ids=ids, use_cache=False).logits
        with steered(model, composition, vectors=NAMES, **{"prompt_length": PROMPT, **options}):
            return model(input_ids=ids, use_cache=False).logits


def states(model: Any, layer: int, composition: str | None = None) -> Tensor:
    """The output of a block [rows, tokens, hidden]."""
    seen: list[Tensor] = []
    hook = residual.blocks(model)[layer].register_forward_hook(
        lambda _m, _i, output: seen.append(residual.output_of(output).clone())
    )
    try:
        logits(model, composition)
    finally:
        hook.remove()
    return seen[-1]


def between(values: Tensor) -> float:
    """A threshold in the widest gap around the middle, which rounding does not cross."""
    ordered = values.flatten().sort().values
    third = len(ordered) // 3
    gaps = (ordered[1:] - ordered[:-1])[third:-third]
    place = third + int(gaps.argmax())
    return float((ordered[place] + ordered[place + 1]) / 2)


def by_hand(model: Any, masks: Tensor, strength: float) -> Tensor:
    """Logits where warm is added at its layers to the tokens of a mask [rows, tokens]."""

    def adding(layer: int) -> Callable[..., Any]:
        def call(_m: Any, _i: Any, output: Any) -> Any:
            moved = residual.output_of(output) + strength * masks[:, :, None] * NAMES["warm"].layers[layer]
            return moved if isinstance(output, Tensor) else (moved, *output[1:])

        return call

    handles = [residual.blocks(model)[layer].register_forward_hook(adding(layer)) for layer in (1, 2)]
    try:
        return logits(model, None)
    finally:
        for handle in handles:
            handle.remove()


def test_when_is_decided_at_the_last_token_of_each_prompt_and_acts_on_its_whole_response(llama: Any) -> None:
    values = PROBE.at(0).scores(states(llama, 0))[:, PROMPT - 1]
    threshold = between(values)
    holds = values > threshold
    assert 0 < int(holds.sum()) < len(holds)
    found = logits(llama, f"2*warm@when:anger>{threshold!r}")
    responses = torch.arange(9) >= PROMPT
    assert torch.allclose(found, by_hand(llama, holds[:, None] & responses, 2.0), rtol=0, atol=CLOSE)
    assert torch.equal(found[~holds], logits(llama, None)[~holds])
    opposite = logits(llama, f"2*warm@when:anger<={threshold!r}")
    assert torch.equal(opposite[holds], logits(llama, None)[holds])
    assert torch.equal(opposite[~holds], logits(llama, "2*warm@response")[~holds])


def test_while_is_decided_at_every_token_by_the_state_of_that_token(llama: Any) -> None:
    values = PROBE.at(0).scores(states(llama, 0))
    threshold = between(values[:, PROMPT:])
    masks = (values > threshold) & (torch.arange(9) >= PROMPT)
    found = logits(llama, f"2*warm@while:anger>{threshold!r}")
    assert torch.allclose(found, by_hand(llama, masks, 2.0), rtol=0, atol=CLOSE)
    first = masks & (torch.arange(9) < PROMPT + 2)
    found = logits(llama, f"2*warm@first:2@while:anger>{threshold!r}")
    assert torch.allclose(found, by_hand(llama, first, 2.0), rtol=0, atol=CLOSE)


def test_all_conditions_of_a_term_must_hold(llama: Any) -> None:
    values = PROBE.at(0).scores(states(llama, 0))
    once, always = between(values[:, PROMPT - 1]), between(values[:, PROMPT:])
    masks = (values[:, PROMPT - 1 : PROMPT] < once) & (values >= always) & (torch.arange(9) >= PROMPT)
    assert masks.any()
    found = logits(llama, f"2*warm@when:anger<{once!r}@while:anger>={always!r}")
    assert torch.allclose(found, by_hand(llama, masks, 2.0), rtol=0, atol=CLOSE)


def test_a_vector_is_read_in_units_of_strength_after_what_is_done_at_its_layer(llama: Any) -> None:
    plain, direction = states(llama, 0), NAMES["cold"].layers[0]
    expected = plain @ direction / (direction @ direction) + 1.5
    with steered(llama, "1.5*cold[0] + warm@when:cold[0]>0", vectors=NAMES, prompt_length=PROMPT) as decisions:
        llama(input_ids=IDS, use_cache=False)
    for row in range(len(ROWS)):
        (decided,) = decisions.of_row(row)
        assert decided.value == pytest.approx(float(expected[row, PROMPT - 1]), abs=1e-4)
        assert (decided.held, decided.read) == (int(decided.value > 0), 1)


def test_another_layer_of_a_probe_can_be_read(llama: Any) -> None:
    values = PROBE.at(1).scores(states(llama, 1))[:, PROMPT - 1]
    threshold = between(values)
    found = logits(llama, f"2*warm[2]@when:anger[1]>{threshold!r}")
    changed = (found != logits(llama, None)).any(2).any(1)
    assert torch.equal(changed, values > threshold)


@pytest.mark.parametrize("kind", ["when", "while"])
def test_a_condition_that_no_score_fulfils_reads_any_layer_and_changes_nothing(kind: str, llama: Any) -> None:
    """So a probe of the last layer can be read, above which nothing is steered."""
    last = len(residual.blocks(llama)) - 1
    readout = Readout(vector(9, last).layers[last], 0.5)
    names = {**NAMES, "last": Probe({last: readout})}
    with steered(llama, f"cold[0]@{kind}:last>1e39", vectors=names, prompt_length=PROMPT) as decisions:
        found = llama(input_ids=IDS, use_cache=False).logits
    assert torch.equal(found, logits(llama, None))
    values = readout.scores(states(llama, last))[:, PROMPT:] if kind == "while" else None
    for row in range(len(ROWS)):
        (decided,) = decisions.of_row(row)
        expected = readout.scores(states(llama, last))[row, PROMPT - 1] if values is None else values[row].mean()
        assert decided.value == pytest.approx(float(expected), abs=1e-3)
        assert (decided.held, decided.read) == (0, 1 if values is None else values.shape[1])
    with pytest.raises(ExpressionError, match="what is read must lie below"):
        logits(llama, "cold[0]@when:anger>3e38")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3-window", "qwen3-next"])
@pytest.mark.parametrize("cuts", [[4, 5, 6, 7, 8], [2, 3, 6], [6], []], ids=str)
def test_decisions_are_the_same_in_chunks_with_a_cache(
    architecture: str, cuts: list[int], pico_model: Callable[..., Any]
) -> None:
    model = pico_model(architecture)
    values = PROBE.at(0).scores(states(model, 0))
    composition = f"2*warm@when:anger>{between(values[:, PROMPT - 1])!r} + cold[2]@while:anger<0.3"
    whole = logits(model, composition)
    parts, cache = [], None
    with steered(model, composition, vectors=NAMES, prompt_length=PROMPT), torch.inference_mode():
        for start, stop in zip([0, *cuts], [*cuts, 9], strict=True):
            output = model(input_ids=IDS[:, start:stop], past_key_values=cache, use_cache=True)
            parts.append(output.logits)
            cache = output.past_key_values
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=CLOSE)


def test_generation_of_a_padded_batch_decides_as_each_row_alone(llama: Any) -> None:
    prompts = [row[: 3 + index] for index, row in enumerate(ROWS)]
    composition = "3*warm@when:anger>0.4 - 2*cold[1-2]@while:anger[0]<0.1"

    def generated(inputs: dict[str, Tensor]) -> tuple[list[list[int]], Decisions]:
        with steered(llama, composition, vectors=NAMES) as decisions, torch.inference_mode():
            ids = llama.generate(**inputs, max_new_tokens=6, do_sample=False)
        return ids[:, inputs["input_ids"].shape[1] :].tolist(), decisions

    together, decisions = generated(pico.left_padded(prompts))
    for row, prompt in enumerate(prompts):
        (alone,), decided = generated(pico.left_padded([prompt]))
        assert together[row] == alone
        for batched, single in zip(decisions.of_row(row, 6), decided.of_row(0, 6), strict=True):
            assert batched.value == pytest.approx(single.value, abs=1e-3)
            assert batched[2:] == single[2:]
        assert [each.read for each in decisions.of_row(row, 6)] == [1, 5]
        assert [each.read for each in decisions.of_row(row, 3)] == [1, 2]


MARKERS = Markers(thinking=(((7,), (8,)), ((9,),)), tools=(((11,),), ((12,),)))
#           prompt       response
SECTIONED = [
    [5, 6, 20, 21, 7, 22, 9, 23, 24],  # begins to think in the response, and ends
    [5, 8, 20, 21, 22, 9, 23, 11, 24],  # the prompt ends inside; a call of a tool
    [7, 9, 11, 12, 20, 11, 7, 12, 21],  # all closed in the prompt; both open at once
    [11, 5, 6, 20, 21, 22, 12, 23, 8],  # the prompt ends in a call
]
INSIDE = {
    "thinking": [[4, 5], [4], [6, 7, 8], [8]],
    "answer": [[6, 7, 8], [5, 6, 7, 8], [4, 5], [4, 5, 6, 7]],
    "outside-tools": [[4, 5, 6, 7, 8], [4, 5, 6], [4, 7, 8], [6, 7, 8]],
}


@pytest.mark.parametrize("section", INSIDE)
@pytest.mark.parametrize("cuts", [[4, 5, 6, 7, 8], [2, 6], []], ids=str)
def test_a_section_is_a_function_of_the_tokens_so_far(section: str, cuts: list[int], llama: Any) -> None:
    ids = torch.tensor(SECTIONED)
    masks = torch.zeros(4, 9)
    for row, places in enumerate(INSIDE[section]):
        # The prompt's last token of row 1 is 21, so that the response begins at position 4 in every row.
        masks[row, places] = 1.0

    def expected() -> Tensor:
        handles = [residual.blocks(llama)[layer].register_forward_hook(_adding(layer, masks)) for layer in (1, 2)]
        try:
            return logits(llama, None, ids)
        finally:
            for handle in handles:
                handle.remove()

    parts, cache = [], None
    with (
        steered(llama, f"2*warm@{section}", vectors=NAMES, prompt_length=PROMPT, markers=MARKERS) as decisions,
        torch.inference_mode(),
    ):
        for start, stop in zip([0, *cuts], [*cuts, 9], strict=True):
            output = llama(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            parts.append(output.logits)
            cache = output.past_key_values
    assert torch.allclose(torch.cat(parts, 1), expected(), rtol=0, atol=CLOSE)
    for row, places in enumerate(INSIDE[section]):
        (decided,) = decisions.of_row(row)
        assert (decided.condition, decided.held, decided.read) == (f"@{section}", len(places), 5)


def _adding(layer: int, masks: Tensor) -> Callable[..., Any]:
    def call(_m: Any, _i: Any, output: Any) -> Any:
        moved = residual.output_of(output) + 2.0 * masks[:, :, None] * NAMES["warm"].layers[layer]
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    return call


def test_sections_combine_with_scopes_and_conditions_and_padding_is_in_none(llama: Any) -> None:
    padded = pico.left_padded([row[: 5 + i] for i, row in enumerate(SECTIONED)])
    text = "2*warm@first:3@answer@while:anger>-1e9"
    with steered(llama, text, vectors=NAMES, markers=MARKERS) as decisions, torch.inference_mode():
        llama.generate(**padded, max_new_tokens=5, do_sample=False)
    assert [[each.read for each in decisions.of_row(row, 5)] for row in range(4)] == [[3, 3]] * 4, "@first:3"


def test_a_condition_counts_the_tokens_in_the_scopes_of_its_terms(llama: Any) -> None:
    text = "2*warm@first:1@while:anger>0.3 + warm@after:3@while:anger>0.3 + warm@first:4@answer + warm@while:anger[0]<9"
    with steered(
        llama, [text, "warm@after:2@answer"] * 3, vectors=NAMES, prompt_length=PROMPT, markers=MARKERS
    ) as each:
        llama(input_ids=IDS, use_cache=False)
    assert [{found.condition: found.read for found in each.of_row(row)} for row in (0, 1)] == [
        {"@while:anger>0.3": 3, "@while:anger[0]<9": 5, "@answer": 4},
        {"@while:anger>0.3": 0, "@while:anger[0]<9": 0, "@answer": 3},
    ]
    assert {found.condition: found.read for found in each.of_row(0, 4)}["@while:anger>0.3"] == 1


def test_a_model_without_the_markers_refuses_the_section_with_those_that_are_known(llama: Any) -> None:
    for section, what in (("answer", "thinking"), ("outside-tools", "tools")):
        with (
            pytest.raises(UsageError, match=f"@{section} needs the model's markers of {what}"),
            steered(llama, f"warm@{section}", vectors=NAMES),
        ):
            pass


def test_markers_are_found_among_the_tokens_of_a_tokenizer_or_given() -> None:
    tokenizer = pico.tokenizer()
    assert markers_of(tokenizer) == Markers()
    tokenizer.add_tokens(["<think>", "</think>", "[TOOL_CALLS]", "<|tool_call_start|>"], special_tokens=True)
    begin, end, call, _half = tokenizer.convert_tokens_to_ids(
        ["<think>", "</think>", "[TOOL_CALLS]", "<|tool_call_start|>"]
    )
    assert markers_of(tokenizer) == Markers((((begin,),), ((end,),)), (((call,),), ()))
    given = markers_of(tokenizer, {"thinking": ["[TOOL_CALLS]", "</think>"]})
    assert given == Markers((((call,),), ((end,),)), (((call,),), ()))


def test_a_marker_of_several_tokens_is_what_the_tokenizer_makes_of_it_beside_spaces_too() -> None:
    tokenizer = pico.tokenizer()
    begins, ends = markers_of(tokenizer, {"thinking": ["user:", "is."]}).thinking
    assert begins == (tuple(tokenizer.encode("user:", add_special_tokens=False)),)
    spaced = tokenizer.encode(" is.", add_special_tokens=False)  # one token for the word and the space before it
    assert tuple(spaced) in ends
    assert len(ends) == 2
    with pytest.raises(ValueError, match="of thinking has 17 tokens, at most 16"):
        markers_of(tokenizer, {"thinking": ["x" * 17, ""]})
    harmony = ["<|channel|>", "analysis", "<|message|>", "<|end|>"]
    tokenizer.add_tokens(harmony, special_tokens=True)
    channel, analysis, message, end = tokenizer.convert_tokens_to_ids(harmony)
    assert markers_of(tokenizer).thinking == (((channel, analysis, message),), ((end,),))


def test_markers_of_several_tokens_are_seen_over_any_cuts_and_padding() -> None:
    chance, generator = random.Random(2), torch.Generator().manual_seed(2)
    pair = (((1, 2), (4,)), ((2, 1, 1), (3, 3)))
    seen = set()
    for _ in range(40):
        ids = torch.randint(1, 6, (3, 14), generator=generator)
        expected = torch.zeros(3, 14, dtype=torch.bool)
        for row in range(3):
            state = False
            for i in range(14):
                so_far = tuple(ids[row, : i + 1].tolist())
                for side, value in ((1, False), (0, True)):
                    if any(so_far[-len(marker) :] == marker for marker in pair[side]):
                        state = value
                expected[row, i] = state
                seen.add(state)
        place: Place | None = None
        found: list[list[bool]] = [[], [], []]
        start = 0
        while start < 14:
            stop = min(14, start + chance.randint(1, 5))
            pads = [(chance.randint(0, 2), chance.randint(0, 2)) for _ in range(3)]
            width = stop - start + 4
            part, real = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.bool)
            for row, (left, _right) in enumerate(pads):
                part[row, left : left + stop - start] = ids[row, start:stop]
                real[row, left : left + stop - start] = True
            lies, place = inside(part, real, place, pair)
            for row in range(3):
                found[row] += lies[row][real[row]].tolist()
            start = stop
        assert found == expected.tolist()
        assert place is not None
        assert place.inside.tolist() == expected[:, -1].tolist()
    assert seen == {False, True}


def test_a_section_behind_tokens_that_are_in_no_pass_is_refused(llama: Any) -> None:
    with torch.inference_mode():
        cache = llama(input_ids=IDS[:, :PROMPT], use_cache=True).past_key_values
        with (
            steered(llama, "warm@answer", vectors=NAMES, prompt_length=PROMPT, markers=MARKERS),
            pytest.raises(UsageError, match="of which the first are part of no pass"),
        ):
            llama(input_ids=IDS[:, PROMPT:], past_key_values=cache, use_cache=True)


def test_a_prompt_whose_last_token_is_in_no_pass_is_refused(llama: Any) -> None:
    with torch.inference_mode():
        cache = llama(input_ids=IDS[:, :PROMPT], use_cache=True).past_key_values
        with (
            steered(llama, "warm@when:anger>0", vectors=NAMES, prompt_length=PROMPT),
            pytest.raises(UsageError, match="which is part of no pass"),
        ):
            llama(input_ids=IDS[:, PROMPT:], past_key_values=cache, use_cache=True)


def test_a_control_replaces_the_vector_that_acts_and_not_what_is_read(llama: Any) -> None:
    decided = []
    for vectors in (NAMES, {**NAMES, "cold": vector(9, 0, 1, 2)}):
        with steered(
            llama, "cold[2]@when:cold[0]>0", vectors=vectors, probes={"cold": NAMES["cold"]}, prompt_length=PROMPT
        ) as decisions:
            llama(input_ids=IDS, use_cache=False)
        decided.append([decisions.of_row(row) for row in range(len(ROWS))])
    assert decided[0] == decided[1]


def test_completions_are_scored_under_conditions_as_through_hooks(llama: Any) -> None:
    completions = [Completion(row[: 3 + i % 3], row[3 + i % 3 :]) for i, row in enumerate(ROWS)]
    composition = "2*warm@when:anger>0.4"
    scores = Completions(llama, completions, divergence=True).scores([None, composition], NAMES)
    for index, row in completion_logits(llama, completions, steering(llama, composition, NAMES)):
        ids = torch.tensor(completions[index].completion_ids)
        expected = row.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        assert torch.allclose(scores[1].log_likelihoods[index], expected, rtol=0, atol=1e-6)
    assert max(float(each.max()) for each in scores[1].divergences) > 0


def test_a_probe_of_another_model_or_size_is_refused_before_anything_is_hooked(llama: Any) -> None:
    small = Probe({0: Readout(torch.ones(8), 0.0)})
    with (
        pytest.raises(Exception, match="hidden size 8"),
        steered(llama, "warm@when:small>0", vectors={**NAMES, "small": small}),
    ):
        pass
    beyond = Probe({0: Readout(torch.ones(pico.HIDDEN), 0.0), 90: Readout(torch.ones(pico.HIDDEN), 0.0)}, {
        "recommended": {"layer": 0}
    })  # fmt: skip
    with (
        pytest.raises(ArtifactError, match="the probe far has layer 90"),
        steered(llama, "warm@when:far>0", vectors={**NAMES, "far": beyond}),
    ):
        pass
