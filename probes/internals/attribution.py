"""Which components carry a steering vector's effect: an exact sum over what each adds to the residual stream.

A block adds the output of its attention and that of its MLP to the stream. So the change of the stream at a layer,
steered against not, is the vector itself plus the changes of these outputs up to there, and so is its component along
any direction (direct attribution: Elhage et al. 2021, "A mathematical framework for transformer circuits").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.models.tokens import Tokens
from probes.readouts.sites import by_token, forward, receiving
from vectors.errors import ModelError, UsageError
from vectors.events import Event, OnEvent, ignore
from vectors.steering import SteeringVector

EXACT = 1e-3  # of the whole effect that components may leave unexplained, by rounding

# The hooks at which a block mixes tokens, of which it has one.
MIXERS = {
    "hook_attn_out": "attention", "linear_attn.hook_out": "linear attention", "conv.hook_out": "convolution",
}  # fmt: skip


class Component(NamedTuple):
    """A component's part: its name, such as `attention 5`, `head 5.3`, `MLP 7` or `vector 4`, and its contribution."""

    name: str
    layer: int
    contribution: float


class Attribution(NamedTuple):
    """The effect of a vector at a layer and its parts, which add up to it; `total` is its mean over tokens."""

    layer: int
    total: float
    components: list[Component]


def require_acting(vector: SteeringVector, layer: int) -> list[int]:
    """The layers up to `layer` where a vector acts. Raises UsageError where there are none."""
    acting = [i for i in vector.apply if i <= layer]
    if not acting:
        raise UsageError(
            f"the vector acts at layers {sorted(vector.apply)}, all above layer {layer} whose stream is read",
            "choose a higher --layer",
        )
    return acting


def attribute(
    bridge: Any,
    texts: Sequence[Tokens],
    vector: SteeringVector,
    strength: float,
    layer: int,
    weight: Tensor | None = None,
    *,
    heads: bool = False,
    on_event: OnEvent = ignore,
) -> Attribution:
    """The parts of a vector's effect on the stream after block `layer`, means over the tokens that count.

    Along `weight` [hidden], such as a probe's; by default along the whole effect itself, of which the total is the
    length. `bridge` is the model in TransformerLens. With `heads`, attention is split into its heads. Raises ModelError
    where the components do not add up, UsageError for a vector that acts nowhere up to the layer.
    """
    acting = require_acting(vector, layer)
    first = min(acting)
    names = {f"blocks.{layer}.hook_resid_post": "total"}
    known = bridge.hook_dict
    for i in range(first + 1, layer + 1):
        mixers = {f"blocks.{i}.{hook}": f"{kind} {i}" for hook, kind in MIXERS.items()}
        names |= dict(next(([each] for each in mixers.items() if each[0] in known), []))
        names |= {f"blocks.{i}.hook_mlp_out": f"MLP {i}"}
        if heads and f"blocks.{i}.attn.hook_z" in known:
            names[f"blocks.{i}.attn.hook_z"] = f"heads {i}"
    sums: dict[str, Tensor] = {}
    count = 0
    steering = [(f"blocks.{i}.hook_resid_post", _adding(strength * vector.layers[i])) for i in acting]
    for done, text in enumerate(texts, 1):
        runs = []
        for hooks in ([], steering):
            with bridge.hooks(fwd_hooks=hooks), receiving(bridge, list(names)) as seen:
                forward(bridge, text.ids)
            runs.append([by_token(each, len(text.ids), name).double() for each, name in zip(seen, names, strict=True)])
        for label, plain, turned in zip(names.values(), *runs, strict=True):
            change = (turned - plain)[text.counted].sum(0).cpu()
            sums[label] = sums.get(label, torch.zeros_like(change)) + change
        count += len(text.counted)
        on_event(Event("measuring components", done, len(texts), "texts"))
    return _parts(bridge, sums, count, vector, strength, acting, layer, weight, heads)


def _adding(direction: Tensor) -> Any:
    return lambda states, hook: states + direction.to(states.device, states.dtype)


def _parts(
    bridge: Any,
    sums: dict[str, Tensor],
    count: int,
    vector: SteeringVector,
    strength: float,
    acting: Sequence[int],
    layer: int,
    weight: Tensor | None,
    heads: bool,
) -> Attribution:
    means = {label: each / count for label, each in sums.items()}
    effect = means.pop("total")
    along = effect / effect.norm().clamp_min(1e-300) if weight is None else weight.double()
    total = float(effect @ along)
    components = [Component(f"vector {i}", i, float(strength * vector.layers[i].double() @ along)) for i in acting]
    for label, change in means.items():
        kind, _, number = label.rpartition(" ")
        if kind != "heads":
            split = heads and kind == "attention" and f"heads {number}" in means
            if not split:
                components.append(Component(label, int(number), float(change @ along)))
            continue
        parts = _of_heads(bridge, int(number), change)
        whole = means.get(f"attention {number}")
        if whole is not None and float((parts.sum(0) - whole).norm()) > EXACT * float(whole.norm().clamp_min(1e-300)):
            raise ModelError(
                f"the heads of layer {number} do not add up to the output of attention: a norm may follow",
                "leave out --heads",
            )
        components += [
            Component(f"head {number}.{h}", int(number), float(part @ along)) for h, part in enumerate(parts)
        ]
    rest = total - sum(each.contribution for each in components)
    scale = max(abs(total), max(abs(each.contribution) for each in components))
    if abs(rest) > EXACT * scale:
        raise ModelError(
            f"{rest:.3g} of {total:.3g} are left unexplained: a block adds more than attention and MLP",
            "this architecture can't be split into them",
        )
    return Attribution(layer, total, sorted(components, key=lambda each: (-abs(each.contribution), each.name)))


def _of_heads(bridge: Any, layer: int, change: Tensor) -> Tensor:
    """What each head adds to the stream, float64 [heads, hidden], from the change of all heads' values in a row."""
    try:
        output = bridge.blocks[layer].attn.W_O.detach().double().cpu()  # [heads, size of a head, hidden]
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ModelError(
            f"the heads of layer {layer} have no output weights that are known", "leave out --heads"
        ) from error
    return torch.einsum("hd,hdm->hm", change.view(output.shape[0], output.shape[1]), output)
