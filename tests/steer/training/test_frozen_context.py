"""A frozen context: the same numbers as a whole pass, right gradients, nothing written, and when it has grown stale."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch
from torch import Tensor

from steer.training import frozen_context
from vectors.errors import ModelError, UsageError

KINDS = ("llama", "gemma2", "gemma2-window", "mistral-window", "qwen3-next", "lfm2")
CLOSE = {"rtol": 1e-4, "atol": 2e-4}


def trainable(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return pico.build(name, dtype=dtype).requires_grad_(True)


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.tensor(pico.sequences(rows, length, length, seed=seed))


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def gradients(model: Any) -> dict[str, Tensor]:
    """Those of the last pass, which are cleared."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def states(context: frozen_context.FrozenContext) -> list[Tensor]:
    """All tensors of a context's cache."""
    found = []
    for layer in context.cache.layers:
        for value in vars(layer).values():
            found += [v for v in (value.values() if isinstance(value, dict) else [value]) if isinstance(v, Tensor)]
    return found


@pytest.mark.parametrize("name", pico.NAMES)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_segments_after_a_frozen_context_are_what_a_whole_pass_says(name: str, length: int, pico_model: Any) -> None:
    model, context, segment = pico_model(name), ids(2, 11), ids(2, length, seed=1)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([context, segment], 1), use_cache=False).logits[:, 11:]
    got = frozen_context.continued(model, frozen_context.freeze(model, context), segment)
    torch.testing.assert_close(got, whole, **CLOSE)


@pytest.mark.parametrize("name", KINDS)
def test_a_context_can_be_used_again_and_nothing_is_written_to_it(name: str) -> None:
    model, segment = trainable(name), ids(2, 5, seed=1)
    context = frozen_context.freeze(model, ids(2, 9))
    before = [tensor.clone() for tensor in states(context)]
    assert before
    assert not any(tensor.requires_grad for tensor in states(context))
    found = []
    for _ in range(2):
        logits = frozen_context.continued(model, context, segment)
        loss(logits, segment).backward()
        frozen_context.continued(model, context, segment[:, :1]).sum().backward()
        found.append((logits.detach(), gradients(model)))
    (first, one), (second, two) = found
    assert torch.equal(first, second)
    assert all(torch.equal(one[key], two[key]) for key in one)
    after = states(context)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    # Norms, rotations and softmax are float32 in every model, so steps are large enough to be seen through rounding.
    model = trainable(name, torch.float32 if name == "qwen3-next" else torch.float64)  # experts know no float64
    segment = ids(1, 6, seed=1)
    context = frozen_context.freeze(model, ids(1, 8))

    def value() -> Tensor:
        logits = frozen_context.continued(model, context, segment).double()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), segment[:, 1:].flatten())

    value().backward()
    exact = gradients(model)
    generator = torch.Generator().manual_seed(3)
    checked = 0
    for key, parameter in model.named_parameters():
        if key not in exact or not exact[key].any() or ("layers.0" not in key and "layers.3" not in key):
            continue
        chance = torch.randn(parameter.shape, generator=generator).to(parameter)
        step = 1e-4 * (chance / chance.norm() + exact[key] / exact[key].norm())
        with torch.no_grad():
            parameter += step
            up = value()
            parameter -= 2 * step
            down = value()
            parameter += step
        expected = float(up - down)
        assert 2 * float((exact[key] * step).sum()) == pytest.approx(expected, rel=0.02, abs=4e-7), key
        checked += 1
    assert checked >= 14


@pytest.mark.parametrize("name", KINDS)
def test_every_weight_that_a_decision_uses_is_trained(name: str) -> None:
    model = trainable(name)
    segment = ids(2, 8, seed=1)
    loss(frozen_context.continued(model, frozen_context.freeze(model, ids(2, 7)), segment), segment).backward()
    found = gradients(model)
    experts = "experts"  # a token goes to a few of them
    assert {n for n, _ in model.named_parameters() if n not in found and experts not in n} == set()
    assert all(bool(g.any()) for n, g in found.items() if experts not in n)


def test_the_context_gives_no_gradient() -> None:
    """What a whole pass with gradients through the context has besides is what was frozen."""
    model = trainable("llama")
    context, segment = ids(1, 7), ids(1, 5, seed=1)
    loss(frozen_context.continued(model, frozen_context.freeze(model, context), segment), segment).backward()
    held = gradients(model)
    logits = model(input_ids=torch.cat([context, segment], 1), use_cache=False).logits[:, 7:]
    loss(logits, segment).backward()
    through = gradients(model)
    last = "model.layers.3."
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):  # nothing of them reaches a context's states
        torch.testing.assert_close(held[f"{last}{part}.weight"], through[f"{last}{part}.weight"], rtol=1e-3, atol=1e-5)
    for part in ("self_attn.k_proj", "self_attn.v_proj"):
        assert not torch.allclose(held[f"{last}{part}.weight"], through[f"{last}{part}.weight"], rtol=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_a_padded_batch_is_what_its_rows_are_alone(name: str, pico_model: Any) -> None:
    model = pico_model(name)
    contexts = pico.sequences(3, 2, 12, seed=2)
    segments = pico.sequences(3, 1, 7, seed=3)
    batch = pico.left_padded(contexts)
    width = max(map(len, segments))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in segments])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in segments])
    context = frozen_context.freeze(model, batch["input_ids"], batch["attention_mask"])
    together = frozen_context.continued(model, context, padded, mask)
    for row, (before, after) in enumerate(zip(contexts, segments, strict=True)):
        alone = frozen_context.continued(
            model, frozen_context.freeze(model, torch.tensor([before])), torch.tensor([after])
        )
        torch.testing.assert_close(together[row, : len(after)], alone[0], **CLOSE)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_may_have_no_context(name: str, pico_model: Any) -> None:
    model, segment = pico_model(name), ids(2, 5, seed=1)
    context = torch.tensor([[0, 0, 0], [7, 8, 9]])
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    got = frozen_context.continued(model, frozen_context.freeze(model, context, mask), segment)
    with torch.no_grad():
        alone = model(input_ids=segment[:1], use_cache=False).logits
    torch.testing.assert_close(got[:1], alone, **CLOSE)


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, segment = trainable(name).train(), ids(2, 6, seed=1)
    context = frozen_context.freeze(model, ids(2, 9))
    loss(frozen_context.continued(model, context, segment), segment).backward()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = frozen_context.freeze(model, ids(2, 9))
    for used in (context, again):
        loss(frozen_context.continued(model, used, segment), segment).backward()
        for key, value in gradients(model).items():
            torch.testing.assert_close(value, plain[key], rtol=1e-5, atol=1e-7)
    assert model.training
    assert not any("_can_checkpoint_with_cache" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "qwen3-next", "lfm2"])
def test_training_behind_a_frozen_context_learns(name: str) -> None:
    model, segment = trainable(name).train(), ids(2, 6, seed=1)
    context = frozen_context.freeze(model, ids(2, 12))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        value = loss(frozen_context.continued(model, context, segment), segment)
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] / 2
    stale, fresh = frozen_context.staleness(model, context, segment)
    assert stale > 1e-4
    with torch.no_grad():
        learnt = loss(frozen_context.continued(model.eval(), fresh, segment), segment).item()
    assert learnt < losses[0] / 2  # judged as it will be used, with the context encoded by the new weights


def test_staleness_is_the_divergence_of_frozen_from_fresh_logits() -> None:
    model, segment = pico.build("llama"), ids(2, 6, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    context = frozen_context.freeze(model, ids(2, 9))
    assert frozen_context.staleness(model, context, segment, mask)[0] < 1e-9
    found = []
    with torch.no_grad():
        for _ in range(2):
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
            stale, fresh = frozen_context.staleness(model, context, segment, mask)
            whole = model(input_ids=torch.cat([ids(2, 9), segment], 1), use_cache=False).logits[:, 9:]
            new, old = (x.log_softmax(-1) for x in (whole, frozen_context.continued(model, context, segment)))
            slow = [(new[i, j].exp() * (new[i, j] - old[i, j])).sum() for i, n in ((0, 6), (1, 3)) for j in range(n)]
            assert stale == pytest.approx(float(sum(slow)) / 9, rel=1e-2)
            assert frozen_context.staleness(model, fresh, segment, mask)[0] < 1e-9
            found.append(stale)
    assert found[1] > found[0] > 0


def test_examples_are_cut_before_the_token_that_predicts_the_first_label() -> None:
    batch = torch.tensor([[5, 6, 7, 8, 0], [9, 10, 11, 12, 13]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 8, -100], [-100, 10, -100, 12, 13]])
    cut = frozen_context.split(batch, mask, labels)
    assert cut.context_ids.tolist() == [[5, 6], [0, 0]]
    assert cut.context_mask.tolist() == [[1, 1], [0, 0]]
    assert cut.segment_ids.tolist() == [[7, 8, 0, 0, 0], [9, 10, 11, 12, 13]]
    assert cut.segment_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert cut.labels.tolist() == [[-100, 8, -100, -100, -100], [-100, 10, -100, 12, 13]]


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_of_cut_examples_is_that_of_whole_ones(name: str, pico_model: Any) -> None:
    model = pico_model(name)
    rows = pico.sequences(3, 8, 14, seed=5)
    batch = pico.left_padded(rows)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, frozen_context.IGNORED)
    for row, length in enumerate(map(len, rows)):
        labels[row, : labels.shape[1] - length + 3 + row] = frozen_context.IGNORED
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = loss(model(**batch, position_ids=positions, use_cache=False).logits, labels)
        cut = frozen_context.split(**batch, labels=labels)
        context = frozen_context.freeze(model, cut.context_ids, cut.context_mask)
        got = loss(frozen_context.continued(model, context, cut.segment_ids, cut.segment_mask), cut.labels)
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-5)


def test_what_has_nothing_to_decide_is_refused_all_at_once() -> None:
    batch = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7]])
    labels = torch.tensor([[-100, -100, -100], [-100, -100, 7], [5, 6, 7]])
    with pytest.raises(UsageError) as caught:
        frozen_context.split(batch, torch.ones_like(batch), labels)
    assert len(caught.value.problems) == 2
    assert "example 1 of the batch has no label" in str(caught.value)


def test_contexts_padded_on_the_right_and_other_rows_are_refused(llama: Any) -> None:
    with pytest.raises(UsageError, match="not padded on the left"):
        frozen_context.freeze(llama, ids(1, 3), torch.tensor([[1, 1, 0]]))
    context = frozen_context.freeze(llama, ids(2, 3))
    with pytest.raises(UsageError, match="3 segments for 2 contexts"):
        frozen_context.continued(llama, context, ids(3, 3))


def test_a_model_with_states_of_its_own_kind_is_refused(pico_model: Any) -> None:
    with pytest.raises(ModelError, match="can't be frozen"):
        frozen_context.freeze(pico_model("minimax"), ids(1, 3))
