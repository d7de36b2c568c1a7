"""What works with a model: extraction, try, serving, folding and training, each with the reason."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merges.inputs.decoder import text_settings
from steer.doctor.installation import version
from vectors import architectures
from vectors.documents import json_text
from vectors.errors import ModelError

YES, IN_PART, PROOF, NO = "yes", "in part", "if proved", "no"


def of(reference: str, folder: Path, vllm: Mapping[str, Any] | None) -> dict[str, dict[str, str]]:
    """For extract, try, serve, fold and train: `answer` ("yes", "in part", "if proved" or "no") and `reason`.

    The weights are not loaded: only headers and the configuration are read. What is proved from a loaded model alone is
    "if proved". `vllm` is what `serving.state` says of vLLM.
    """
    config = json_text.read(folder / "config.json", ModelError, "fetch the model again")
    kind = str(text_settings(config).get("model_type"))
    reads = _residual_stream(kind)
    return {
        "extract": reads,
        "try": reads,
        "serve": _serve(config, vllm),
        "fold": _fold(reference),
        "train": _train(kind, reads),
    }


def _answer(answer: str, reason: str) -> dict[str, str]:
    return {"answer": answer, "reason": reason}


def _residual_stream(kind: str) -> dict[str, str]:
    known = architectures.find(kind)
    if known is None:
        reason = f"{kind} has no row in the table of architectures: a pass must prove that its blocks return the stream"
        return _answer(PROOF, reason)
    how = "what examples share is computed once" if known.packs else "in padded batches, since not only attention mixes"
    return _answer(YES, f"{kind} is in the table of architectures; {how}")


def _serve(config: Mapping[str, Any], vllm: Mapping[str, Any] | None) -> dict[str, str]:
    if vllm is None:
        return _answer(NO, "vLLM is not installed")
    if not vllm["supported"]:
        return _answer(NO, f"vLLM {vllm['version']} is not supported")
    named = list(config.get("architectures") or [])
    proof = "at the start, a pass must prove where its blocks hold the residual stream"
    if generating_architectures() & set(named):
        return _answer(PROOF, f"vLLM has it; {proof}")
    if any(_runs_through_transformers(name) for name in named):
        return _answer(PROOF, f"vLLM has no code of its own for it, and runs it through transformers' modules; {proof}")
    return _answer(NO, f"vLLM {vllm['version']} has no {' or '.join(named) or 'architecture of this name'}")


def _runs_through_transformers(architecture: str) -> bool:
    """Whether vLLM runs a model for which it has no code of its own: transformers' class must take its attention."""
    import transformers

    try:
        return bool(getattr(transformers, architecture).is_backend_compatible())
    except (AttributeError, ImportError, RuntimeError):  # no such class, or one that lacks a package
        return False


def generating_architectures() -> set[str]:
    """The architectures of models that generate, in the installed vLLM: read from its source, which takes no import."""
    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:
        return set()
    file = Path(package.origin).parent / "model_executor" / "models" / "registry.py"
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        wanted = isinstance(target, ast.Name) and target.id in ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")
        value = getattr(node, "value", None)
        if wanted and isinstance(value, ast.Dict):
            names |= {str(key.value) for key in value.keys if isinstance(key, ast.Constant)}
    return names


def _fold(reference: str) -> dict[str, str]:
    import torch

    from merges.engine.pool import Pool
    from merges.inputs.sources import open_source
    from steer.folding import ablation, injections
    from steer.folding.architectures import checkpoint
    from steer.folding.effects import Effects
    from steer.folding.pending import pending_from

    with Pool(1) as pool:
        pending = pending_from(open_source(reference), pool)
        known = checkpoint(pending.config, pending.jobs)
        if isinstance(known, str):
            return _answer(NO, known)
        refusals = {name: way.refusal(pending, known) for name, way in injections.available().items()}
    unit = torch.zeros(1, int(text_settings(pending.config).get("hidden_size") or 1), dtype=torch.float64)
    whole, half = (
        ablation.refusal(Effects({}, unit, torch.tensor([strength], dtype=torch.float64), (0,)), known)
        for strength in (1.0, 0.5)
    )
    ways = [name for name, reason in refusals.items() if reason is None]
    additions = (
        f"additions via {', '.join(ways)}"
        if ways
        else "no additions: " + "; ".join(f"not via {name}, since {reason}" for name, reason in refusals.items())
    )
    if whole is not None:
        ablations = f"no ablations: {whole}"
    else:
        ablations = "ablations" if half is None else "ablations of strength 1"
    answer = NO if not ways and whole is not None else YES if ways and whole is None else IN_PART
    return _answer(answer, f"{additions}; {ablations}")


def _train(kind: str, reads: Mapping[str, str]) -> dict[str, str]:
    how = "all weights or LoRA" if version("peft") else "all weights; LoRA needs the extra train"
    known = architectures.find(kind)
    if known is not None and known.without_lora:
        how += f" (no adapter for {', '.join(known.without_lora)})"
    return _answer(reads["answer"], f"{how}; --mode distil learns from the hooked model, as steer try runs it")
