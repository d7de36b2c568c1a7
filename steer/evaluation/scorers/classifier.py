"""A Hugging Face text classifier: the probability that it gives a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steer.evaluation.scorers._protocol import GeneratedText, Resources, Scored
from vectors.registry.options import option

SUMMARY = "share of responses to which a text classifier gives a label"
SOURCE = ""
UNIT = "share of texts"
GRADED = False
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The classifier, its label, and the probability from which a response has it."""

    model: str = option(help="A folder or hub id of a sequence classifier with safetensors weights.", complete="models")
    label: str = option("", help="The label, by name or number; by default the last one, where there are two.")
    threshold: float = option(0.5, help="The probability from which a response counts.", low=0.0, high=1.0)


def problems_of(settings: Settings) -> list[str]:
    """Why the classifier can't be read, or has no such label."""
    return _label(settings, _config(settings.model))[1]


def inputs_of(settings: Settings) -> dict[str, str]:
    """The digest of the classifier."""
    from vectors import references

    return {settings.model: str(references.identity(references.resolve(settings.model)).get("digest", ""))}


def score(settings: Settings, texts: Sequence[GeneratedText], resources: Resources) -> list[Scored]:
    """1 where the label's probability reaches the threshold; the probability is the evidence."""
    import torch

    from probes.models.loading import choose_device, memory_reported
    from vectors.events import Event

    device, _ = choose_device(resources.device)
    label, _ = _label(settings, _config(settings.model))
    key = "classifier", settings.model
    tokenizer, model = resources.kept.get(key) or _loaded(settings.model, device)
    resources.kept[key] = tokenizer, model
    longest = getattr(model.config, "max_position_embeddings", None)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index].response))
    scored: dict[int, Scored] = {}
    for start in range(0, len(order), BATCH):
        indices = order[start : start + BATCH]
        encoded = tokenizer(
            [texts[index].response for index in indices],
            return_tensors="pt", padding=True, truncation=longest is not None, max_length=longest,
        ).to(device)  # fmt: skip
        with memory_reported(), torch.inference_mode():
            logits = model(**encoded).logits.float().cpu()
        # One logit, or labels that do not exclude each other, are probabilities by themselves.
        single = logits.shape[1] == 1 or model.config.problem_type == "multi_label_classification"
        probabilities = (logits.sigmoid() if single else logits.softmax(-1))[:, label].tolist()
        for index, probability in zip(indices, probabilities, strict=True):
            has = probability >= settings.threshold
            scored[index] = Scored(float(has), int(has), {"probability": probability})
        resources.on_event(Event("classifying", len(scored), len(texts), "texts"))
    return [scored[index] for index in range(len(texts))]


def _loaded(reference: str, device: Any) -> tuple[Any, Any]:
    """The tokenizer and the model of a classifier."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from vectors import references

    path = references.resolve(reference).path
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    model.to(device).eval()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


def _config(reference: str) -> Any:
    """The configuration of a classifier. Raises ModelError."""
    from transformers import AutoConfig

    from vectors import references
    from vectors.errors import ModelError

    source = references.resolve(reference)
    if not references.weight_files(source.path):
        raise references.without_safetensors(reference, source.path)
    try:
        return AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"the classifier {reference} can't be read: {reason}", "it needs a config.json") from error


def _label(settings: Settings, config: Any) -> tuple[int, list[str]]:
    """The number of the label, and what is wrong with it."""
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    listed = ", ".join(list(names.values())[:20])
    if not any("SequenceClassification" in name for name in config.architectures or ()):
        return 0, [f"{settings.model} is not a sequence classifier: it is {', '.join(config.architectures or ['?'])}"]
    if settings.label == "":
        if len(names) > 2:
            return 0, [f"label is needed, since {settings.model} has {len(names)}: {listed}"]
        return max(names, default=0), []
    matching = [number for number, name in names.items() if name.casefold() == settings.label.casefold()]
    if not matching and settings.label.isdecimal():
        matching = [number for number in names if number == int(settings.label)]
    return (
        (matching[0], []) if matching else (0, [f"{settings.model} has no label {settings.label!r}; it has {listed}"])
    )
