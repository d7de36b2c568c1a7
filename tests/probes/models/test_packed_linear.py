"""Linear layers with reordered weights give what PyTorch gives, and only where nothing else is at work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from probes.models import packed_linear as room
from probes.models.packed_linear import packed_linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 12, bias=False)).to(dtype)


def packed(model: nn.Module) -> list[bool]:
    return ["forward" in each.__dict__ for each in model if isinstance(each, nn.Linear)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 5, 24), (0, 24), (2, 0, 24)])
def test_the_rows_are_those_of_the_plain_layers(shape: tuple[int, ...]) -> None:
    model, rows = layers(), torch.randn(*shape)
    with torch.inference_mode():
        plain = model(rows)
        with packed_linear(model):
            assert packed(model) == [True, True]
            result = model(rows)
        torch.testing.assert_close(result, plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(rows), plain, atol=0, rtol=0)
    assert packed(model) == [False, False]


def test_rows_may_lie_apart_in_memory() -> None:
    model, rows = layers(), torch.randn(9, 24, 2)[:, :, 1][::2]
    with torch.inference_mode(), packed_linear(model):
        result = model(rows)
    torch.testing.assert_close(result, model(rows).detach(), atol=1e-5, rtol=1e-5)


def test_the_weights_are_those_at_the_time_of_entry() -> None:
    model, rows = layers(), torch.randn(4, 24)
    with torch.inference_mode(), packed_linear(model):
        before = model(rows)
    model[2].weight.data.mul_(2)
    with torch.inference_mode(), packed_linear(model):
        torch.testing.assert_close(model(rows), 2 * before)


def test_an_inner_context_leaves_the_outer_one_at_work() -> None:
    model = layers()
    with packed_linear(model):
        outer = [each.__dict__["forward"] for each in (model[0], model[2])]
        with packed_linear(model):
            pass
        assert [each.__dict__["forward"] for each in (model[0], model[2])] == outer
    assert packed(model) == [False, False]


def test_a_model_stays_as_it_was_where_memory_does_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, copy, made = layers(), room._forward, []

    def second_fails(layer: nn.Linear) -> object:
        made.append(layer)
        if len(made) == 2:
            raise RuntimeError("not enough memory")
        return copy(layer)

    monkeypatch.setattr(room, "_forward", second_fails)
    with pytest.raises(RuntimeError, match="not enough memory"), packed_linear(model):
        pass
    assert packed(model) == [False, False]


def test_a_pass_with_gradients_is_the_plain_one() -> None:
    model, rows = layers(), torch.randn(4, 24, requires_grad=True)
    with packed_linear(model):
        model(rows).sum().backward()
    assert rows.grad is not None
    assert model[0].weight.grad is not None


def test_hooks_of_a_layer_run() -> None:
    model = layers()
    model[2].register_forward_hook(lambda _module, _inputs, output: output + 1)
    rows = torch.randn(4, 24)
    with torch.inference_mode():
        plain = model(rows)
        with packed_linear(model):
            torch.testing.assert_close(model(rows), plain, atol=1e-5, rtol=1e-5)


def test_what_computes_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Linear):
        pass

    offloaded = layers()
    other = offloaded[0].forward = nn.Linear.forward.__get__(offloaded[0])
    with packed_linear(offloaded):
        assert offloaded[0].__dict__["forward"] is other
        assert packed(offloaded) == [True, True]
    assert offloaded[0].__dict__["forward"] is other
    assert packed(offloaded) == [True, False]
    for model in (layers(torch.bfloat16), nn.Sequential(Other(3, 3)), layers().to("meta")):
        with packed_linear(model):
            assert not any(packed(model))
    monkeypatch.setattr(room, "MOST", 100)
    model = layers()
    with packed_linear(model):
        assert packed(model) == [False, False]
