"""What an evaluation reads and checks before a model is loaded: all problems of all inputs at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from probes.data import overlap, prompts
from probes.data.reading import Contrast, read
from probes.models.loading import OpenedModel, choose_device, choose_dtype, open_model
from probes.models.markers import given_markers, require_sections
from probes.models.residual import text_part
from steer.evaluation.arms.controls import acting_layers
from steer.evaluation.arms.subjects import Subject, base_reference, problems_of_names, subjects_of
from steer.evaluation.exports import harness_vector
from steer.evaluation.planning import contrast_of
from steer.evaluation.request import CONTROL_NAMES, Request
from steer.evaluation.suites.copies import shown
from steer.evaluation.suites.items import Item, Suite, examples_of
from steer.evaluation.suites.reading import Sources, read_suite
from steer.evaluation.suites.sides import chosen
from steer.evaluation.text_scores import Requested, read_requested
from vectors import fit, references
from vectors.errors import (
    ArtifactError,
    ExampleError,
    SteerError,
    UsageError,
    collecting,
    guess,
    naming,
    raise_together,
)
from vectors.language.markers import markers_in
from vectors.probe import Probe
from vectors.registry.layers import spans
from vectors.steering import SteeringVector
from vectors.storage.folders import require_free_output

# What a vector records of examples, by the key of its metadata, and what became of these examples.
RECORDED = {
    "data": "are among the examples that {} was extracted from",
    "chosen_on": "are among the development items of the sweep that chose where and how strongly {} acts",
}
_ONE_LAYER = ", or restrict the expression to one layer, as in warm[12]"
NEUTRAL = 12  # built-in neutral prompts that are continued
ANSWERED = 10  # prompts that are answered where the suite has none


class Inputs(NamedTuple):
    """What was read: the suite and the items of both sides that count, the subjects, and what controls are made from.

    `overlap` are sentences about test items that a vector was extracted from or chosen on, which the request allows.
    """

    suite: Suite
    test: list[Item]
    dev: list[Item]
    subjects: list[Subject]
    reference: str
    neutral: list[str]
    prompts: list[str]
    donor: tuple[str, SteeringVector] | None
    shuffled_from: Contrast | None
    shuffled_source: str
    entangled: list[tuple[Suite, list[Item]]]
    overlap: list[str]
    requested: Requested


def read_inputs(request: Request) -> Inputs:
    """Read and check everything that a request names. Raises one error with all problems."""
    errors: list[SteerError] = []
    requested = read_requested(request, errors)
    if request.export and request.out is None:
        errors.append(UsageError("--export writes into the folder of --out, and there is none", "--out DIR"))
    suite, donor, extraction, reference = Suite("", ()), None, None, ""
    subjects: list[Subject] = []
    entangled: list[tuple[Suite, list[Item]]] = []
    with collecting(errors):
        markers_in(request.steer_markers)
    with collecting(errors):
        choose_device(request.device)
    with collecting(errors):
        choose_dtype(request.dtype, torch.device("cpu"))
    unknown = [name for name in request.control if name not in CONTROL_NAMES]
    if unknown:
        known = f"{', '.join(CONTROL_NAMES)}{guess(unknown[0], CONTROL_NAMES)}"
        errors.append(UsageError([f"there is no control {name!r}" for name in unknown], f"controls are {known}"))
    if request.prompt is not None and not request.prompt.strip():
        errors.append(UsageError("--prompt is empty", 'give a text: --prompt "Answer warmly."'))
    with collecting(errors):
        suite = read_suite(
            Sources(
                suite=request.suite, pos=request.pos, neg=request.neg, pairs=request.pairs, choices=request.choices,
                prompts=request.prompt_file, neutral=request.neutral,
            ),
            request.seed,
        )  # fmt: skip
    with collecting(errors):
        subjects = subjects_of(
            request.subjects, request.vectors, strength=request.strength, allow_strength=request.allow_strength,
            names=request.subject_names,
        )  # fmt: skip
        reference = request.model or base_reference(subjects)
    problems = problems_of_names(subjects, request.prompt)
    if problems:
        errors.append(UsageError(problems, "write it in another way: 1*NAME for a vector, ./NAME for a file or folder"))
    if "lm-eval" in request.export:
        reasons = [reason for subject in subjects for reason in harness_vector.problems_of(subject.arm)]
        if reasons:
            errors.append(
                UsageError(
                    reasons,
                    f"leave out --export lm-eval{_ONE_LAYER * all('acts at layers' in each for each in reasons)}",
                )
            )
    if request.donor is not None:
        with collecting(errors):
            donor = (request.donor.stem, SteeringVector.load(request.donor))
    if any((request.extraction_pos, request.extraction_neg, request.extraction_pairs)):
        with collecting(errors), naming(_of_extraction):
            extraction = read(request.extraction_pos, request.extraction_neg, request.extraction_pairs)
    for path in request.entangled:
        with collecting(errors):
            other = read_suite(Sources(suite=path), request.seed)
            _require_test_items(other, f"the suite {path}: ")
            entangled.append((other, chosen(other.of("test"), request.items, request.seed)))
    if request.out is not None:
        with collecting(errors):
            require_free_output(request.out)
    test = chosen(suite.of("test"), request.items, request.seed)
    dev = chosen(suite.of("dev"), max(1, request.items // 2), request.seed)
    with collecting(errors):
        _require_test_items(suite)
    if donor is not None:
        errors += _problems_of_donor(donor, subjects)
    found = [sentence for subject in subjects for sentence in overlaps(subject, test)]
    if found and not request.allow_overlap:
        errors.append(
            ExampleError(
                found,
                "give items that nothing was extracted from or chosen on (with a sweep's own --seed its development "
                "items stay out of the test); --allow-overlap measures them anyway",
            )
        )
    raise_together(errors)
    source = "the examples of the extraction" if extraction is not None else "the development items"
    neutral = [prompt.text for prompt in suite.neutral] or prompts.held_out()[:NEUTRAL]
    answered = [prompt.text for prompt in suite.prompts] or neutral[:ANSWERED]
    return Inputs(
        suite, test, dev, subjects, reference, neutral, answered, donor, extraction or contrast_of(suite.of("dev")),
        source, entangled, found, requested,
    )  # fmt: skip


def open_fitting(inputs: Inputs, any_base: bool, markers: Mapping[str, Sequence[str]] | None = None) -> OpenedModel:
    """The base without its weights, which every vector fits, and whose markers, or those given, tell every section.

    Raises ModelError, ArtifactError and UsageError with all problems.
    """
    opened = open_model(inputs.reference)
    text = text_part(opened.config)
    vectors: list[tuple[str, SteeringVector | Probe]] = [
        pair for each in inputs.subjects for pair in (*each.arm.vectors.items(), *each.arm.probes.items())
    ]
    if inputs.donor is not None:
        vectors.append(inputs.donor)
    compositions = [each.arm.composition for each in inputs.subjects if each.arm.composition is not None]
    errors: list[SteerError] = []
    with collecting(errors):
        fit.require_fit(
            vectors, hidden_size=int(text.hidden_size), layers=int(text.num_hidden_layers),
            base=references.identified(opened.source, opened.identity), any_base=any_base,
        )  # fmt: skip
    with collecting(errors):
        conditions = [condition for each in compositions for condition in each.conditions]
        require_sections(conditions, given_markers(opened.tokenizer, markers))
    raise_together(errors)
    return opened


def overlaps(subject: Subject, items: Sequence[Item]) -> list[str]:
    """A sentence for each vector of a subject that was extracted from some of these items, as far as it records, and
    for each whose layers and strength a sweep chose on some of them."""
    sentences = []
    for name, vector in subject.arm.vectors.items():
        for key, became in RECORDED.items():
            data = vector.metadata.get(key)
            seen = [item for item in items if overlap.recorded_examples(data, examples_of(item))]
            if seen:
                sentences.append(
                    f"{len(seen)} of the {len(items)} test items {became.format(name)} (the first: {shown(seen[0])!r})"
                )
    return sentences


def _require_test_items(suite: Suite, prefix: str = "") -> None:
    if suite.items and not suite.of("test"):
        problem = f"{prefix}all items are for development, so there is none for the test"
        raise ExampleError(problem, "; ".join(["give more items, or --seed", *suite.notes]))


def _of_extraction(text: str) -> str:
    """A sentence about the options of examples as one about those of the extraction."""
    return re.sub(r"--(pos|neg|pairs)\b", r"--extraction-\1", text)


def _problems_of_donor(donor: tuple[str, SteeringVector], subjects: Sequence[Subject]) -> list[SteerError]:
    errors: list[SteerError] = []
    for subject in subjects:
        missing = [layer for layer in acting_layers(subject.arm) if layer not in donor[1].layers]
        if missing:
            problem = f"the donor {donor[0]} holds no layer {spans(missing)}, at which {subject.name} acts"
            errors.append(ArtifactError(problem, f"it holds {spans(donor[1].layers)}; extract it at all layers"))
    return errors
