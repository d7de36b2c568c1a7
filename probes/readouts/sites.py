"""Activations at sites beyond the output of blocks, by the hooks of TransformerLens 4.3 (extra `lens`).

A site is a short name (`SITES`), `head:N`, or any hook of TransformerLens, whose number of the block is written
`{layer}`. Its activations are one row for each token; what further dimensions they have (heads) is put in a row.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from probes.capture.states import Receive, require_finite
from probes.models.loading import LoadedModel, OpenedModel
from probes.models.tokens import Tokens
from probes.readouts.rows import States
from vectors.documents.artifacts import RESIDUAL
from vectors.errors import ModelError, UsageError, guess
from vectors.events import Event, OnEvent, ignore

SITES = {
    RESIDUAL: "blocks.{layer}.hook_resid_post",
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "head": "blocks.{layer}.attn.hook_z",  # of all heads, [tokens, heads * size]
}
_HEAD = re.compile(r"head:(0|[1-9][0-9]{0,3})")


def require_site(site: str) -> None:
    """Refuse a site that is neither a known name nor the name of a hook. Raises UsageError."""
    if site in SITES or _HEAD.fullmatch(site):
        return
    if "." in site and re.fullmatch(r"[A-Za-z0-9_.{}]+", site):
        if site.count("{layer}") == 1 and site.replace("{layer}", "").count("{") == 0:
            return
        numbered = re.sub(r"blocks\.\d+", "blocks.{layer}", site, count=1)
        raise UsageError(
            f"the site {site!r} does not say where the layer stands",
            f"write {{layer}} in place of the block's number: --site '{numbered}', and choose it by --layers",
        )
    raise UsageError(
        f"there is no site {site!r}{guess(site, SITES)}",
        f"use {', '.join(SITES)}, head:N, or a hook such as 'blocks.{{layer}}.attn.hook_q'",
    )


def hook_name(site: str, layer: int) -> str:
    """The name of a site's hook in TransformerLens."""
    pattern = SITES["head"] if _HEAD.fullmatch(site) else SITES.get(site, site)
    return pattern.replace("{layer}", str(layer))


def bridge_of(loaded: LoadedModel | OpenedModel, device: torch.device, dtype: torch.dtype) -> Any:
    """The model as TransformerLens wraps it, with weights of its own. Raises ModelError, UsageError."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    require_lens()
    from transformer_lens.model_bridge import TransformerBridge

    was_enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about features that are not used here
            bridge = TransformerBridge.boot_transformers(
                str(loaded.source.path), device=device, dtype=dtype, tokenizer=loaded.tokenizer
            )
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"TransformerLens can't wrap the model {loaded.source}: {reason}",
            "use the site resid_post, which needs no TransformerLens",
        ) from error
    finally:
        if was_enabled:
            enable_progress_bar()
    return bridge.eval()


def require_lens() -> None:
    """Refuse a site beyond the output of blocks where TransformerLens is missing. Raises UsageError."""
    import importlib.util

    if importlib.util.find_spec("transformer_lens") is None:
        raise UsageError(
            "sites other than resid_post need TransformerLens, which is not installed",
            "pip install 'steer-workbench[lens]'",
        )


def site_states(bridge: Any, site: str, layers: Sequence[int]) -> States:
    """The activations of a site at `layers`, a text at a time. Raises ModelError for a site that the model lacks."""
    known = bridge.hook_dict
    missing = [name for layer in layers if (name := hook_name(site, layer)) not in known]
    if missing:
        # A model may lack a site in some of its blocks, such as attention where there is a recurrence.
        raise ModelError(
            f"the model has no hook {missing[0]}" + (f" and {len(missing) - 1} more of these" * (len(missing) > 1)),
            f"it has, for example, {', '.join(_similar(bridge, site, layers[0]))}",
        )

    def run(texts: Sequence[Tokens], wanted: Sequence[int], receive: Receive, on_event: OnEvent) -> None:
        for index, text in enumerate(texts):
            last = list(wanted).index(max(wanted))
            with receiving(bridge, [hook_name(site, layer) for layer in wanted], last) as seen:
                forward(bridge, text.ids)
            for position, states in enumerate(seen):
                rows = by_token(states, len(text.ids), hook_name(site, wanted[position]), head_of(site))
                require_finite(rows, text, wanted[position], index)
                receive(index, position, rows)
            on_event(Event("measuring activations", index + 1, len(texts), "texts"))

    sizes: list[int] = []
    probe = Tokens([1, 2, 3], [0])
    run([probe], layers, lambda _index, _position, rows: sizes.append(rows.shape[1]), ignore)
    if len(set(sizes)) > 1:
        raise ModelError(
            f"the site {site} has another size at each layer: {', '.join(map(str, sizes))}",
            "choose layers of one size: --layers",
        )
    return States(sizes[0], run)


def forward(bridge: Any, ids: Sequence[int]) -> None:
    """One forward pass of one sequence; what it computes is taken by hooks."""
    with torch.inference_mode(), contextlib.suppress(_LastSiteDone):
        bridge(torch.tensor([list(ids)], device=bridge.cfg.device), return_type=None)


class _LastSiteDone(Exception):
    """Raised by the hook of the last site, to skip the layers above it."""


@contextlib.contextmanager
def receiving(bridge: Any, names: Sequence[str], last: int | None = None) -> Iterator[list[Tensor]]:
    """A context in which a forward pass fills a list with what the hooks `names` see, in this order.

    `last` is the position of the hook that runs last, at which the pass ends; None for one that runs to its end.
    """
    seen: list[Any] = [None] * len(names)

    def taking(position: int) -> Any:
        def take(value: Tensor, hook: Any) -> None:
            seen[position] = value.detach()
            if position == last:
                raise _LastSiteDone

        return take

    with bridge.hooks(fwd_hooks=[(name, taking(i)) for i, name in enumerate(names)]):
        yield seen


def by_token(states: Any, tokens: int, name: str, head: int | None = None) -> Tensor:
    """What a hook saw as one row for each token, float32 [tokens, size]: of one `head`, or of all in a row.

    Raises ModelError where there is no row for each token; UsageError for a head that the model lacks.
    """
    found = states if isinstance(states, Tensor) else torch.empty(0)
    if found.ndim > 1 and found.shape[0] == 1:
        found = found[0]
    attention = name.endswith(("hook_pattern", "hook_attn_scores"))
    if attention or found.ndim < 2 or found.shape[0] != tokens or not found.is_floating_point():
        raise ModelError(
            f"{name} has shape {list(found.shape)}: it is not one row for each of {tokens} tokens",
            "choose a site with a row for each token; `steer probe saturation` reads attention patterns",
        )
    if head is not None:
        if found.ndim != 3 or head >= found.shape[1]:
            raise UsageError(f"there is no head {head}: {name} has {found.shape[1]}", "heads count from 0")
        found = found[:, head]
    return found.float().flatten(1)


def head_of(site: str) -> int | None:
    """The head that a site names, as `head:3` does; None for all."""
    match = _HEAD.fullmatch(site)
    return None if match is None else int(match[1])


def _similar(bridge: Any, site: str, layer: int) -> list[str]:
    block = f"blocks.{layer}."
    names = [name.replace(block, "blocks.{layer}.") for name in bridge.hook_dict if name.startswith(block)]
    import difflib

    return difflib.get_close_matches(SITES.get(site, site), names, 6, 0.0)
