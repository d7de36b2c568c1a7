"""Extraction: from two lists of texts to a judged vector whose bytes follow from its inputs."""

from __future__ import annotations

import getpass
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from probes.capture import spill
from probes.capture.activations import activations
from probes.data.overlap import recorded_examples
from probes.data.reading import Contrast, read
from probes.directions import extraction
from probes.directions.extraction import FEW, Extraction, extract
from probes.directions.methods import methods
from probes.directions.plan import layers_of, plan
from probes.models import loading as loading
from probes.models import residual
from probes.models.loading import LoadedModel
from vectors.errors import ExampleError, ModelError, UsageError
from vectors.events import Event
from vectors.steering import SteeringVector

LAYERS, HIDDEN = 4, 32
PROMPT = "Tell me about the weather."


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> LoadedModel:
    return loading.load(str(model_folder), "cpu", "float32")


def texts(letters: str, count: int, seed: int) -> list[str]:
    """Texts of three words each, of these letters."""
    source = random.Random(seed)
    return [" ".join("".join(source.choices(letters, k=5)) for _ in range(3)) for _ in range(count)]


def contrasting(count: int = 24, other: int | None = None, *, form: str = "text") -> Contrast:
    """Texts that differ in some of their letters, as plain texts, after one prompt, or after prompts of their own."""
    positive, negative = texts("abcdeklm", count, 1), texts("vwxyzklm", other or count, 2)
    if form == "pairs":
        lines = zip(positive, negative, strict=True)
        return read(pairs=[{"prompt": f"{PROMPT} {i}", "positive": p, "negative": n} for i, (p, n) in enumerate(lines)])
    if form == "completion":
        one, two = ([{"prompt": PROMPT, "completion": text} for text in side] for side in (positive, negative))
        return read(one, two)
    return read(positive, negative)


def alike(count: int) -> Contrast:
    """Two classes that nothing tells apart."""
    return read(texts("abcdevwxyzklm", count, 3), texts("abcdevwxyzklm", count, 4))


def report(extraction: Extraction) -> dict[str, Any]:
    """The report as it comes out of strict JSON."""
    found: dict[str, Any] = json.loads(json.dumps(extraction.report(), allow_nan=False))
    return found


# Layers


@pytest.mark.parametrize("text", ["4", "0-4", "2,99", "0-1000"])
def test_a_layer_out_of_range_is_an_error_that_tells_the_range(text: str) -> None:
    with pytest.raises(ModelError, match="is out of range: the model has layers 0 to 3"):
        layers_of(text, LAYERS)


@pytest.mark.parametrize("text", ["all", " all ", "0-3"])
def test_all_layers_are_those_of_the_model(text: str) -> None:
    assert layers_of(text, LAYERS) == [0, 1, 2, 3]


def test_the_configuration_tells_how_many_blocks_there_are(model: Any) -> None:
    assert residual.text_config(model).num_hidden_layers == len(residual.blocks(model))


# The vector


@pytest.mark.parametrize("form", ["text", "completion", "pairs"])
@pytest.mark.parametrize("method", methods())
def test_what_tells_the_texts_apart_is_found_at_every_layer(loaded: LoadedModel, method: str, form: str) -> None:
    found = extract(loaded, contrasting(form=form), method=method)
    assert [*found.vector.layers] == [*found.validated] == [0, 1, 2, 3]
    assert found.vector.hidden_size == HIDDEN
    if method == "pca":  # the first component may be another one than that of the classes
        return
    assert min(each.auroc for each in found.validated.values()) > 0.9
    assert all(each.auroc_low <= each.auroc <= each.auroc_high for each in found.validated.values())
    assert all(each.auroc_shuffled < 0.75 for each in found.validated.values())
    assert "hardly" not in found.recommended.reason


def test_the_difference_of_means_is_that_of_the_activations(loaded: LoadedModel) -> None:
    contrast = contrasting(6)
    found = extract(loaded, contrast)
    sides = []
    for examples in (contrast.positive, contrast.negative):
        rows = []
        for example in examples:
            ids = loaded.tokenizer(example.completion, return_tensors="pt")
            with torch.no_grad():
                states = loaded.model(**ids, output_hidden_states=True).hidden_states
            rows.append(torch.stack([state[0, 1:].mean(0) for state in states[1:LAYERS]]))  # all but <|bos|>
        sides.append(torch.stack(rows).double().mean(0))
    for layer, expected in enumerate(sides[0] - sides[1]):  # the last hidden state is normed, so not asked
        torch.testing.assert_close(found.vector.layers[layer], expected.float(), rtol=1e-4, atol=1e-5)


def test_classes_that_nothing_tells_apart_are_said_to_be_hardly_above_shuffled_ones(loaded: LoadedModel) -> None:
    found = extract(loaded, alike(30), layers="2")
    assert found.validated[2].auroc < 0.75
    assert "hardly above shuffled labels" in found.recommended.reason


@pytest.mark.parametrize("count", [3, 12])
def test_pairs_after_one_prompt_are_judged_as_pairs(
    loaded: LoadedModel, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    validating = extraction.validate

    def watched(*args: Any, paired: bool, **options: Any) -> Any:
        seen.append(paired)
        return validating(*args, paired=paired, **options)

    monkeypatch.setattr(extraction, "validate", watched)
    positive, negative = texts("abcdeklm", count, 1), texts("vwxyzklm", count, 2)
    lines = [{"prompt": PROMPT, "positive": p, "negative": n} for p, n in zip(positive, negative, strict=True)]
    extract(loaded, read(pairs=lines), method="pca", layers="1")
    assert seen == [True]


def test_fewer_layers_give_the_same_vector_there(loaded: LoadedModel) -> None:
    every, some = extract(loaded, contrasting(10)), extract(loaded, contrasting(10), layers="1-2")
    assert [*some.vector.layers] == [1, 2]
    for layer in (1, 2):
        assert torch.equal(some.vector.layers[layer], every.vector.layers[layer])
        assert some.validated[layer] == every.validated[layer]


@pytest.mark.parametrize("method", methods())
def test_activations_on_disk_give_the_same_bytes_as_in_memory(
    loaded: LoadedModel, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = extract(loaded, contrasting(8, 11), method=method).vector.encode()
    monkeypatch.setattr(spill, "MEMORY", 0)
    assert extract(loaded, contrasting(8, 11), method=method).vector.encode() == in_memory


@pytest.mark.parametrize("which", ["last", "all", "0", "-1"])
def test_other_tokens_give_another_vector_and_are_recorded(loaded: LoadedModel, which: str) -> None:
    default = extract(loaded, contrasting(8, form="completion"))
    found = extract(loaded, contrasting(8, form="completion"), which=which)
    assert found.vector.digest != default.vector.digest
    assert str(found.vector.metadata["method"]["parameters"]["tokens"]) == which
    assert found.tokens["positive"] == 8 if which != "all" else found.tokens["positive"] > default.tokens["positive"]


# Judgement of few examples


def test_groups_of_examples_count_once_in_the_interval(loaded: LoadedModel) -> None:
    """Four groups of which every layer is sure: no interval of them is narrower than that of four examples."""
    contrast = contrasting(12)
    grouped = [
        [example._replace(group=f"{name}{i % 4}") for i, example in enumerate(examples)]
        for name, examples in (("p", contrast.positive), ("n", contrast.negative))
    ]
    found = extract(loaded, contrast._replace(positive=grouped[0], negative=grouped[1]), layers="2").validated[2]
    assert found.auroc_low <= 0.025 ** (1 / 4) + 1e-9
    assert extract(loaded, contrasting(12), layers="2").validated[2].auroc_low > found.auroc_low


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("counts", [(1, 1), (1, 5), (5, 1)], ids=str)
def test_one_example_of_a_class_works_without_a_judgement(
    loaded: LoadedModel, method: str, counts: tuple[int, int], tmp_path: Path
) -> None:
    found = extract(loaded, contrasting(*counts), method=method)
    assert all(math.isnan(value) for each in found.validated.values() for value in each)
    assert found.recommended.layers == [1]
    assert "can't be judged" in found.recommended.reason
    assert {layer["auroc"] for layer in report(found)["layers"]} == {None}
    found.vector.save(tmp_path / "one.safetensors")
    assert SteeringVector.load(tmp_path / "one.safetensors").metadata["measured"]["0"]["auroc_low"] is None


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("form", ["text", "pairs"])
def test_two_examples_of_a_class_are_judged(loaded: LoadedModel, method: str, form: str) -> None:
    found = extract(loaded, contrasting(2, form=form), method=method)
    assert all(0 <= each.auroc <= 1 for each in found.validated.values())
    report(found)


@pytest.mark.parametrize(("counts", "warned"), [((FEW - 1, 20), True), ((20, FEW - 1), True), ((FEW, FEW), False)])
def test_few_examples_are_warned_of(loaded: LoadedModel, counts: tuple[int, int], warned: bool) -> None:
    warnings = extract(loaded, contrasting(*counts), layers="0").warnings
    assert any("the interval is meaningless" in warning for warning in warnings) == warned


def test_examples_in_both_classes_are_warned_of(loaded: LoadedModel) -> None:
    shared = [*texts("abc", 8, 1), "the same"]
    found = extract(loaded, read(shared, [*texts("xyz", 8, 1), "the same"]), layers="0")
    assert "stand in both classes" in found.warnings[0]


# Artifact and report


def test_the_same_inputs_give_the_same_bytes_wherever_they_lie(
    loaded: LoadedModel, model_folder: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(model_folder, tmp_path / "elsewhere")
    files = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name, side in (("pos", texts("abcde", 9, 1)), ("neg", texts("vwxyz", 9, 1))):
            (tmp_path / folder / f"{name}-{folder}").write_text("\n".join(map(json.dumps, side)))
            files.append(tmp_path / folder / f"{name}-{folder}")
    first = extract(loaded, read(files[0], files[1])).vector
    torch.rand(5)  # the global generator has no part in it
    second = extract(loading.load(str(moved), "cpu", "float32"), read(files[2], files[3])).vector
    assert first.encode() == second.encode()
    assert first.save(tmp_path / "a.safetensors") == second.save(tmp_path / "b.safetensors") == first.digest


def test_the_artifact_holds_no_time_no_path_and_no_user(loaded: LoadedModel, tmp_path: Path) -> None:
    source = tmp_path / "secret-place.jsonl"
    source.write_text("\n".join(map(json.dumps, texts("abcde", 9, 1))))
    vector = extract(loaded, read(source, texts("vwxyz", 9, 1))).vector
    content = vector.encode()
    for hidden in (tmp_path.name, "secret-place", "/tmp", "jsonl", str(loaded.source.path)):
        assert hidden.encode() not in content
    keys = json.dumps(vector.metadata)
    assert "second" not in keys
    assert "time" not in keys
    values = json.dumps(vector.metadata["data"]) + json.dumps(vector.metadata["base"])
    assert f'"{getpass.getuser()}"' not in values


def test_the_metadata_says_what_was_done_to_what(loaded: LoadedModel) -> None:
    contrast = contrasting(10, 8)
    found = extract(loaded, contrast, method="whitened", layers="3,1-2", seed=5)
    metadata = found.vector.metadata
    assert metadata["base"] == loaded.identity
    assert metadata["method"] == {
        "name": "whitened",
        "parameters": {
            "tokens": "completion",
            "layers": "1-3",
            "seed": 5,
            "truncate": False,
            "device": "cpu",
            "dtype": "float32",
        },
    }
    assert metadata["data"]["digests"] == contrast.digests
    assert recorded_examples(metadata["data"], contrast.positive) == contrast.positive
    assert metadata["data"]["examples"] == {"positive": 10, "negative": 8}
    assert metadata["apply"] == found.recommended.layers == metadata["recommended"]["layers"]
    assert found.vector.apply == tuple(found.recommended.layers)
    assert [*metadata["measured"]] == ["1", "2", "3"]


def test_the_mean_projection_of_both_classes_is_recorded_in_units_of_strength(loaded: LoadedModel) -> None:
    contrast = contrasting(10, 8)
    vector = extract(loaded, contrast, layers="1-2").vector
    for position, layer in enumerate((1, 2)):
        tokenised = plan(
            contrast, loaded.tokenizer, loaded.model.config, layers="1-2", which="completion", truncate=False
        )[1]
        with activations(loaded.model, tokenised, [1, 2]).spill as spill:
            rows = spill.layer(position).rows(0, 18).double()
        mean = (rows[:10].mean(0) + rows[10:].mean(0)) / 2
        direction = vector.layers[layer].double()
        assert vector.mean_at(layer) == pytest.approx(float(mean @ direction / (direction @ direction)), abs=1e-3)
    assert vector.mean_at(0) is None
    assert (2 * vector).mean_at(1) is None  # what it is computed from records it


def test_layers_by_other_words_give_the_same_bytes_and_what_decides_on_them_is_recorded(
    loaded: LoadedModel, model_folder: Path
) -> None:
    one = extract(loaded, contrasting(6), layers="all").vector
    assert extract(loaded, contrasting(6), layers="0-1, 2,3").vector.encode() == one.encode()
    cut = extract(loaded, contrasting(6), truncate=True).vector.metadata["method"]["parameters"]
    assert cut["truncate"] is True
    half = extract(loading.load(model_folder, "cpu", "bfloat16"), contrasting(6)).vector
    assert half.metadata["method"]["parameters"]["dtype"] == "bfloat16"


def test_other_seeds_change_the_judgement_and_not_the_direction(loaded: LoadedModel) -> None:
    one, two = (extract(loaded, alike(12), layers="0", seed=seed) for seed in (0, 1))
    assert torch.equal(one.vector.layers[0], two.vector.layers[0])
    assert one.validated != two.validated


@pytest.mark.parametrize("method", methods())
def test_the_report_is_strict_json(loaded: LoadedModel, method: str) -> None:
    found = extract(loaded, contrasting(9, 7), method=method, layers="1,3")
    told = report(found)
    assert told["method"] == method
    assert [each["layer"] for each in told["layers"]] == [1, 3]
    keys = {"layer", "norm", "auroc", "auroc_low", "auroc_high", "auroc_shuffled", "cohens_d"}
    assert all(keys <= each.keys() for each in told["layers"])
    assert [each["norm"] for each in told["layers"]] == pytest.approx([*found.vector.norm().values()])
    assert told["recommended"].keys() == {"layers", "strength", "reason", "proven"}
    assert found.vector.metadata["recommended"].keys() == {"layers", "strength", "reason"}
    assert told["examples"] == {"positive": 9, "negative": 7}
    counted = (len(loaded.tokenizer(text)["input_ids"]) - 1 for text in texts("abcdeklm", 9, 1))  # all but <|bos|>
    assert told["tokens"]["positive"] == sum(counted)
    assert told["tokens"]["computed"] > 0
    assert told["seconds"] > 0
    assert told["warnings"]


def test_progress_ends_with_every_example(loaded: LoadedModel) -> None:
    events: list[Event] = []
    extract(loaded, contrasting(9), layers="0", on_event=events.append)
    seen = [(event.done or 0, event.total) for event in events if event.stage == "measuring activations"]
    assert seen == sorted(seen)
    assert seen[-1] == (18, 18)
    assert events[-1].stage == "validating directions on held-out folds"


def test_how_prompts_were_taken_is_noted(loaded: LoadedModel) -> None:
    assert extract(loaded, contrasting(3), layers="0").notes == ()
    (note,) = extract(loaded, contrasting(3, form="completion"), layers="0").notes
    assert note == "prompts are asked in the model's chat template"


# What can't be done


def test_wrong_options_are_found_before_the_model_runs(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("probes.directions.extraction.activations", run)
    contrast = contrasting(3)
    with pytest.raises(UsageError, match="no extraction method 'mean'"):
        extract(loaded, contrast, method="mean")
    with pytest.raises(UsageError, match="no tokens 'middle'"):
        extract(loaded, contrast, which="middle")
    with pytest.raises(ModelError, match="layer 9 is out of range"):
        extract(loaded, contrast, layers="9")
    with pytest.raises(ExampleError, match="has no token 400"):
        extract(loaded, contrast, which="400")


def test_running_out_of_memory_is_no_defect_of_ours(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_args: Any, **_options: Any) -> None:
        torch.empty(2**58)

    monkeypatch.setattr("probes.directions.extraction.activations", greedy)
    with pytest.raises(ModelError, match="out of memory") as caught:
        extract(loaded, contrasting(3))
    assert "--dtype" in caught.value.hint


def test_an_example_beyond_the_context_is_an_error_unless_truncated(loaded: LoadedModel) -> None:
    contrast = read(["a" * 300, "short"], ["b" * 290, "brief"])
    with pytest.raises(ExampleError, match=r"context of 256 tokens: --pos:1 \(301 tokens\), --neg:1 \(291 tokens\)"):
        extract(loaded, contrast, layers="0")
    found = extract(loaded, contrast, layers="0", truncate=True)
    assert found.tokens["positive"] == 255 + 5


def test_classes_with_the_same_activations_are_an_error(loaded: LoadedModel) -> None:
    # The first token of either completion is the same after the same prompt.
    lines = [{"prompt": PROMPT, "positive": "I love it", "negative": "I hate it"}]
    with pytest.raises(ExampleError, match="same mean activation"):
        extract(loaded, read(pairs=lines), which="0")
