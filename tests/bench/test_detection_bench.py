"""The benchmark of concept detection reads AxBench's form and scores what is planted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pico
import pytest

from bench import detection

WORDS = ("warm", "cold", "yes")


def records(per_concept: int, seed: int) -> list[dict[str, object]]:
    """Concept i is shown by WORDS[i]; negatives of no concept are shared, as AxBench has them."""
    draw = random.Random(seed)

    def text() -> str:
        return "".join(draw.choices("abcdefgh", k=6))

    rows: list[dict[str, object]] = []
    for concept, word in enumerate(WORDS):
        for _ in range(per_concept):
            rows.append(
                {"concept_id": concept, "input": text(), "output": text() + 4 * f" {word}", "output_concept": word,
                 "category": "positive"}
            )  # fmt: skip
    for _ in range(per_concept):
        rows.append(
            {"concept_id": -1, "input": text(), "output": text(), "output_concept": "EEEEE", "category": "negative"}
        )
    return rows


def parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    lines = path.with_suffix(".jsonl")
    lines.write_text("\n".join(map(json.dumps, rows)))
    duckdb.sql(f"copy (select * from read_json('{lines}')) to '{path}' (format parquet)")
    return path


def test_parquet_and_json_lines_hold_the_same_rows(tmp_path: Path) -> None:
    written = parquet(tmp_path / "a.parquet", records(3, 0))
    rows = detection.rows_of(written)
    assert rows == detection.rows_of(tmp_path / "a.jsonl")
    assert rows[0].concept == 0
    assert rows[0].positive
    assert rows[-1].concept is None
    labelled = [{"concept_id": 1, "input": "a", "output": "b", "output_concept": "EEEEE", "label": 0}]
    assert detection.rows_of(parquet(tmp_path / "b.parquet", labelled))[0] == (None, "a", "b", False)


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"concept_id": 1, "output": "x", "label": 1}')
    with pytest.raises(SystemExit, match="lacks the columns input"):
        detection.rows_of(tmp_path / "a.jsonl")


def test_rows_that_train_do_not_test() -> None:
    rows = [detection._row(each) for each in records(20, 0)]
    every, concepts = detection.concepts_of(rows, None, None)
    assert [each.number for each in concepts] == [0, 1, 2]
    for concept in concepts:
        trained, tested = ({*side[0], *side[1]} for side in (concept.train, concept.test))
        assert not trained & tested
        assert all(every[i].concept in (concept.number, None) for i in trained | tested)
    assert len(detection.concepts_of(rows, rows, 2)[1]) == 2


def test_every_method_finds_a_word_and_so_does_its_naive_twin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pico.save(tmp_path / "model")
    train, test = (parquet(tmp_path / f"{n}.parquet", records(12, n)) for n in (1, 2))
    report = detection.main([str(train), str(test), "--model", str(model), "--layers", "0"])
    assert report["words"][0] == 1.0
    for name, pools in report["layers"][0].items():
        assert pools["max"][0] > 0.75, name
    ours, twin = (report["layers"][0][name]["max"] for name in ("diffmean", "diffmean, naive"))
    assert ours == pytest.approx(twin, abs=1e-9)
    assert "max-pool AUROC" in capsys.readouterr().out
