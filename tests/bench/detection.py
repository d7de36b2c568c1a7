"""Concept detection on files in AxBench's form: every method of probes, and each beside a naive twin of its own.

    .venv/bin/python tests/bench/detection.py TRAIN.parquet [TEST.parquet] [--model smollm2] [--layers 10,15,20]
        [--methods diffmean,lda,logistic,ridge] [--tokens completion] [--concepts 10] [--json FILE]

AxBench: Wu et al. 2025, arXiv:2501.17148; its data: huggingface.co/pyvene (axbench-concept10, concept500). A row has
`concept_id`, `input`, `output`, `output_concept`, and `label` (1 or 0) or `category` (positive, negative, hard negative
…). Rows of no concept (`concept_id` -1, or `output_concept` EEEEE) are negatives of every concept. Without a second
file, half of each concept's rows test, by a hash of their input. Parquet is read by duckdb or pyarrow;
.jsonl is read too.

The greatest score of a text's tokens decides, as in AxBench (the mean stands beside it). The figure of a method is the
mean AUROC over concepts, with its 95 % bootstrap interval over concepts. The naive methods run one text at a time and
follow their textbook formulas; `words` is naive Bayes on words, which sees no activations.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from figures import machine
from torch import Tensor

from probes.capture.states import token_states
from probes.data.examples import Example
from probes.intervals import auroc
from probes.models import residual
from probes.models.loading import LoadedModel, load
from probes.models.tokens import Tokens
from probes.readouts.fitting import Units, fit
from probes.readouts.methods import method as find_method
from probes.readouts.texts import tokenised
from probes.seeds import child_seed

NO_CONCEPT = "EEEEE"
POOLS = ("max", "mean")


class Row(NamedTuple):
    """One text: the concept it belongs to (None: of no concept), and whether it shows the concept."""

    concept: int | None
    prompt: str
    text: str
    positive: bool


def rows_of(path: Path) -> list[Row]:
    """The rows of a file. Exits with a sentence where columns are missing."""
    records = (
        _parquet(path) if path.suffix == ".parquet" else [json.loads(each) for each in path.open() if each.strip()]
    )
    missing = {"concept_id", "input", "output"} - set(records[0] if records else ())
    if missing or not ({"label", "labels", "category"} & set(records[0])):
        raise SystemExit(f"{path} lacks the columns {', '.join(sorted(missing)) or 'label or category'}")
    return [_row(each) for each in records]


def _row(record: Mapping[str, Any]) -> Row:
    label = record.get("label", record.get("labels"))
    positive = bool(int(label)) if label is not None else str(record["category"]).strip().lower() == "positive"
    concept = int(record["concept_id"])
    none = concept < 0 or (record.get("output_concept") == NO_CONCEPT and not positive and "category" not in record)
    return Row(None if none else concept, str(record["input"] or ""), str(record["output"] or ""), positive)


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import duckdb
    except ImportError:
        try:
            from pyarrow import parquet
        except ImportError:
            raise SystemExit("parquet is read by duckdb or pyarrow: pip install duckdb") from None
        return list(parquet.read_table(path).to_pylist())
    found = duckdb.sql("select * from read_parquet($path)", params={"path": str(path)})
    return [dict(zip(found.columns, values, strict=True)) for values in found.fetchall()]


class Concept(NamedTuple):
    """The indices of a concept's texts: positive and negative, to train on and to test on."""

    number: int
    train: tuple[list[int], list[int]]
    test: tuple[list[int], list[int]]


def concepts_of(train: Sequence[Row], test: Sequence[Row] | None, most: int | None) -> tuple[list[Row], list[Concept]]:
    """All rows in one list, and the concepts that have both classes on both sides."""
    rows = [*train, *(test or [])]

    def trains(index: int) -> bool:
        if test is not None:
            return index < len(train)
        return child_seed(0, "detection", rows[index].prompt, rows[index].text) % 2 == 0

    found = []
    for number in sorted({row.concept for row in rows if row.concept is not None})[:most]:
        inside = [i for i, row in enumerate(rows) if row.concept in (number, None)]
        sides = [
            (
                [i for i in part if rows[i].positive and rows[i].concept == number],
                [i for i in part if not rows[i].positive],
            )
            for part in ([i for i in inside if trains(i)], [i for i in inside if not trains(i)])
        ]
        if all(all(side) for side in sides):
            found.append(Concept(number, *sides))
    return rows, found


def activations(loaded: LoadedModel, texts: Sequence[Tokens], layer: int) -> list[Tensor]:
    """The tokens that count of each text at a layer, float32 [tokens, hidden]."""
    found: list[Tensor] = [torch.empty(0)] * len(texts)

    def keep(index: int, _position: int, states: Tensor) -> None:
        found[index] = states[texts[index].counted].clone()

    token_states(loaded.model, texts, [layer], keep)
    return found


def naive_activations(loaded: LoadedModel, texts: Sequence[Tokens], layer: int) -> list[Tensor]:
    """The same, one text at a time and through all layers."""
    found = []
    with torch.inference_mode():
        for text in texts:
            states = loaded.model(input_ids=torch.tensor([text.ids]), output_hidden_states=True).hidden_states
            found.append(states[layer + 1][0][text.counted].clone() if layer + 2 < len(states) else torch.empty(0))
    return found


Scores = Callable[[Tensor], Tensor]


def ours(name: str, positive: list[Tensor], negative: list[Tensor]) -> Scores:
    """A readout as `steer probe train --per-token --pool max` fits it."""
    texts = [*positive, *negative]
    owner = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(each) for each in texts]))
    labels = torch.arange(len(texts)) < len(positive)
    units = Units(owner, labels, torch.arange(len(texts)) % min(5, len(positive), len(negative)))
    fitted = fit(find_method(name), torch.cat(texts), units, "max")
    assert fitted is not None
    return fitted.readout.scores


def naive(name: str, positive: list[Tensor], negative: list[Tensor]) -> Scores:
    """The same method from its definition, without scaling, shrinkage or a search for the penalty."""
    x, y = torch.cat(positive).double(), torch.cat(negative).double()
    if name == "diffmean":
        weight = x.mean(0) - y.mean(0)
    elif name == "lda":
        scatter = (x - x.mean(0)).T @ (x - x.mean(0)) + (y - y.mean(0)).T @ (y - y.mean(0))
        weight = torch.linalg.lstsq(scatter, (x.mean(0) - y.mean(0))[:, None]).solution[:, 0]
    elif name == "ridge":
        rows, targets = torch.cat([x, y]), torch.cat([torch.ones(len(x)), -torch.ones(len(y))]).double()
        centred = rows - rows.mean(0)
        weight = torch.linalg.solve(centred.T @ centred + torch.eye(rows.shape[1]).double(), centred.T @ targets)
    else:
        weight = _naive_logistic(torch.cat([x, y]), torch.cat([torch.ones(len(x)), torch.zeros(len(y))]).double())
    return lambda states: states.double() @ weight


def _naive_logistic(rows: Tensor, labels: Tensor) -> Tensor:
    """Gradient descent by Adam on the plain loss, as AxBench trains its probe."""
    weight, bias = torch.zeros(rows.shape[1]).double().requires_grad_(), torch.zeros(()).double().requires_grad_()
    optimiser = torch.optim.Adam([weight, bias], lr=0.01)
    with torch.enable_grad():
        for _ in range(200):
            optimiser.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(rows @ weight + bias, labels)
            loss.backward()
            optimiser.step()
    return weight.detach()


def words(positive: Sequence[str], negative: Sequence[str]) -> Callable[[str], float]:
    """Naive Bayes on the words of texts, with one added to every count."""
    counts = [collections.Counter(w for text in texts for w in _words(text)) for texts in (positive, negative)]
    vocabulary = len(counts[0] | counts[1])
    totals = [sum(count.values()) + vocabulary for count in counts]

    def score(text: str) -> float:
        logs = [
            math.log((counts[0][w] + 1) / totals[0]) - math.log((counts[1][w] + 1) / totals[1]) for w in _words(text)
        ]
        return sum(logs) / max(len(logs), 1)

    return score


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def of_texts(scores: Scores, texts: list[Tensor], pool: str) -> Tensor:
    """One score for each text."""
    values = [scores(each) for each in texts]
    return torch.stack([each.max() if pool == "max" else each.mean() for each in values]).double()


def measured(
    states: list[Tensor], concepts: Sequence[Concept], methods: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """The AUROC of every concept by method and pooling, with the seconds that the fits took."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in methods:
        for label, make in ((name, ours), (f"{name}, naive", naive)):
            columns = found.setdefault(label, {"max": [], "mean": [], "seconds": []})
            for concept in concepts:
                started = time.perf_counter()
                scores = make(name, *([states[i] for i in side] for side in concept.train))
                columns["seconds"].append(time.perf_counter() - started)
                for pool in POOLS:
                    sides = [of_texts(scores, [states[i] for i in side], pool) for side in concept.test]
                    columns[pool].append(auroc(*sides))
    return found


def words_measured(rows: Sequence[Row], concepts: Sequence[Concept]) -> list[float]:
    """The AUROC of naive Bayes on words, by concept."""
    found = []
    for concept in concepts:
        score = words(*([rows[i].text for i in side] for side in concept.train))
        sides = [torch.tensor([score(rows[i].text) for i in side]).double() for side in concept.test]
        found.append(auroc(*sides))
    return found


def over_concepts(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and its 95 % bootstrap interval over concepts."""
    every = torch.tensor(values).double()
    drawn = torch.randint(len(every), (2_000, len(every)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(every[drawn].mean(1), torch.tensor([0.025, 0.975]).double()).tolist()
    return float(every.mean()), low, high


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Read, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path, nargs="?")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", help="which layers; by default at a third, a half and two thirds of the depth")
    parser.add_argument("--methods", default="diffmean,lda,logistic,ridge")
    parser.add_argument("--tokens", default="completion")
    parser.add_argument("--concepts", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)

    rows, concepts = concepts_of(
        rows_of(options.train), None if options.test is None else rows_of(options.test), options.concepts
    )
    if not concepts:
        raise SystemExit("no concept has positive and negative texts on both sides")
    loaded = load(options.model, options.device)
    examples = [Example(row.text, row.prompt or None, origin=f"row {n}") for n, row in enumerate(rows, 1)]
    texts = tokenised(
        examples, loaded.tokenizer, options.tokens, longest=residual.context_length(loaded.model.config), truncate=True
    )
    count = len(residual.blocks(loaded.model))
    layers = [count // 3, count // 2, 2 * count // 3] if options.layers is None else map(int, options.layers.split(","))
    print(f"{machine()}; {options.model}; {len(concepts)} concepts, {len(texts)} texts, tokens: {options.tokens}")
    report: dict[str, Any] = {"concepts": len(concepts), "texts": len(texts), "layers": {}}
    report["words"] = over_concepts(words_measured(rows, concepts))
    print("words, without a model: AUROC {:.3f} ({:.3f} to {:.3f})".format(*report["words"]))
    for layer in layers:
        started = time.perf_counter()
        states = activations(loaded, texts, layer)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        reference = naive_activations(loaded, texts[:50], layer)
        naive_seconds = (time.perf_counter() - started) / len(reference) * len(texts)
        apart = max(
            float((a - b).abs().max() / a.abs().max()) for a, b in zip(states, reference, strict=False) if len(b)
        )
        print(f"\nlayer {layer}: activations {seconds:.1f} s (naive {naive_seconds:.1f} s, within {apart:.1g})")
        print(f"{'method':20} {'max-pool AUROC':>24} {'mean-pool AUROC':>24} {'s/concept':>10}")
        found = measured(states, concepts, options.methods.split(","))
        report["layers"][layer] = {
            name: {pool: over_concepts(columns[pool]) for pool in POOLS} for name, columns in found.items()
        }
        for name, columns in found.items():
            cells = ["{:.3f} ({:.3f} to {:.3f})".format(*over_concepts(columns[pool])) for pool in POOLS]
            print(f"{name:20} {cells[0]:>24} {cells[1]:>24} {sum(columns['seconds']) / len(concepts):10.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
