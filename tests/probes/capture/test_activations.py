"""Pooling gives what one example at a time gives, whatever is shared, packed, padded, windowed or spilled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pico
import pytest
import torch
from torch import Tensor

from probes.capture import activations as capture
from probes.capture.activations import Pooled, activations
from probes.models import residual
from probes.models.tokens import Tokens
from vectors.errors import ModelError

ALL = list(range(pico.LAYERS))
CLOSE = 1e-5  # relative to the norm of a mean activation, float32
# Gated DeltaNet adds up in chunks: cut elsewhere, transformers' own continuation of a cache differs by as much.
LOOSER = {"qwen3-next": 5e-5}


def tail(ids: list[int], count: int) -> Tokens:
    """An example of which the last `count` tokens count, as a completion's do."""
    return Tokens(ids, list(range(len(ids) - count, len(ids))))


def family(prefix: list[int]) -> list[Tokens]:
    """Pairs that share prompts inside prompts, duplicates, an example inside another, and odd choices of tokens."""
    a, b, c, d, e, f = pico.sequences(6, 3, 7, seed=1)
    nested = [prefix + a + b, prefix + a + c, prefix + a + b + d, prefix + a + b + e, prefix + f]
    return [
        *(tail(ids, 2) for ids in nested),
        tail(nested[2], 2),  # twice the same
        tail(nested[2], 3),  # and the same, counted otherwise
        Tokens(nested[3], list(range(1, len(nested[3])))),  # `all`: the prefix counts too
        Tokens(nested[1], [len(nested[1]) - 1]),  # `last`
        Tokens(nested[0] + c, [2, len(nested[0]) - 1]),  # tokens follow that nobody asked for
        tail(prefix + pico.sequences(1, 2, 2, seed=2)[0], 1),
    ]


(PREFIX,) = pico.sequences(1, 9, 9, seed=3)
FAMILIES = {
    "a prefix in common": family(PREFIX),
    "no prefix in common": [*family([]), tail([200, *PREFIX], 3)],
    "one example": [tail(PREFIX, 4)],
    "the same twice": [tail(PREFIX, 4), tail(PREFIX, 4)],
}


def one_by_one(model: Any, examples: Sequence[Tokens], layers: Sequence[int] = ALL) -> Tensor:
    """The reference: each example alone, whole, without a cache; float32 [layers, examples, hidden]."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda _block, _inputs, output: seen.update({layer: residual.output_of(output)[0].float()})

    handles = [residual.blocks(model)[layer].register_forward_hook(keep(layer)) for layer in layers]
    rows = []
    with torch.inference_mode():
        for example in examples:
            residual.decoder(model)(input_ids=torch.tensor([example.ids]), use_cache=False)
            rows.append(torch.stack([seen[layer][example.counted].mean(0) for layer in layers]))
    for handle in handles:
        handle.remove()
    return torch.stack(rows, 1)


def rows_of(result: Pooled) -> Tensor:
    """What was pooled, [layers, examples, hidden]; the spill is closed."""
    with result.spill as spill:
        return torch.stack([spill.read(i).clone() for i in range(len(result.layers))])


def pooled(model: Any, examples: Sequence[Tokens], layers: Sequence[int] = ALL, **options: Any) -> Tensor:
    return rows_of(activations(model, examples, layers, **options))


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference of any row, relative to its norm."""
    assert found.shape == expected.shape
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def ways(model: Any, examples: Sequence[Tokens]) -> list[bool | None]:
    """How the model can run: by default, which is packed where that is exact and else in padded batches; and padded."""
    packs = capture.packable(model, max(len(e.ids) for e in examples))
    return [None, False] if packs else [None]


@contextlib.contextmanager
def budgets(pack: int, together: int, batch: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "PACK", pack)
        patch.setattr(capture, "PASS", together)
        patch.setattr(capture, "BATCH", batch)
        patch.setattr(
            "probes.capture.tree_attention.ALIKE", pack // 4
        )  # small packs attend in groups of several lengths
        yield


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("examples", FAMILIES.values(), ids=FAMILIES)
def test_pooling_equals_one_example_at_a_time(
    architecture: str, attention: str, examples: list[Tokens], pico_model: Callable[..., Any]
) -> None:
    model = pico_model(architecture, attention=attention)
    expected = one_by_one(model, examples)
    for pack in ways(model, examples):
        for limits in ((256, 512, 16), (20, 36, 3)):  # one pass for all, and many small ones
            with budgets(*limits):
                found = pooled(model, examples, pack=pack)
            assert distance(found, expected) < LOOSER.get(architecture, CLOSE), f"pack={pack}, budgets {limits}"
    assert pico.hooks(model) == 0
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("name", [name for name in pico.NAMES if name.endswith("-window")])
def test_sequences_share_a_pass_as_a_tree_only_inside_the_window(name: str, pico_model: Callable[..., Any]) -> None:
    model = pico_model(name)
    assert capture.packable(model, pico.WINDOW)
    assert not capture.packable(model, pico.WINDOW + 1)
    short = [tail([9, 8, 7, 6, *rest], 1) for rest in ([5, 10], [5, 11], [12], [5], [14, 13])]
    assert max(len(example.ids) for example in short) == pico.WINDOW
    expected = one_by_one(model, short)
    for pack in (None, True, False):
        assert distance(pooled(model, short, pack=pack), expected) < CLOSE


def test_only_where_attention_alone_mixes_tokens_do_sequences_share_a_pass(model: Any, architecture: str) -> None:
    mixes_otherwise = architecture in ("lfm2", "qwen3-next")
    assert capture.packable(model, pico.WINDOW) != mixes_otherwise


def test_an_unknown_architecture_is_run_in_padded_batches(pico_model: Callable[..., Any]) -> None:
    model = pico_model("opt")
    examples = FAMILIES["a prefix in common"]
    assert not capture.packable(model, 8)
    assert distance(pooled(model, examples), one_by_one(model, examples)) < CLOSE


@pytest.mark.parametrize("layers", [[0], [2], [0, 2], [3, 1]])
@pytest.mark.parametrize("name", ["llama", "gpt2", "lfm2", "qwen3-next", "gemma3-window"])
def test_the_layers_asked_for_are_given_in_that_order_and_nothing_after_the_last_is_run(
    name: str, layers: list[int], pico_model: Callable[..., Any]
) -> None:
    model = pico_model(name)
    examples = FAMILIES["a prefix in common"]
    ran: set[int] = set()
    expected = one_by_one(model, examples, layers)
    handles = [
        block.register_forward_pre_hook(lambda _m, _i, layer=layer: ran.add(layer))
        for layer, block in enumerate(residual.blocks(model))
    ]
    handles.append(model.lm_head.register_forward_pre_hook(lambda _m, _i: ran.add(-1)))
    try:
        found = [pooled(model, examples, layers, pack=pack) for pack in ways(model, examples)]
    finally:
        for handle in handles:
            handle.remove()
    assert max(distance(one, expected) for one in found) < LOOSER.get(name, CLOSE)
    assert ran == set(range(max(layers) + 1))


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_what_is_spilled_to_disk_is_what_is_kept_in_memory(name: str, pico_model: Callable[..., Any]) -> None:
    model = pico_model(name)
    examples = FAMILIES["a prefix in common"]
    on_disk, in_memory = activations(model, examples, [1, 3], spill_above=0), activations(model, examples, [1, 3])
    assert on_disk.spill.memory is None
    assert in_memory.spill.file is None
    assert torch.equal(rows_of(on_disk), rows_of(in_memory))


def test_a_model_in_bfloat16_gives_float32_rows_near_the_reference(pico_model: Callable[..., Any]) -> None:
    model = pico_model("llama", dtype=torch.bfloat16)
    examples = FAMILIES["a prefix in common"]
    found = pooled(model, examples)
    assert found.dtype == torch.float32
    assert distance(found, one_by_one(model, examples)) < 0.03


def nodes(examples: Sequence[Tokens]) -> int:
    """The size of the prefix tree of what has to be computed: each example up to the last token that counts."""
    whole = [example.ids[: example.counted[-1] + 1] for example in examples]
    return len({tuple(ids[: i + 1]) for ids in whole for i in range(len(ids))})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("examples", FAMILIES.values(), ids=FAMILIES)
def test_every_distinct_token_of_the_prefix_tree_is_computed_once(
    examples: list[Tokens], attention: str, pico_model: Callable[..., Any]
) -> None:
    model = pico_model("llama", attention=attention)
    ran: list[int] = []
    handle = residual.blocks(model)[0].register_forward_pre_hook(lambda _m, inputs: ran.append(inputs[0].shape[1]))
    try:
        result = activations(model, examples, ALL)
    finally:
        handle.remove()
    result.spill.close()
    assert result.computed == sum(ran) == nodes(examples)


def test_padded_batches_compute_the_prefix_once_and_little_padding(pico_model: Callable[..., Any]) -> None:
    examples = [tail(PREFIX + [20 + n] * n, 1) for n in (1, 5, 2, 6)]
    with budgets(256, 512, 2):
        result = activations(pico_model("lfm2"), examples, ALL)
    result.spill.close()
    assert result.computed == len(PREFIX) + 2 * 2 + 2 * 6  # like lengths share a batch: 1 with 2, 5 with 6


def test_progress_counts_the_examples_done(llama: Any) -> None:
    examples = FAMILIES["no prefix in common"]
    done: list[Any] = []
    with budgets(20, 36, 3):
        pooled(llama, examples, on_event=lambda event: done.append(event.done))
    assert done == sorted(done)
    assert len(done) > 1
    assert done[-1] == len(examples)


def test_norms_are_those_of_the_counted_tokens(llama: Any) -> None:
    examples = [tail(ids, 3) for ids in pico.sequences(5, 5, 9, seed=7)]
    single = [Tokens(example.ids, [at]) for example in examples for at in example.counted]
    result = activations(llama, examples, [2])
    result.spill.close()
    lengths = one_by_one(llama, single, [2])[0].norm(dim=-1)
    assert result.norms[2].count == 15
    assert result.norms[2].mean == pytest.approx(float(lengths.mean()), rel=1e-5)
    assert result.norms[2].largest == pytest.approx(float(lengths.max()), rel=1e-5)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_norms_count_every_token_of_every_example_however_they_share(name: str, pack: bool, llama: Any) -> None:
    """A prefix that all begin with and the nodes of a tree are computed once, and count for each example."""
    examples = [Tokens(example.ids, list(range(1, len(example.ids)))) for example in FAMILIES[name]]
    result = activations(llama, examples, [2], pack=pack)
    result.spill.close()
    single = [Tokens(example.ids, [at]) for example in examples for at in example.counted]
    lengths = one_by_one(llama, single, [2])[0].norm(dim=-1)
    assert result.norms[2].count == len(single)
    assert result.norms[2].mean == pytest.approx(float(lengths.mean()), rel=1e-5)
    assert result.norms[2].largest == pytest.approx(float(lengths.max()), rel=1e-5)


def test_a_model_answers_after_pooling_as_before(model: Any) -> None:
    ids = torch.tensor([PREFIX])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        pooled(model, FAMILIES["a prefix in common"], [1])
        after = model(input_ids=ids).logits
    assert torch.equal(before, after)


# What goes wrong.


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_layer(value: float, pack: bool) -> None:
    model = pico.build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3] = value
    pooled(model, FAMILIES["a prefix in common"], [0, 1], pack=pack)
    with pytest.raises(ModelError, match=r"layer 2 is not finite for example \d+$") as caught:
        activations(model, FAMILIES["a prefix in common"], ALL, pack=pack)
    assert "float32" in caught.value.hint
    assert pico.hooks(model) == 0
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("pack", [True, False])
def test_the_example_that_is_not_finite_is_named_and_no_other(pack: bool) -> None:
    model = pico.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[250] = float("nan")
    examples = [tail([20 + i, 30 + i, 40 + i], 2) for i in range(5)]
    examples[3] = tail([23, 250, 43], 2)
    with pytest.raises(ModelError, match=r"layer 0 is not finite for example 3$"):
        activations(model, examples, ALL, pack=pack)
    examples[3] = examples[3]._replace(origin="warm.jsonl:4")
    with pytest.raises(ModelError, match=r"layer 0 is not finite for example warm.jsonl:4$"):
        activations(model, examples, ALL, pack=pack)


@pytest.mark.parametrize("pack", [True, False])
def test_a_prefix_that_is_not_finite_is_reported(pack: bool) -> None:
    model = pico.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[PREFIX[2]] = float("nan")
    with pytest.raises(ModelError, match="layer 1 is not finite"):
        activations(model, FAMILIES["a prefix in common"], [1, 2], pack=pack)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("where", ["in the prefix", "in a pass", "between passes"])
@pytest.mark.parametrize("spill_above", [None, 0])
def test_an_exception_leaves_no_hook_no_setting_and_no_file(
    where: str, pack: bool, attention: str, spill_above: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico.build("llama", attention=attention)
    spills: list[Any] = []
    original = capture.Spill

    def recorded(*arguments: Any) -> Any:
        spills.append(original(*arguments))
        return spills[-1]

    monkeypatch.setattr(capture, "Spill", recorded)

    def fail(*_arguments: Any) -> None:
        calls.append(1)
        if len(calls) == (1 if where == "in the prefix" else 2):
            raise KeyboardInterrupt

    calls: list[int] = []
    options: dict[str, Any] = {"pack": pack, "spill_above": spill_above}
    handle = None
    if where == "between passes":
        options["on_event"] = fail
    else:
        handle = residual.blocks(model)[1].register_forward_hook(fail)
    with budgets(20, 36, 3), pytest.raises(KeyboardInterrupt):
        activations(model, FAMILIES["a prefix in common"], ALL, **options)
    if handle is not None:
        handle.remove()
    assert pico.hooks(model) == 0
    assert model.config._attn_implementation == attention
    assert spills[0].memory is None
    assert spills[0].file is None


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_sequences_whose_length_changes_the_rotary_frequencies_never_share_a_pass(kind: str) -> None:
    size = pico.config("phi3").hidden_size // pico.config("phi3").num_attention_heads // 2
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * size, "long_factor": [3.0] * size, "original_max_position_embeddings": 16}
        model = pico.build("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    else:
        model = pico.build("llama", rope_parameters=rope, max_position_embeddings=16)
    shared = list(range(5, 13))
    examples = [tail([*shared, *range(20, 20 + extra)], 3) for extra in (4, 6, 30, 40)]
    assert distance(pooled(model, examples), one_by_one(model, examples)) < 1e-5
