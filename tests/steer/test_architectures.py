"""Every architecture does what the table of docs/serve.md says, and a wrong claim about it is caught by the proof.

After a change, `python scripts/support_table.py` measures the table anew; with `--serving` it writes the column of
serving alone, from `parity.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import architecture_rows as rows
import pico
import pytest
import torch
from torch import nn

from probes.models import residual, stream_proof
from steer.training import frozen_context
from vectors import architectures
from vectors.errors import ModelError

DOCUMENT = Path(__file__).parents[2] / "docs" / "serve.md"
STATED = rows.rows_in(DOCUMENT.read_text(encoding="utf-8"))
PROVED = tuple(name for name in rows.ALL if not STATED[name][2].startswith("no: "))
FOLDED_OFTEN = ("deepseek-v3", "gpt-oss", "granite", "gemma4", "falcon-h1", "mistral3")


def quick(names: Sequence[str]) -> list[Any]:
    """All architectures, of which only the named are fast tests."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in rows.ALL]


def test_every_row_of_the_code_has_a_pico_model_and_every_pico_model_a_row_in_the_documentation() -> None:
    assert set(map(rows.text_type, rows.NAMES)) == set(architectures.ARCHITECTURES)
    assert sorted(STATED) == sorted(rows.ALL)


def test_the_documentation_counts_the_kinds_that_serving_was_tried_on() -> None:
    entries = json.loads(rows.PARITY.read_text(encoding="utf-8")).values()
    assert [entry["v2"]["serve"] for entry in entries] == [entry["serve"] for entry in entries]
    kinds = [entry["serve"] for entry in entries]
    sentence = (
        f"tries {len(kinds)} kinds of decoder, on models of four blocks, on both runners: {kinds.count('exact')} are "
        f"served exactly, {kinds.count('refused')} are refused with the reason"
    )
    assert sentence in " ".join(DOCUMENT.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("name", rows.ALL)
def test_extraction_hooks_and_serving_are_as_documented(name: str) -> None:
    kind, _, *cells = STATED[name]
    assert kind == rows.kind_of(name)
    assert cells[:3] == [rows.extract(name), rows.attempt(name), rows.serve(name)]
    assert pico.hooks(rows.model_of(name)) == 0


@pytest.mark.parametrize("name", quick(FOLDED_OFTEN))
def test_folding_is_as_documented(name: str, tmp_path: Path) -> None:
    assert STATED[name][5] == rows.fold(name, tmp_path)


@pytest.mark.parametrize("name", quick(("qwen3.5-vl", "falcon-h1")))
def test_training_is_as_documented(name: str, tmp_path: Path) -> None:
    assert STATED[name][6] == rows.train(name, tmp_path)


def refusal(name: str, claimed: Sequence[nn.Module]) -> str | None:
    model = rows.model_of(name)
    reason = stream_proof.refusal(residual.decoder(model), claimed, residual.hidden_size(model))
    assert pico.hooks(model) == 0
    return reason


@pytest.mark.parametrize("name", PROVED)
def test_the_blocks_are_proved_and_wrong_claims_are_not(name: str) -> None:
    model = rows.model_of(name)
    blocks, takers = residual.blocks(model), rows.takers(model)
    assert refusal(name, blocks) is None
    assert refusal(name, takers) is not None, "off by one: the outputs of the next blocks, and of the final norm"
    assert refusal(name, blocks[:-1]) is not None, "without the last block"
    norms = [next(m for n, m in block.named_modules() if "norm" in n or n == "ln_1") for block in blocks]
    assert refusal(name, norms) is not None, "what a norm makes of the stream"
    added = [[m for m in block.children() if any(p.ndim > 1 for p in m.parameters())][-1] for block in blocks]
    assert refusal(name, added) is not None, "what a block adds to the stream"


@pytest.mark.parametrize("name", [*rows.NAMES, *pico.UNKNOWN, "mamba"])
@pytest.mark.parametrize("layer", [1, pico.LAYERS - 1])
def test_a_decoder_that_changes_the_stream_between_its_blocks_is_not_proved(name: str, layer: int) -> None:
    model = rows.model_of(name)
    blocks = residual.blocks(model)

    def normalised(states: torch.Tensor) -> torch.Tensor:
        return states / states.pow(2).mean(-1, keepdim=True).sqrt()

    for change, reason in ((lambda states: 0.5 * states, "0.5 times"), (normalised, "a normalised form of")):
        with rows.at_takers(model, lambda i, states: change(states) if i == layer else None):  # noqa: B023
            found = stream_proof.refusal(residual.decoder(model), blocks, residual.hidden_size(model))
        assert found is not None
        assert f"takes {reason} what block {layer} returned" in found


@pytest.mark.parametrize(
    ("name", "module", "layers"),
    [
        ("lfm2", "ShortConv", [0, 2]),
        ("lfm2-moe", "ShortConv", [0, 2]),
        ("qwen3-next", "GatedDeltaNet", [0, 1, 2]),
        ("qwen3.5", "GatedDeltaNet", [0, 1, 2]),
        ("qwen3.5-vl", "GatedDeltaNet", [0, 1, 2]),
        ("falcon-h1", "Mixer", [0, 1, 2, 3]),
        ("llama", "", []),
        ("cohere", "", []),
    ],
)
def test_the_modules_with_a_recurrent_state_are_known(name: str, module: str, layers: list[int]) -> None:
    recurrent = residual.recurrent_modules(rows.model_of(name))
    assert list(recurrent) == layers
    assert all(module in type(found).__name__ for found in recurrent.values())


@pytest.mark.parametrize("name", ["bamba", "jamba", "granite-hybrid"])
def test_no_context_is_frozen_where_states_are_not_known_to_go_on_over_several_tokens(name: str) -> None:
    model = rows.model_of(name)
    assert not residual.continues(model)
    with pytest.raises(ModelError, match="it is not known that its recurrent states go on over several tokens"):
        frozen_context.freeze(model, rows.IDS)


@pytest.mark.parametrize(
    ("kind", "prefix", "head"),
    [
        ("llama", "model.", "lm_head.weight"),
        ("gpt2", "", "lm_head.weight"),
        ("gpt2", "transformer.", "lm_head.weight"),
        ("gpt_neox", "gpt_neox.", "embed_out.weight"),
        ("mistral", "language_model.model.", "language_model.lm_head.weight"),
        ("qwen3_5_text", "model.language_model.", "lm_head.weight"),
    ],
)
def test_the_output_head_has_its_name_wherever_the_decoder_lies(kind: str, prefix: str, head: str) -> None:
    described = architectures.ARCHITECTURES[kind].checkpoint
    assert isinstance(described, architectures.Checkpoint)
    assert described.below(prefix).head == head


def test_a_setting_that_the_description_does_not_cover_is_refused() -> None:
    """Gemma 4 with experts has two norms in a row, through which no direction can be removed."""
    from steer.folding.architectures import checkpoint

    settings = {"model_type": "gemma4_text", "enable_moe_block": True}
    assert "two norms follow its feed-forward" in str(checkpoint(settings, []))
