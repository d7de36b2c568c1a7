"""Where a loaded model's blocks hold the residual stream is proved; a wrong claim is caught, and a doubt refused.

The models here are small modules of the forms that vLLM's models have: what blocks return, and what the next one takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from steer.serving.engine.worker import proof
from steer.serving.engine.worker.proof import Form, Passes, Refused, candidates, problem_of, prove
from vectors import references

HIDDEN, LAYERS, TOKENS = 16, 4, 6


class Norm(nn.Module):
    """vLLM's norm: with a residual it adds it first, in place, and returns both."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return nn.functional.rms_norm(x, (HIDDEN,))
        residual.add_(x)
        return nn.functional.rms_norm(residual, (HIDDEN,)), residual


class Block(nn.Module):
    """Attention and MLP of a block; `mix` is where they see other tokens than their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second_norm = Norm(), Norm()
        self.attention = nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 32), nn.Linear(32, HIDDEN)

    def mix(self, x: Tensor) -> Tensor:
        return self.attention(x.cumsum(0) / 3)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x)))


class Halves(Block):
    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> Any:
        if residual is None:
            residual, hidden = hidden, self.norm(hidden)
        else:
            hidden, residual = self.norm(hidden, residual)
        hidden, residual = self.second_norm(self.mix(hidden), residual)
        return self.mlp(hidden), residual


class Turned(Halves):
    """The residual leads."""

    def forward(self, positions: Tensor, residual: Tensor | None, hidden: Tensor) -> Any:
        return super().forward(positions, hidden, residual)[::-1]


class Whole(Block):
    def forward(self, positions: Tensor, hidden: Tensor) -> Any:
        hidden = hidden + self.mix(self.norm(hidden))
        return hidden + self.mlp(self.second_norm(hidden))


class Parallel(Block):
    """Attention and MLP read the same norm, as in GPT-NeoX and Falcon."""

    def forward(self, positions: Tensor, hidden: Tensor) -> Any:
        normed = self.norm(hidden)
        return hidden + self.mix(normed) + self.mlp(normed)


class PostNorm(Block):
    """Norms behind attention and MLP, as in OLMo 2."""

    def forward(self, positions: Tensor, hidden: Tensor) -> Any:
        hidden = hidden + self.norm(self.mix(hidden))
        return hidden + self.second_norm(self.mlp(hidden))


class WithUnused(Whole):
    """The second part of the output is used by nothing, as in StableLM and Cohere."""

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None = None) -> Any:
        return super().forward(positions, hidden), hidden.clone()


class WithNone(Whole):
    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> Any:
        return super().forward(positions, hidden), None


class ScaledContributions(Block):
    """Granite and MiniCPM scale what is added to the stream, not the stream."""

    def forward(self, positions: Tensor, hidden: Tensor) -> Any:
        hidden = hidden + 0.2 * self.mix(self.norm(hidden))
        return hidden + 0.2 * self.mlp(self.second_norm(hidden))


class Normalised(Whole):
    """The output is normalised, as behind a model's last block."""

    def forward(self, positions: Tensor, hidden: Tensor) -> Any:
        return self.norm(super().forward(positions, hidden))


class Scaled(Whole):
    def forward(self, positions: Tensor, hidden: Tensor) -> Any:
        return 0.5 * super().forward(positions, hidden)


class Unequal(Halves):
    """The halves do not count alike: the stream is hidden + 2 residual."""

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> Any:
        residual = hidden * 0 if residual is None else residual * 2
        hidden, residual = super().forward(positions, hidden, residual)
        return hidden, residual / 2


class SideChannel(Whole):
    """A second part of which the next block's MLP reads, so that the first is not all that a block passes on."""

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> Any:
        memory = torch.zeros_like(hidden) if residual is None else residual
        hidden = hidden + self.mix(self.norm(hidden))
        return hidden + self.mlp(self.second_norm(hidden) + memory), self.norm(hidden)


class Stacked(Whole):
    """Several streams side by side, as in Gemma 3n."""

    def forward(self, positions: Tensor, hidden: Tensor) -> Any:
        stream = hidden if hidden.ndim == 2 else hidden[0]
        return torch.stack([super().forward(positions, stream)] * 2)


class Batched(Whole):
    """A batch of one, as of transformers' modules within vLLM."""

    def forward(self, positions: Tensor, hidden: Tensor) -> Any:
        return super().forward(positions, hidden[0])[None]


class Decoder(nn.Module):
    """Embeddings, blocks, and a final norm; `between` is what happens to the outputs from block to block."""

    def __init__(self, kinds: list[type[Block]], between: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embeddings = nn.Embedding(32, HIDDEN)
        self.layers = nn.ModuleList([kind() for kind in kinds])
        self.norm = Norm()
        self.between = between
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)

    def forward(self, ids: Tensor) -> Tensor:
        positions, state = torch.arange(len(ids)), (self.embeddings(ids),)
        state = (state[0][None],) if isinstance(self.layers[0], Batched) else state
        for layer in self.layers:
            if isinstance(layer, Turned):
                output = layer(positions, *(state if len(state) == 2 else (None, state[0])))
            elif isinstance(layer, Halves | WithUnused | WithNone | SideChannel):
                output = layer(positions, *(state if len(state) == 2 else (state[0], None)))
            else:
                output = layer(positions, state[0])
            output = output if isinstance(output, tuple) else (output,)
            state = self.between(*output) if self.between else output
        if isinstance(self.layers[-1], Turned):
            return self.norm(state[1], state[0])[0]
        if isinstance(self.layers[-1], Halves) and len(state) == 2:
            return self.norm(*state)[0]
        return self.norm(state[0])


class Wrapper(nn.Module):
    """A vision-language model: the vision tower has as many blocks, and an image is not in every pass."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.vision = nn.ModuleList([Whole() for _ in range(LAYERS)])
        self.language_model = nn.ModuleDict({"model": decoder})

    def forward(self, ids: Tensor) -> Tensor:
        return self.language_model["model"](ids)


IDS = torch.arange(3, 3 + TOKENS)
PROVED = {
    "halves": (Halves, "halves"),
    "turned": (Turned, "halves"),
    "whole": (Whole, "whole"),
    "parallel": (Parallel, "whole"),
    "post-norm": (PostNorm, "whole"),
    "scaled contributions": (ScaledContributions, "whole"),
    "with an unused part": (WithUnused, "part 1 of a tuple"),
    "with None": (WithNone, "part 1 of a tuple"),
    "batched": (Batched, "whole"),
}


def proved(model: nn.Module, count: int = LAYERS) -> dict[int, str]:
    result = prove(model, count, HIDDEN, lambda: model(IDS))
    return {layer: form.name for layer, (_, form) in result.items()}


@pytest.mark.parametrize("name", PROVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_form_of_a_models_blocks_is_proved(name: str, dtype: torch.dtype) -> None:
    kind, form = PROVED[name]
    assert proved(Decoder([kind] * LAYERS).to(dtype)) == dict.fromkeys(range(LAYERS), form)


def massive(kind: type[Block], *, always: bool) -> type[Block]:
    """Blocks of a kind that write a massive activation, as trained models do: for streams of usual length, or always."""

    class Massive(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any) -> Any:
            output = super().forward(*args)
            first = output[0] if isinstance(output, tuple) else output
            usual = sum(part for part in args[1:] if part is not None).abs().amax(1) < 100
            first[:, 3] += 25_000 * (usual | torch.tensor(always))
            return output

    return Massive


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("name", ["halves", "whole", "with an unused part"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_deep_model_with_massive_activations_is_proved(name: str, dtype: torch.dtype, always: bool) -> None:
    kind, form = PROVED[name]
    model = Decoder([kind] * 3 + [massive(kind, always=always)] + [kind] * 20).to(dtype)
    assert set(proved(model, 24).values()) == {form}


@pytest.mark.parametrize("size", [1e-4, 0.01, 1.0, 100.0, 5000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stream_of_any_length_is_proved(size: float, dtype: torch.dtype) -> None:
    for kind in (Halves, Whole, PostNorm):
        model = Decoder([kind] * LAYERS)
        with torch.no_grad():
            model.embeddings.weight.mul_(size)
        assert len(proved(model.to(dtype))) == LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_massive_activation_hides_no_wrong_claim(dtype: torch.dtype) -> None:
    marked = massive(WithUnused, always=True)
    with pytest.raises(Refused, match="SideChannel at layer 2 depends on another part"):
        proved(Decoder([WithUnused, marked, SideChannel, SideChannel]).to(dtype))
    for last, reason in ((Scaled, "multiplies the stream by 0.5"), (Normalised, "is not in what it returns")):
        with pytest.raises(Refused, match=f"{last.__name__} .*layer 3 {reason}"):
            proved(Decoder([Whole, massive(Whole, always=True), Whole, last]).to(dtype))


@pytest.mark.parametrize("length", [0.25, 1.0, 4.0, 1000.0])
def test_a_norm_that_leaves_vectors_of_just_the_planted_length_is_caught(length: float) -> None:
    class NormedTo(Whole):
        def forward(self, positions: Tensor, hidden: Tensor) -> Any:
            return length * self.norm(super().forward(positions, hidden))

    with pytest.raises(Refused, match="is not in what it returns as the stream"):
        proved(Decoder([NormedTo] * LAYERS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stream_that_is_scaled_by_little_is_refused(dtype: torch.dtype) -> None:
    class Shrunk(Whole):
        def forward(self, positions: Tensor, hidden: Tensor) -> Any:
            return 0.98 * super().forward(positions, hidden)

    with pytest.raises(Refused, match="Shrunk at layer 2 multiplies the stream by 0.98"):
        proved(Decoder([Whole, Whole, Shrunk, Whole]).to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_real_model_whose_first_tokens_have_massive_activations_is_proved(dtype: torch.dtype) -> None:
    """As in the passes of vLLM's runners, each token is the first of its sequence."""
    model = AutoModelForCausalLM.from_pretrained(references.resolve("smollm2").path, dtype=dtype).eval()
    ids = torch.randint(1000, 40_000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    alone = torch.zeros(1, 1, TOKENS, TOKENS, dtype=dtype).masked_fill(~torch.eye(TOKENS, dtype=torch.bool), -10_000)

    def run() -> Tensor:
        output: Tensor = model.model(input_ids=ids, attention_mask=alone, use_cache=False).last_hidden_state
        return output

    result = prove(model, 30, 576, run)
    assert {form for _, form in result.values()} == {Form(None, batched=True)}
    passes = Passes(model, {layer: block for layer, (block, _) in result.items()}, run, 576)
    assert max(float(step.returned[0].abs().max()) for step in passes.base.steps.values()) > 20_000


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


def test_a_stream_that_transformers_scales_too_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "SCALED", {"Scaled"})
    assert set(proved(Decoder([Scaled] * LAYERS)).values()) == {"whole"}


def test_a_form_says_in_words_what_it_is() -> None:
    assert [Form(None).name, Form((0, 1)).name, Form((1,)).name] == ["whole", "halves", "part 2 of a tuple"]
