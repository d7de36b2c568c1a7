"""Where a loaded model's blocks hold the residual stream is proved; a wrong claim is caught, and a doubt refused.

The models here are small modules of the forms that vLLM's models have: what blocks return, and what the next one takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_decoders import (
    HIDDEN,
    IDS,
    LAYERS,
    PROVED,
    TOKENS,
    Block,
    Decoder,
    Halves,
    Normalised,
    Parallel,
    PostNorm,
    Scaled,
    SideChannel,
    Stacked,
    Unequal,
    Whole,
    Wrapper,
    proved,
)
from torch import Tensor, nn

from steer.serving.engine.proving.forms import Form, Passes, Refused, candidates
from steer.serving.engine.proving.proof import problem_of, prove


@pytest.mark.parametrize("name", PROVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_form_of_a_models_blocks_is_proved(name: str, dtype: torch.dtype) -> None:
    kind, form = PROVED[name]
    assert proved(Decoder([kind] * LAYERS).to(dtype)) == dict.fromkeys(range(LAYERS), form)


def test_a_model_is_as_it_was_after_the_proof() -> None:
    model = Decoder([Halves] * LAYERS)
    before = model(IDS)
    proved(model)
    assert torch.equal(model(IDS), before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_blocks_of_several_classes_in_one_list_are_proved_together() -> None:
    class Convolution(Halves):
        pass

    assert set(proved(Decoder([Convolution, Halves] * 2)).values()) == {"halves"}
    assert set(proved(Decoder([Whole, Parallel, PostNorm, Whole])).values()) == {"whole"}


def test_the_decoders_list_is_the_one_that_a_pass_calls_also_beside_a_vision_tower() -> None:
    model = Wrapper(Decoder([Halves] * LAYERS))
    result = prove(model, LAYERS, HIDDEN, lambda: model(IDS))
    assert [block for block, _ in result.values()] == list(model.language_model["model"].layers)


def test_placeholders_of_a_pipeline_are_passed_over_and_layers_keep_their_numbers() -> None:
    class Stage(Decoder):
        """The middle of a pipeline: streams in, streams out."""

        def forward(self, ids: Tensor) -> Any:
            generator = torch.Generator().manual_seed(2)
            hidden, residual = torch.randn(2, len(ids), HIDDEN, generator=generator)
            for layer in self.layers[1:3]:
                hidden, residual = layer(None, hidden, residual)
            sent = type("IntermediateTensors", (), {})()
            sent.tensors = {"hidden_states": hidden, "residual": residual}
            return sent

    model = Stage([Halves] * LAYERS)
    model.layers[0], model.layers[3] = nn.Identity(), nn.Identity()
    assert proved(model) == {1: "halves", 2: "halves"}


REFUSED: dict[str, tuple[list[type[Block]], Callable[..., Any] | None, str]] = {
    "a normalised output": ([Normalised] * LAYERS, None, "Normalised takes at layer 0 is not in what it returns"),
    "a scaled stream": ([Scaled] * LAYERS, None, "Scaled at layer 0 multiplies the stream by 0.5"),
    "a scaled first block": ([Scaled, Whole, Whole, Whole], None, "Scaled at layer 0 multiplies the stream by 0.5"),
    "one scaled block": ([Whole, Whole, Scaled, Whole], None, "Scaled at layer 2 multiplies the stream by 0.5"),
    "halves that count differently": ([Unequal] * LAYERS, None, "Unequal at layer 1 depends on the parts"),
    "a side channel": ([SideChannel] * LAYERS, None, "SideChannel at layer 1 depends on another part"),
    "stacked streams": ([Stacked] * LAYERS, None, r"Stacked at layer 0 returns \[2, 6, 16\], not one residual stream"),
    "a stream scaled between blocks": ([Whole] * LAYERS, lambda h: (h * 0.9,), "Whole does not take what Whole at"),
    "inputs added between blocks": ([Whole] * LAYERS, lambda h: (h + 1,), "Whole does not take what Whole at layer 0"),
    "a norm between blocks": (
        [Whole] * LAYERS,
        lambda h: (nn.functional.rms_norm(h, (HIDDEN,)),),
        "does not take what Whole at layer 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_stream_is_refused_with_what_was_seen(name: str) -> None:
    kinds, between, reason = REFUSED[name]
    with pytest.raises(Refused, match=reason):
        proved(Decoder(kinds, between))


def test_a_model_without_one_list_of_that_many_blocks_is_refused() -> None:
    with pytest.raises(Refused, match="Decoder has 0 lists of 5 decoder blocks"):
        proved(Decoder([Whole] * LAYERS), 5)


def test_blocks_that_a_pass_calls_twice_or_in_another_order_are_refused() -> None:
    class Looped(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embeddings(ids)
            for layer in [*self.layers, *self.layers]:
                hidden = layer(None, hidden)
            return self.norm(hidden)

    with pytest.raises(Refused, match="called in the order 0, 1, 2, 3, 0, 1, 2, 3"):
        proved(Looped([Whole] * LAYERS))


def test_blocks_that_see_a_part_of_the_tokens_are_refused() -> None:
    """As where the ranks of tensor parallelism share the tokens of mixtures of experts, or only the last ones go on."""

    class Chunked(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embeddings(ids)
            for layer in self.layers[:2]:
                hidden = layer(None, hidden)
            part = hidden[: TOKENS // 2]
            for layer in self.layers[2:]:
                part = layer(None, part)
            return torch.cat([self.norm(part), hidden[TOKENS // 2 :]])

    with pytest.raises(Refused, match="Whole at layer 2 returns 3 tokens, and the model 6"):
        proved(Chunked([Whole] * LAYERS))


def test_a_model_may_return_what_its_last_block_does_if_that_is_the_stream() -> None:
    class Bare(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.embeddings(ids)
            for layer in self.layers:
                hidden = layer(None, hidden)
            return hidden

    assert set(proved(Bare([Whole] * LAYERS)).values()) == {"whole"}
    with pytest.raises(Refused, match="Normalised takes at layer 0 is not in what it returns"):  # OPT 350M
        proved(Bare([Normalised] * LAYERS))


WRONG = {
    "halves": ["part 1 of a tuple", "part 2 of a tuple"],
    "turned": ["part 1 of a tuple", "part 2 of a tuple"],
    "with an unused part": ["halves", "part 2 of a tuple"],
}


@pytest.mark.parametrize(("name", "claim"), [(name, claim) for name, claims in WRONG.items() for claim in claims])
def test_a_wrong_claim_about_the_parts_is_caught(name: str, claim: str) -> None:
    model = Decoder([PROVED[name][0]] * LAYERS)
    passes = Passes(model, dict(enumerate(model.layers)), lambda: model(IDS), HIDDEN)
    forms = {form.name: form for form in candidates(passes.base, HIDDEN)}
    assert problem_of(forms[PROVED[name][1]], passes) is None
    assert problem_of(forms[claim], passes) is not None


@pytest.mark.parametrize("name", PROVED)
def test_layers_that_are_off_by_one_are_caught(name: str) -> None:
    """The claim that layer i is what block i + 1 returns: the first block is left out, or the last comes first."""
    model = Decoder([PROVED[name][0]] * LAYERS)
    shifted = nn.ModuleList([*model.layers[1:], model.layers[0]])

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shifted = shifted

        def forward(self, ids: Tensor) -> Tensor:
            return model(ids)

    with pytest.raises(Refused, match="called in the order 3, 0, 1, 2"):
        proved(Shifted())


@pytest.mark.parametrize("name", [name for name in PROVED if name != "batched"])
def test_the_claim_that_a_block_returns_what_its_norm_has_been_applied_to_is_caught(name: str) -> None:
    kind = PROVED[name][0]

    class Claimed(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any) -> Any:
            output = super().forward(*args)
            if isinstance(output, tuple):
                return self.norm(output[0]), output[1]
            return self.norm(output)

    if name == "halves":  # the norm of a contribution is a contribution
        assert set(proved(Decoder([Claimed] * LAYERS)).values()) == {"halves"}
        return
    with pytest.raises(Refused):
        proved(Decoder([Claimed] * LAYERS))


def test_a_stream_in_three_parts_is_refused_since_blocks_are_steered_by_two() -> None:
    class Thirds(Whole):
        def forward(self, positions: Tensor, *parts: Tensor) -> Any:
            hidden = sum(parts)
            return self.mix(self.norm(hidden)), 0.25 * hidden, 0.75 * hidden

    class Model(Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            parts = (self.embeddings(ids),)
            for layer in self.layers:
                parts = layer(None, *parts)
            return self.norm(sum(parts))

    with pytest.raises(Refused):
        proved(Model([Thirds] * LAYERS))


def test_a_form_says_in_words_what_it_is() -> None:
    assert [Form(None).name, Form((0, 1)).name, Form((1,)).name] == ["whole", "halves", "part 2 of a tuple"]
