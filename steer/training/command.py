"""From the words of `steer bake` to a request and a mode; what the command and Python share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer.training.bake import Request, Tell, bake
from steer.training.data import files
from steer.training.loop import Settings
from steer.training.student import PRESETS, Lora
from vectors.errors import UsageError
from vectors.resolve import compose
from vectors.values import read_assignments


def run(
    composition: str | None, model: str, out: Path, mode: str, given: Mapping[str, Any], *, tell: Tell
) -> dict[str, Any]:
    """Distil or train as the options say; returns the report. Raises UsageError and what `bake` raises."""
    from steer.training.modes import contrast, distil, train

    request = request_of(composition, model, out, given)
    if mode == "distil":
        chosen = distil.mode(
            request, composition=composition, vectors=given["vectors"], teacher_prompt=given["teacher_prompt"],
            asked=given["prompts"], tokens=given["tokens"], temperature=given["temperature"],
            any_base=given["any_base"],
        )  # fmt: skip
    elif given["against"] is not None:
        return contrast.contrast(request, given["data"], given["against"], tell=tell)
    elif given["pairs"] is not None:
        chosen = train.prefer(request, given["pairs"])
    else:
        chosen = train.imitate(request, given["data"])
    return bake(request, chosen, tell=tell)


def request_of(composition: str | None, model: str, out: Path, given: Mapping[str, Any]) -> Request:
    """The options as a request. Raises UsageError for numbers that are none."""
    try:
        lr = None if given["lr"] == "auto" else float(given["lr"])
    except ValueError:
        raise UsageError(f"--lr is {given['lr']!r}, no number and not auto", "write --lr 3e-4") from None
    settings = Settings(
        steps=given["steps"], batch=given["batch"], accumulate=given["accumulate"], optimiser=given["optimiser"],
        options=read_assignments(given["given_options"]), lr=lr, weight_decay=given["weight_decay"],
        warmup=given["warmup"], schedule=given["schedule"], evaluate=given["evaluate_every"],
        patience=given["patience"], checkpointing=given["checkpointing"], seed=given["seed"],
        report_to=given["report_to"], sharded=given["fsdp"],
    )  # fmt: skip
    return Request(
        model, out, given["as_"], settings, _lora(composition, given), files.parse_mix(given["mix"]),
        given["compare_mix"], given["context"], given["pos"], given["neg"], given["device"], given["dtype"],
        given["threads"], {"tokens": given["tokens"], "temperature": given["temperature"]},
    )  # fmt: skip


def _lora(composition: str | None, given: Mapping[str, Any]) -> Lora | None:
    if given["full"]:
        return None
    lora = PRESETS[given["preset"]]
    own = {"rank": given["lora_rank"], "alpha": given["lora_alpha"]}
    lora = lora._replace(**{key: value for key, value in own.items() if value is not None})
    if given["lora_targets"]:
        lora = lora._replace(targets=tuple(part.strip() for part in given["lora_targets"].split(",")))
    if composition is not None:
        parsed, vectors = compose(composition, given["vectors"])
        # What is added at a layer can't be made by the layers above it; those below would have to guess it.
        layers = [i for t in parsed.terms for i in vectors[t.name].acting(t.layers)]
        lora = lora._replace(first=min(layers))
    return lora
