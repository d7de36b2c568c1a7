"""Samples on the disk, and objectives against slow references."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pico
import pytest
import torch
from bakes import distilling

from probes.data.overlap import record
from probes.data.reading import read_class
from probes.models.completions import Completion
from probes.targets import divergence_from_target, soft_target
from steer.training.data.files import file_digest
from steer.training.data.samples import GENERAL, Sample, hard_targets, load_all, save_all
from steer.training.modes import distil
from steer.training.objectives import divergence, preference
from steer.training.objectives.protocol import ObjectiveSettings
from vectors.steering import SteeringVector


def samples() -> list[Sample]:
    made = hard_targets([Completion([5, 6], [7, 8]), Completion([5, 6, 7], [8, 9, 10, 11]), Completion([9], [4])])
    made[2] = made[2]._replace(target=soft_target(torch.randn(1, 20, generator=torch.Generator().manual_seed(2)), 6))
    return made


def test_each_sample_counts_the_same_however_long_or_padded() -> None:
    made = samples()
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(s.completion.length, 20, generator=generator) for s in made]
    batch = divergence.collate(made, 0)
    whole = torch.zeros(len(made), batch["input_ids"].shape[1], 20)
    for row, one in enumerate(logits):
        whole[row, : len(one)] = one
    alone = [
        float(divergence_from_target(one[s.completion.prompt_length - 1 : -1], *s.target).mean())
        for s, one in zip(made, logits, strict=True)
    ]
    flat = whole[:, batch["keep"]][batch["counts"]]
    found = divergence.by_sample(batch, flat)
    assert found.tolist() == pytest.approx(alone, abs=1e-5)
    assert float(divergence.loss(batch, flat, ObjectiveSettings())) == pytest.approx(sum(alone) / 3, abs=1e-5)


def test_the_preference_loss_is_equation_7() -> None:
    wanted, other = hard_targets([Completion([5, 6], [7, 8]), Completion([5, 6], [9])])
    pair = wanted._replace(likelihood=-4.0, other=other._replace(likelihood=-2.5))
    general = hard_targets([Completion([3], [4, 5])], kind=GENERAL)[0]
    batch = preference.collate([general, pair], 0)
    logits = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(5))

    def likelihood(row: int, sample: Sample) -> float:
        start, ids = sample.completion.prompt_length, sample.completion.completion_ids
        logs = logits[row, start - 1 : start + len(ids) - 1].double().log_softmax(-1)
        return float(logs.gather(1, torch.tensor(ids)[:, None]).sum())

    margin = (likelihood(0, wanted) + 4.0) - (likelihood(1, other) + 2.5)
    expected = float(torch.nn.functional.softplus(torch.tensor(-0.3 * margin)))
    expected = (expected - likelihood(2, general) / 2) / 2
    kept = logits[:, batch["keep"]][batch["counts"]]
    assert float(preference.loss(batch, kept, ObjectiveSettings(beta=0.3))) == pytest.approx(expected, abs=1e-5)


def test_samples_survive_the_disk(tmp_path: Path) -> None:
    made = samples()
    made[0] = made[0]._replace(other=made[1]._replace(likelihood=-3.0), likelihood=-1.5)
    made.append(hard_targets([Completion([1], [2, 3])], kind=GENERAL)[0])
    save_all(made, tmp_path / "samples.safetensors")
    for before, after in zip(made, load_all(tmp_path / "samples.safetensors"), strict=True):
        assert (before.completion, before.kind, before.likelihood) == (after.completion, after.kind, after.likelihood)
        assert before.digest == after.digest
        assert torch.equal(before.target.tokens, after.target.tokens)
        assert torch.equal(before.target.logs, after.target.logs)
        assert (before.other is None) == (after.other is None)
        if before.other is not None and after.other is not None:
            assert before.other.completion == after.other.completion
            assert after.other.likelihood == -3.0


@pytest.mark.filterwarnings("ignore:the prompts of 20 of the 25 examples")
def test_held_out_examples_that_made_the_vector_are_named(
    folder: Path, asked: Path, texts: tuple[Path, Path], held_out: tuple[Path, Path], tmp_path: Path
) -> None:
    digests = {"positive": file_digest(texts[0]), "negative": file_digest(texts[1])}
    vector = tmp_path / "warm.safetensors"
    SteeringVector({1: torch.ones(pico.HIDDEN)}, {"data": {"digests": digests}}).save(vector)
    request = distilling(vector, asked, folder, tmp_path / "out", pos=texts[0], neg=held_out[1])
    with pytest.warns(
        UserWarning, match=r"warm\.jsonl made the vector too: the trait's margin on them is not held out"
    ):
        distil.mode(request)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distil.mode(dataclasses.replace(request, pos=held_out[0]))


def test_copies_of_the_extraction_and_prompts_that_are_trained_on_are_named(
    folder: Path, texts: tuple[Path, Path], held_out: tuple[Path, Path], tmp_path: Path
) -> None:
    """A copy with other white space, in another order, has another file digest."""
    examples = read_class(texts[0], "--pos")[0]
    vector = tmp_path / "warm.safetensors"
    SteeringVector({1: torch.ones(pico.HIDDEN)}, {"data": record(examples)}).save(vector)
    copy = tmp_path / "copy.jsonl"
    others = [{"prompt": "another", "completion": "text"}]
    rows = [{"prompt": f"{e.context} ", "completion": f" {e.completion}"} for e in reversed(examples)]
    copy.write_text("\n".join(map(json.dumps, [*rows, *others])))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "another "}))
    request = distilling(vector, prompts, folder, tmp_path / "out", pos=copy, neg=held_out[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distil.mode(request)
    messages = [str(warning.message) for warning in caught]
    total = len(examples) + 1
    assert any(f"{len(examples)} of the {total} examples of {copy} made the vector too" in m for m in messages)
    assert any(f"the prompts of 1 of the {total} examples of {copy} are in --prompts" in m for m in messages)


@pytest.mark.filterwarnings("ignore:the prompts of 20 of the 25 examples")
def test_held_out_examples_on_which_a_sweep_chose_the_strength_are_named(
    folder: Path, asked: Path, held_out: tuple[Path, Path], tmp_path: Path
) -> None:
    examples = read_class(held_out[0], "--pos")[0]
    vector = tmp_path / "warm.safetensors"
    SteeringVector({1: torch.ones(pico.HIDDEN)}, {"chosen_on": record(examples[:3])}).save(vector)
    request = distilling(vector, asked, folder, tmp_path / "out", pos=held_out[0], neg=held_out[1])
    told = f"3 of the {len(examples)} examples of .* chose where and how strongly the vector acts, too: .* of the sweep"
    with pytest.warns(UserWarning, match=told):
        distil.mode(request)
