"""Classes of different length: noticed with figures, and made alike on request."""

from __future__ import annotations

import pico
import pytest

from probes.data.reading import read
from probes.directions.extraction import extract
from probes.directions.lengths import matched, problem_of_lengths
from probes.directions.plan import plan
from probes.models.loading import LoadedModel
from probes.models.tokens import Tokens
from vectors.errors import ExampleError, UsageError
from vectors.references import ModelSource


def tokens(*spans: tuple[int, int]) -> list[Tokens]:
    """Examples of which the tokens from `first` up to `stop` count."""
    return [Tokens([9] * stop, list(range(first, stop)), f"f:{n}") for n, (first, stop) in enumerate(spans)]


SHORT_AND_LONG = tokens((1, 4), (1, 5), (1, 6), (1, 30), (1, 50), (1, 40))


def test_classes_that_the_length_tells_apart_are_named_with_figures() -> None:
    assert problem_of_lengths(SHORT_AND_LONG, 3) == (
        "the classes differ in length: positive examples have 4 tokens that count in the median, negative ones 39 "
        "(AUROC of the length alone: 1.00), so the vector may be one of length"
    )


@pytest.mark.parametrize("negative", [((1, 5), (1, 4), (1, 7)), ((1, 6), (1, 7), (1, 6)), ((1, 3), (1, 30), (1, 4))])
def test_lengths_that_overlap_or_hardly_differ_are_not(negative: tuple[tuple[int, int], ...]) -> None:
    assert problem_of_lengths(tokens((1, 6), (1, 7), (1, 5), *negative), 3) == ""


def test_pairs_are_cut_to_the_shorter_of_both() -> None:
    found = matched(SHORT_AND_LONG, 3, True, "length")
    assert [len(each.counted) for each in found] == [3, 4, 5, 3, 4, 5]
    assert problem_of_lengths(found, 3) == ""


def test_without_pairs_the_counterpart_has_the_same_rank_in_length() -> None:
    found = matched(tokens((1, 6), (1, 4), (1, 30), (1, 50), (1, 40), (1, 60)), 2, False, "length")
    assert [len(each.counted) for each in found] == [5, 3, 3, 5, 3, 5]


def test_positions_that_only_one_of_both_has_do_not_count() -> None:
    found = matched(tokens((1, 6), (4, 9)), 1, True, "position")
    assert [each.counted for each in found] == [[4, 5], [4, 5]]
    with pytest.raises(ExampleError, match="2 of 2 examples share no position with their counterpart"):
        matched(tokens((1, 4), (4, 9)), 1, True, "position")
    with pytest.raises(UsageError, match="no match 'size'"):
        matched(SHORT_AND_LONG, 3, True, "size")


def test_a_single_token_has_no_length_to_match() -> None:
    contrast = read(["the warm sea"], ["cold"])
    for which in ("last", "-2"):
        with pytest.raises(UsageError, match=f"--match needs an average over tokens, and --tokens {which} is one"):
            plan(contrast, pico.tokenizer(), pico.config("llama"), which=which, truncate=False, match="length")


def test_an_extraction_says_that_its_classes_differ_in_length(tmp_path_factory: pytest.TempPathFactory) -> None:
    loaded = LoadedModel(pico.build("llama"), pico.tokenizer(), ModelSource(tmp_path_factory.mktemp("m")), {}, "cpu")
    contrast = read(
        [f"sun {n}" for n in "abcdefgh"], [f"the rain and the cold {n} and no warm sun" for n in "abcdefgh"]
    )
    found = extract(loaded, contrast)
    assert "the classes differ in length" in found.recommended.reason
    (warning,) = (each for each in found.warnings if "length" in each)
    assert warning.endswith("compare with --match length, or --match position")
    alike = extract(loaded, contrast, match="length")
    assert not any("length" in each for each in alike.warnings)
    assert alike.tokens["positive"] == alike.tokens["negative"] == found.tokens["positive"]
    assert alike.vector.metadata["method"]["parameters"]["match"] == "length"
    assert "match" not in found.vector.metadata["method"]["parameters"]
