"""Small decoders of the forms that vLLM's models have: what blocks return, and what the next one takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steer.serving.engine.proving.proof import prove

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
