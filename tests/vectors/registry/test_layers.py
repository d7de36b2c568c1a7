"""Layers as text: what people write is read, and read back as it was written."""

from __future__ import annotations

import pytest

from vectors.errors import UsageError
from vectors.registry.layers import layers_given, parse_layers, spans


@pytest.mark.parametrize(
    ("layers", "text"),
    [([], ""), ([4], "4"), ([1, 2], "1-2"), ([3, 1, 2, 2, 7], "1-3,7"), ([0, 2, 4], "0,2,4")],
)
def test_layers_are_written_as_people_write_them(layers: list[int], text: str) -> None:
    assert spans(layers) == text


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", None),
        (" all ", None),
        ("2", [2]),
        ("1-3", [1, 2, 3]),
        ("3, 0", [0, 3]),
        ("0,2-3,2", [0, 2, 3]),
        ("1-1", [1]),
    ],
)
def test_layers_are_named_by_numbers_and_ranges(text: str, layers: list[int] | None) -> None:
    assert parse_layers(text) == layers


def test_layers_are_given_as_a_text_a_number_or_several_in_their_order() -> None:
    assert [layers_given(each) for each in ("1-2", 3, [3, 1], range(2), "all")] == [[1, 2], [3], [3, 1], [0, 1], None]
    for wrong in (1.5, [1.5], [], -1, [2, 10**9], None):
        with pytest.raises(UsageError, match="layer"):
            layers_given(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "-1", "2-", "-", "1--2", "1-2-3", "x", "1.5", "every", "all,1", "0x1", "²"]
)
def test_what_names_no_layers_is_a_wrong_use(text: str) -> None:
    with pytest.raises(UsageError, match="is not a layer or a range of layers"):
        parse_layers(text)


def test_every_part_that_names_no_layers_is_reported() -> None:
    with pytest.raises(UsageError) as caught:
        parse_layers("0,3-1,x,99999999999999")
    assert caught.value.problems == (
        "the range 3-1 descends",
        "'x' in '0,3-1,x,99999999999999' is not a layer or a range of layers",
        "no model has a layer 99999999999999",
    )
    assert caught.value.hint.startswith("write 1-3; write all, or layers such as")
