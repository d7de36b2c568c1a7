"""Steering does what the expression says, where it says, and nothing else; afterwards the model is as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import Tensor

from probes.models import residual
from probes.steered import steered
from vectors.errors import ArtifactError, ExpressionError, UsageError
from vectors.expression import parse
from vectors.steering import SteeringVector

CLOSE = 1e-4  # of logits, float32
AT = (1, 2)  # the layers at which the vectors act
PROMPTS = pico.sequences(3, 4, 9, seed=5)
# Every operation and every scope at once.
EVERYTHING = (
    "1.5*warm@prompt - 2*cold@first:2 + 0.7*cold@response + ablate(warm)@after:2"
    " + clamp(calm, 2)@after:1 + ablate(calm[2], 0.5) + 0.3*warm[1]"
)


def vector(seed: int, size: int = pico.HIDDEN, layers: Sequence[int] = AT) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: torch.randn(size, generator=generator) for layer in layers})


VECTORS = {"warm": vector(1), "cold": vector(2), "calm": vector(3)}


def batch(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A left-padded batch with the positions that `generate` would give it."""
    inputs = pico.left_padded(rows)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs | {"position_ids": positions}


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(**inputs).logits
    return found


def stream(model: Any, layer: int, composition: Any = None, **options: Any) -> Tensor:
    """The residual stream that leaves a block, [batch, tokens, hidden], on the ids in `options`, steered or not."""
    inputs = {"input_ids": options.pop("input_ids"), "use_cache": False}
    seen: list[Tensor] = []
    handle = residual.blocks(model)[layer].register_forward_hook(
        lambda _m, _i, output: seen.append(residual.output_of(output).clone())
    )
    try:
        if composition is None:
            logits(model, **inputs)
        else:
            with steered(model, composition, vectors=VECTORS, **options):
                logits(model, **inputs)
    finally:
        handle.remove()
    return seen[0]


def changed_at(model: Any, layer: int, change: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Logits of a model in which one block's output h is replaced by `change(h)` by hand."""

    def replace(_block: Any, _inputs: Any, output: Any) -> Any:
        states = change(residual.output_of(output))
        return states if isinstance(output, Tensor) else (states, *output[1:])

    handle = residual.blocks(model)[layer].register_forward_hook(replace)
    try:
        return logits(model, input_ids=ids, use_cache=False)
    finally:
        handle.remove()


IDS = torch.tensor([PROMPTS[0], [*PROMPTS[1], *PROMPTS[2]][: len(PROMPTS[0])]])


# What the operations do.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_0_equals_no_hooks_bit_for_bit(
    architecture: str, dtype: torch.dtype, pico_model: Callable[..., Any]
) -> None:
    model = pico_model(architecture, dtype=dtype)
    plain = logits(model, input_ids=IDS)
    with steered(model, "0*warm + ablate(cold, 0)@response - 0*calm", vectors=VECTORS):
        assert pico.hooks(model) == 0
        assert torch.equal(logits(model, input_ids=IDS), plain)
    with steered(model, "2*warm", vectors=VECTORS):
        assert not torch.equal(logits(model, input_ids=IDS), plain)
    assert torch.equal(logits(model, input_ids=IDS), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_at_strength_0_keeps_its_bits_beside_a_steered_one(
    dtype: torch.dtype, pico_model: Callable[..., Any]
) -> None:
    model = pico_model("llama", dtype=dtype)
    plain = logits(model, input_ids=IDS)
    with steered(model, ["0*warm", "2*warm"], vectors=VECTORS):
        found = logits(model, input_ids=IDS)
    assert torch.equal(found[0], plain[0])
    assert not torch.equal(found[1], plain[1])


def test_adding_equals_adding_by_hand_at_that_block(model: Any) -> None:
    direction = VECTORS["warm"].layers[1]
    expected = changed_at(model, 1, lambda h: h - 1.5 * direction, IDS)
    with steered(model, "-1.5*warm[1]", vectors=VECTORS):
        found = logits(model, input_ids=IDS, use_cache=False)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_a_vector_acts_at_the_layers_under_apply(llama: Any) -> None:
    only = SteeringVector(VECTORS["warm"].layers, {"apply": [2]})
    expected = changed_at(llama, 2, lambda h: h + only.layers[2], IDS)
    with steered(llama, only):
        assert torch.equal(logits(llama, input_ids=IDS, use_cache=False), expected)


def test_a_sum_of_vectors_acts_as_the_expression_of_their_sum(llama: Any) -> None:
    acting = {"warm": [1], "cold": [2]}
    parts = {name: SteeringVector(VECTORS[name].layers, {"apply": at}) for name, at in acting.items()}
    with steered(llama, "warm - 0.5*cold", vectors=parts):
        expected = logits(llama, input_ids=IDS)
    with steered(llama, parts["warm"] - 0.5 * parts["cold"]):
        assert torch.allclose(logits(llama, input_ids=IDS), expected, rtol=0, atol=1e-6)


def test_ablation_leaves_no_component_and_nothing_else_changes(model: Any) -> None:
    unit = VECTORS["warm"].layers[1] / VECTORS["warm"].layers[1].norm()
    before, after = (stream(model, 1, composition, input_ids=IDS) for composition in (None, "ablate(warm[1])"))
    assert float((before @ unit).abs().min()) > 1e-3
    assert float((after @ unit).abs().max()) < 1e-5 * float(before.norm(dim=-1).max())
    assert torch.allclose(after, before - (before @ unit)[..., None] * unit, rtol=0, atol=1e-5)


def test_a_partial_ablation_leaves_the_rest_of_the_component(llama: Any) -> None:
    unit = VECTORS["warm"].layers[1] / VECTORS["warm"].layers[1].norm()
    before, after = (stream(llama, 1, composition, input_ids=IDS) for composition in (None, "ablate(warm[1], 0.75)"))
    assert torch.allclose(after @ unit, 0.25 * (before @ unit), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("level", [-1.5, 0.0, 2.0])
def test_clamping_sets_the_component_in_units_of_strength(model: Any, level: float) -> None:
    direction = VECTORS["warm"].layers[1]
    length = float(direction.norm())
    before, after = (stream(model, 1, c, input_ids=IDS) for c in (None, f"clamp(warm[1], {level})"))
    components = after @ (direction / length)
    assert torch.allclose(components, torch.full_like(components, level * length), rtol=1e-4, atol=1e-4)
    across = (after - before) - ((after - before) @ direction)[..., None] * direction / length**2
    assert float(across.abs().max()) < 1e-4


def test_every_operation_reads_the_stream_as_it_entered(llama: Any) -> None:
    h = stream(llama, 1, input_ids=IDS)
    warm, cold, calm = (VECTORS[name].layers[1] for name in ("warm", "cold", "calm"))
    u, w = cold / cold.norm(), calm / calm.norm()
    along = (h @ u)[..., None]
    level = (2 * calm.norm() - (h @ w))[..., None]
    expected = h + 1.5 * warm - along * u + level * w
    one = stream(llama, 1, "1.5*warm[1] + ablate(cold[1]) + clamp(calm[1], 2)", input_ids=IDS)
    other = stream(llama, 1, "clamp(calm[1], 2) + ablate(cold[1]) + 1.5*warm[1]", input_ids=IDS)
    assert torch.allclose(one, expected, rtol=0, atol=1e-5)
    assert torch.allclose(other, expected, rtol=0, atol=1e-5)


def test_a_direction_of_length_zero_changes_nothing(llama: Any) -> None:
    nothing = {"none": SteeringVector({1: torch.zeros(pico.HIDDEN)})}
    plain = logits(llama, input_ids=IDS)
    with steered(llama, "2*none + ablate(none) + clamp(none, 3)", vectors=nothing):
        assert torch.equal(logits(llama, input_ids=IDS), plain)


def test_hidden_states_are_shown_as_they_were_steered() -> None:
    """Whether the model was asked for hidden states before, or for the first time while it was steered."""
    fresh, used = pico.build("llama"), pico.build("llama")
    used(input_ids=IDS, output_hidden_states=True)
    expected = stream(fresh, 1, "2*warm[1]", input_ids=IDS)
    for model in (fresh, used):
        with steered(model, "2*warm[1]", vectors=VECTORS), torch.inference_mode():
            states = model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
        assert torch.equal(states[2], expected)


def test_a_steered_model_may_be_steered_again(llama: Any) -> None:
    with steered(llama, "warm - 0.5*cold", vectors=VECTORS):
        together = logits(llama, input_ids=IDS)
    with steered(llama, "warm", vectors=VECTORS), steered(llama, "-0.5*cold", vectors=VECTORS):
        assert torch.allclose(logits(llama, input_ids=IDS), together, rtol=0, atol=1e-5)


# Where they act.

SCOPES = {
    "": range(0, 9),
    "@prompt": range(0, 4),
    "@response": range(4, 9),
    "@first:2": range(4, 6),
    "@first:0": range(0, 0),
    "@first:99": range(4, 9),
    "@after:3": range(7, 9),
    "@after:0": range(4, 9),
    "@after:1000000000": range(0, 0),
}
(LINE,) = pico.sequences(1, 9, 9, seed=6)


@pytest.mark.parametrize(("scope", "expected"), SCOPES.items(), ids=[scope or "everywhere" for scope in SCOPES])
@pytest.mark.parametrize("prompt_length", [4, [4]])
def test_a_scope_covers_its_tokens_and_no_others(scope: str, expected: range, prompt_length: Any, llama: Any) -> None:
    ids = torch.tensor([LINE])
    before = stream(llama, 1, input_ids=ids)
    after = stream(llama, 1, "2*warm[1]" + scope, input_ids=ids, prompt_length=prompt_length)
    moved = torch.zeros(9, 1)
    moved[list(expected)] = 2.0
    assert torch.allclose(after - before, (moved * VECTORS["warm"].layers[1])[None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("cuts", [[4, 5, 6, 7, 8], [4, 6], [4]], ids=["token by token", "in chunks", "at once"])
def test_a_scope_covers_the_same_tokens_with_a_cache(scope: str, cuts: list[int], llama: Any) -> None:
    composition = f"2*warm{scope} + ablate(cold){scope}"
    ids = torch.tensor([LINE])
    with steered(llama, composition, vectors=VECTORS, prompt_length=4):
        whole = logits(llama, input_ids=ids, use_cache=False)
    parts: list[Tensor] = []
    cache = None
    with steered(llama, composition, vectors=VECTORS), torch.inference_mode():
        for start, stop in zip([0, *cuts], [*cuts, 9], strict=True):
            output = llama(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
            parts.append(output.logits)
            cache = output.past_key_values
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=CLOSE)


def test_a_scope_without_a_cache_or_a_prompt_length_is_refused(llama: Any) -> None:
    """Each pass would take the whole sequence for the prompt, and `@response` would silently do nothing."""
    (prompt,) = pico.sequences(1, 5, 5, seed=7)
    with (
        steered(llama, "2*warm@response", vectors=VECTORS),
        pytest.raises(UsageError, match="nothing says where the prompt ends") as caught,
    ):
        llama.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, use_cache=False)
    assert "prompt_length" in caught.value.hint
    with steered(llama, "2*warm", vectors=VECTORS):  # everywhere needs no prompt
        llama.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, use_cache=False)
    with steered(llama, "2*warm@response", vectors=VECTORS, prompt_length=5):
        llama.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, use_cache=False)


def test_computing_a_growing_sequence_again_is_refused_and_other_sequences_are_not(llama: Any) -> None:
    with (  # noqa: PT031  (the warning comes at the end of the context)
        pytest.warns(UserWarning, match="nothing was steered"),
        steered(llama, "2*warm@response", vectors=VECTORS),
    ):
        logits(llama, input_ids=torch.tensor([LINE[:4]]))
        logits(llama, input_ids=torch.tensor([LINE[2:8]]))  # another prompt
        with pytest.raises(UsageError, match="nothing says where the prompt ends"):
            logits(llama, input_ids=torch.tensor([LINE[2:9]]))


def step_by_step(model: Any, prompt: list[int], composition: str, tokens: int) -> tuple[list[int], Tensor]:
    """Greedy decoding that computes the whole sequence again at each step, without a cache."""
    ids, found = list(prompt), []
    with steered(model, composition, vectors=VECTORS, prompt_length=len(prompt)):
        for _ in range(tokens):
            found.append(logits(model, input_ids=torch.tensor([ids]), use_cache=False)[0, -1])
            ids.append(int(found[-1].argmax()))
    return ids[len(prompt) :], torch.stack(found)


def generated(model: Any, composition: Any, tokens: int, **inputs: Tensor) -> tuple[list[list[int]], Tensor]:
    """What `generate` gives: the new tokens of each row, and their logits [rows, tokens, vocabulary]."""
    inputs.pop("position_ids", None)
    with steered(model, composition, vectors=VECTORS), torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), torch.stack(output.logits, 1)


def test_generation_equals_computing_everything_again_at_each_step(model: Any) -> None:
    check_generation(model, EVERYTHING)


# A scope knows positions alone; these differ in how they count them: a cache of keys, a window, states that recur.
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3-window", "lfm2", "qwen3-next"], indirect=True)
@pytest.mark.parametrize("composition", ["2*warm@prompt", "2*warm@first:2", "2*warm@after:2"])
def test_generation_with_one_scope_equals_computing_everything_again(model: Any, composition: str) -> None:
    check_generation(model, composition)


def check_generation(model: Any, composition: str) -> None:
    for prompt in PROMPTS[:2]:
        tokens, expected = step_by_step(model, prompt, composition, 5)
        (found,), found_logits = generated(model, composition, 5, **pico.left_padded([prompt]))
        assert torch.allclose(found_logits[0], expected, rtol=0, atol=CLOSE)
        assert found == tokens


@pytest.mark.parametrize("scope", ["@response", "@after:1", "@first:2"])
def test_generation_with_a_cache_of_the_models_own_knows_its_prompt(scope: str) -> None:
    model = pico.build("minimax")
    tokens, expected = step_by_step(model, PROMPTS[0], f"3*warm{scope}", 5)
    (found,), found_logits = generated(model, f"3*warm{scope}", 5, **pico.left_padded([PROMPTS[0]]))
    assert torch.allclose(found_logits[0], expected, rtol=0, atol=CLOSE)
    assert found == tokens
    assert not torch.allclose(generated(model, "0*warm", 5, **pico.left_padded([PROMPTS[0]]))[1][0], expected)


def test_states_that_do_not_count_their_tokens_go_on_from_the_pass_before() -> None:
    """Mamba's cache knows no length, and its later passes have no mask of the padding."""
    model = pico.build("mamba", intermediate_size=2 * pico.HIDDEN)
    prompts = [PROMPTS[0], next(prompt for prompt in PROMPTS if len(prompt) != len(PROMPTS[0]))]
    for scope in ("@response", "@after:1", "@first:2"):
        tokens, scores = generated(model, f"3*warm{scope}", 5, **pico.left_padded(prompts))
        for i, prompt in enumerate(prompts):
            alone, expected = step_by_step(model, prompt, f"3*warm{scope}", 5)
            assert torch.allclose(scores[i], expected, rtol=0, atol=CLOSE)
            assert tokens[i] == alone
    cache = model(input_ids=torch.tensor([PROMPTS[0]]), use_cache=True).cache_params
    with (
        steered(model, "3*warm@after:1", vectors=VECTORS),
        pytest.raises(UsageError, match="how many tokens the recurrent state holds"),
    ):
        model(input_ids=torch.tensor([[7]]), cache_params=cache, use_cache=True)


def test_one_context_serves_several_generations(llama: Any) -> None:
    """The prompt of each is its own: a longer one after a shorter one."""
    expected = [step_by_step(llama, prompt, EVERYTHING, 4)[0] for prompt in PROMPTS]
    with steered(llama, EVERYTHING, vectors=VECTORS):
        found = [
            llama.generate(**pico.left_padded([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
            for prompt in PROMPTS
        ]
    assert found == expected


# Batches.


def padding_noise(model: Any) -> float:
    """How much transformers' own logits depend on left padding, without any steering."""
    together = logits(model, **batch(PROMPTS))
    alone = [logits(model, input_ids=torch.tensor([prompt]))[0] for prompt in PROMPTS]
    return max(float((together[i, -len(p) :] - alone[i]).abs().max()) for i, p in enumerate(PROMPTS))


def test_a_left_padded_batch_equals_one_by_one(model: Any) -> None:
    assert len({len(prompt) for prompt in PROMPTS}) > 1
    assert padding_noise(model) < CLOSE  # transformers itself, for every architecture
    with steered(model, "1.5*warm@prompt + ablate(cold)@first:2 - calm", vectors=VECTORS, prompt_length=[2, 3, 3]):
        together = logits(model, **batch(PROMPTS))
    for i, (prompt, length) in enumerate(zip(PROMPTS, [2, 3, 3], strict=True)):
        with steered(model, "1.5*warm@prompt + ablate(cold)@first:2 - calm", vectors=VECTORS, prompt_length=length):
            alone = logits(model, input_ids=torch.tensor([prompt]))[0]
        assert torch.allclose(together[i, -len(prompt) :], alone, rtol=0, atol=CLOSE)


def test_generating_a_left_padded_batch_equals_one_by_one(model: Any) -> None:
    found, found_logits = generated(model, EVERYTHING, 5, **pico.left_padded(PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        (alone,), expected = generated(model, EVERYTHING, 5, input_ids=torch.tensor([prompt]))
        assert torch.allclose(found_logits[i], expected[0], rtol=0, atol=CLOSE)
        assert found[i] == alone


def test_rows_with_compositions_of_their_own_equal_each_alone(model: Any) -> None:
    each = ["2*warm@prompt - cold@after:1", "0*warm", "ablate(calm) + clamp(warm[2], 1)@response"]
    found, found_logits = generated(model, each, 4, **pico.left_padded(PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        (alone,), expected = generated(model, each[i], 4, input_ids=torch.tensor([prompt]))
        assert torch.allclose(found_logits[i], expected[0], rtol=0, atol=CLOSE)
        assert found[i] == alone


def test_rows_may_be_vectors_compositions_and_expressions(llama: Any) -> None:
    each = [VECTORS["warm"], parse("cold"), "warm"]
    ids = IDS[:1].expand(3, -1)
    with steered(llama, each, vectors=VECTORS):
        found = logits(llama, input_ids=ids)
    for i, name in enumerate(("warm", "cold", "warm")):
        with steered(llama, name, vectors=VECTORS):
            assert torch.allclose(found[i], logits(llama, input_ids=IDS[:1])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_of_another_size_than_the_compositions_is_refused(rows: int, llama: Any) -> None:
    with (
        steered(llama, ["warm", "cold"], vectors=VECTORS),
        pytest.raises(UsageError, match=f"the batch has {rows} rows but 2 compositions were given"),
    ):
        logits(llama, input_ids=IDS[:1].expand(rows, -1))


@pytest.mark.parametrize("lengths", [[2], [2, 2, 2], torch.tensor([[2, 2]])], ids=str)
def test_prompt_lengths_for_another_number_of_rows_are_refused(lengths: Any, llama: Any) -> None:
    with (
        steered(llama, "warm@response", vectors=VECTORS, prompt_length=lengths),
        pytest.raises(UsageError, match=r"prompt_length has \d entries, the batch 2 rows"),
    ):
        logits(llama, input_ids=IDS)


def test_a_scope_that_reached_no_token_is_warned_of(llama: Any) -> None:
    """A whole text in one pass is all prompt: `@response` would do nothing, and nobody would know."""
    plain = logits(llama, input_ids=IDS)
    with (
        pytest.warns(UserWarning, match="nothing was steered: @after:1, @response counts from the end of the prompt"),
        steered(llama, "warm@response + cold@after:1", vectors=VECTORS),
    ):
        assert torch.equal(logits(llama, input_ids=IDS), plain)


@pytest.mark.parametrize(
    ("expression", "lengths"), [("warm@response", 2), ("warm@prompt", None), ("warm@response + cold", None)]
)
def test_a_scope_that_reached_a_token_is_no_news(expression: str, lengths: int | None, llama: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steered(llama, expression, vectors=VECTORS, prompt_length=lengths):
            logits(llama, input_ids=IDS)
        with steered(llama, "warm@response", vectors=VECTORS):
            pass  # nothing ran


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_steered(side: str, llama: Any) -> None:
    inputs = pico.left_padded(PROMPTS)
    if side == "right":
        inputs = {name: values.flip(1) for name, values in inputs.items()}
    seen: list[Tensor] = []
    handle = residual.blocks(llama)[1].register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
    try:
        logits(llama, **inputs)
        with steered(llama, "2*warm[1] + warm[1]@prompt", vectors=VECTORS):
            logits(llama, **inputs)
    finally:
        handle.remove()
    moved = (seen[0] != seen[1]).any(-1)
    assert torch.equal(moved, inputs["attention_mask"].bool())


def test_a_block_on_another_device_than_the_inputs_is_steered_there(llama: Any) -> None:
    block = residual.blocks(llama)[1]
    elsewhere = torch.zeros(2, 9, pico.HIDDEN, device="meta")
    with steered(llama, ["2*warm[1]@prompt", "warm[1]"], vectors=VECTORS):
        logits(llama, input_ids=IDS)  # the positions lie where these do
        hook = next(iter(block._forward_hooks.values()))
        assert hook(block, (), elsewhere).device.type == "meta"


# What remains, and what is refused.


def test_hooks_are_gone_after_the_body_raised(model: Any) -> None:
    plain = logits(model, input_ids=IDS)
    seen: list[int] = []

    def body() -> None:
        seen.append(pico.hooks(model))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), steered(model, "2*warm@first:3", vectors=VECTORS):
        body()
    assert seen == [3]  # two blocks and the decoder
    assert pico.hooks(model) == 0
    assert torch.equal(logits(model, input_ids=IDS), plain)


@pytest.fixture
def nothing_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("something was hooked")

    for name in ("register_forward_hook", "register_forward_pre_hook"):
        monkeypatch.setattr(torch.nn.Module, name, refuse)


REFUSED: dict[str, tuple[Any, Mapping[str, SteeringVector], type[Exception], str]] = {
    "a wrong hidden size": ("wide", {"wide": vector(1, 48)}, ArtifactError, "wide has hidden size 48, the model 32"),
    "a layer beyond the last": (
        "deep",
        {"deep": vector(1, layers=[2, 4, 5])},
        ArtifactError,
        "deep has layer 4-5; the model has layers 0 to 3",
    ),
    "a layer that the vector lacks": ("warm[0]", VECTORS, ExpressionError, "warm holds no layer 0"),
    "a name that is not there": ("warn", VECTORS, ExpressionError, "'warn' is not bound"),
    "a text that is no expression": ("warm +", VECTORS, ExpressionError, "a term expected"),
    "one row of several": (["warm", "warn"], VECTORS, ExpressionError, "'warn' is not bound"),
    "no composition at all": ([], VECTORS, UsageError, "there is no composition"),
}


@pytest.mark.usefixtures("nothing_hooked")
@pytest.mark.parametrize(("composition", "vectors", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_hooked(
    composition: Any, vectors: Mapping[str, SteeringVector], error: type[Exception], words: str, llama: Any
) -> None:
    with pytest.raises(error, match=words), steered(llama, composition, vectors=vectors):
        pytest.fail("the body ran")


def belonging(digest: str) -> dict[str, SteeringVector]:
    base = {"digest": digest, "name": "another/model"}
    return {"warm": SteeringVector(VECTORS["warm"].layers, {"base": base})}


@pytest.fixture
def from_folder(model_folder: Path) -> Any:
    """A model as anyone would load it, without `probes.models.loading`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder, local_files_only=True).eval()


@pytest.mark.usefixtures("nothing_hooked")
def test_a_vector_of_another_model_is_refused_before_anything_is_hooked(from_folder: Any) -> None:
    with (
        pytest.raises(ArtifactError, match="the vector warm belongs to another/model") as caught,
        steered(from_folder, "warm", vectors=belonging("sha256:00")),
    ):
        pytest.fail("the body ran")
    assert "--any-base" in caught.value.hint


def test_a_vector_of_another_model_may_be_allowed(from_folder: Any) -> None:
    with steered(from_folder, "warm", vectors=VECTORS):
        expected = logits(from_folder, input_ids=IDS)
    with steered(from_folder, "warm", vectors=belonging("sha256:00"), any_base=True):
        assert torch.equal(logits(from_folder, input_ids=IDS), expected)


def test_a_vector_of_this_model_is_taken_without_a_word(from_folder: Any, model_folder: Path) -> None:
    from vectors import references

    digest = references.identity(references.resolve(str(model_folder)))["digest"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steered(from_folder, "warm", vectors=belonging(digest)):
            assert pico.hooks(from_folder) == 3


def test_a_model_of_unknown_origin_is_steered_with_a_warning(llama: Any) -> None:
    with (
        pytest.warns(UserWarning, match="not known where the model came from, so the base of warm is unverified"),
        steered(llama, "warm", vectors=belonging("sha256:00")),
    ):
        assert pico.hooks(llama) == 3


def test_a_mapping_from_layers_to_tensors_is_a_vector(llama: Any) -> None:
    ids = torch.tensor([[1, 9, 10, 11]])
    direction = torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(3))
    expected = None
    for composition, vectors in (
        (SteeringVector({2: direction}), None), ({2: direction}, None), ("v", {"v": {2: direction}}),
    ):  # fmt: skip
        with steered(llama, composition, vectors=vectors):
            logits = llama(ids).logits
        assert expected is None or torch.equal(logits, expected)
        expected = logits


@pytest.mark.parametrize("composition", [3, torch.ones(4), {"a": torch.ones(4)}, {1: "warm"}, None])
def test_what_is_no_composition_is_a_type_error_with_the_accepted_forms(llama: Any, composition: Any) -> None:
    with (
        pytest.raises(TypeError, match="an expression or a file's path, a Composition, a SteeringVector, or a mapping"),
        steered(llama, composition),
    ):
        pass
