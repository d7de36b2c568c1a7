"""Many compositions at once give the numbers of the reference, one composition at a time."""

import pico
import pytest
import torch

from probes.arms import layout, scores
from probes.arms.scores import Completions
from probes.interventions import no_intervention, steering
from probes.logits import completion_logits, log_likelihoods
from probes.models import residual
from probes.models.completions import Completion
from probes.scores.divergence import divergence
from vectors.errors import ArtifactError
from vectors.steering import SteeringVector

NAMES = sorted(set(pico.NAMES) | {"opt"})


def completions(pairs: int = 4) -> list[Completion]:
    """Pairs of completions behind one prompt each; all prompts begin alike, and one completion is a single token."""
    beginning, prompts, answers = (
        pico.sequences(1, 6, 6)[0],
        pico.sequences(pairs, 1, 5),
        pico.sequences(2 * pairs, 1, 6, seed=1),
    )
    result = []
    for index, prompt in enumerate(prompts):
        for side in (0, 1):
            result.append(Completion([*beginning, *prompt], answers[2 * index + side]))
    return [*result, Completion(result[0].prompt_ids, [7])]


def vectors() -> dict[str, SteeringVector]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: SteeringVector({layer: torch.randn(pico.HIDDEN, generator=generator) for layer in range(pico.LAYERS)})
        for name in ("a", "b")
    }


EXPRESSIONS = [
    None, "0.5*a[1]", "-0.5*a[1]", "0*a[0]", "0.3*a[0-2] - 0.4*b[3]", "ablate(a[2])", "clamp(b[1], 0.5)@response",
    "a[3]@prompt", "0.7*b[2]@first:2 + 0.2*a[1]@after:1",
]  # fmt: skip


def reference(model, items, base, expression):  # type: ignore[no-untyped-def]
    steered = no_intervention if expression is None else steering(model, expression, vectors())
    logits = dict(completion_logits(model, items, steered))
    return (
        [log_likelihoods(logits[i], item.completion_ids) for i, item in enumerate(items)],
        [divergence(base[i], logits[i]).tolist() for i in range(len(items))],
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_gives_the_numbers_of_one_pass_for_each_composition(name: str) -> None:
    model, items = pico.build(name), completions()
    base = dict(completion_logits(model, items))
    measured = Completions(model, items, divergence=True).scores(EXPRESSIONS, vectors())
    for expression, scored in zip(EXPRESSIONS, measured, strict=True):
        logs, divergences = reference(model, items, base, expression)
        for ours, theirs in ((scored.log_likelihoods, logs), (scored.divergences, divergences)):
            assert [len(each) for each in ours] == [len(each) for each in theirs]
            assert all(
                torch.allclose(a, torch.tensor(b).double(), rtol=0, atol=1e-5)
                for a, b in zip(ours, theirs, strict=True)
            )
    assert pico.hooks(model) == 0  # and nothing else is left behind
    assert not any("forward" in module.__dict__ for module in model.modules())


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_neither_order_nor_sizes_of_batches_nor_company_change_a_number(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, items = pico.build(name), completions()
    before = Completions(model, items, divergence=True).scores(EXPRESSIONS, vectors())
    monkeypatch.setattr(layout, "PASS", 16)
    monkeypatch.setattr(layout, "PACK", 4)
    monkeypatch.setattr(scores, "PASS", 64)
    monkeypatch.setattr(scores, "VALUES", 3 * pico.VOCABULARY)
    monkeypatch.setattr(scores, "KEPT", 0)
    measured = Completions(model, items[::-1], divergence=True)
    for expression, expected in reversed(list(zip(EXPRESSIONS, before, strict=True))):
        (after,) = measured.scores([expression], vectors())
        assert close(after.log_likelihoods[::-1], expected.log_likelihoods)
        assert close(after.divergences[::-1], expected.divergences)


@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2"])
def test_threads_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "PASS", 1)  # an arm in each pass, so that there are passes to share out
    monkeypatch.setattr(scores, "VALUES", 3 * pico.VOCABULARY)
    model, items = pico.build(name), completions()
    of_threads, before = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            of_threads.append(Completions(model, items, divergence=True).scores([*EXPRESSIONS, None], vectors()))
    finally:
        torch.set_num_threads(before)
    for one, several in zip(*of_threads, strict=True):
        for a, b in ((one.log_likelihoods, several.log_likelihoods), (one.divergences, several.divergences)):
            assert all(map(torch.equal, a, b))
    assert pico.hooks(model) == 0
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_the_unsteered_logits_are_the_model_s(name: str) -> None:
    model, items = pico.build(name), [*completions(), Completion([5, 6], [])]
    expected = dict(completion_logits(model, items[:-1]))
    *logits, none = Completions(model, items, divergence=True).unsteered_logits()
    assert none.numel() == 0
    for index, each in enumerate(logits):
        assert torch.allclose(each, expected[index], rtol=0, atol=1e-5)


def test_what_compositions_share_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = pico.build("llama"), completions()
    tokens = [0] * pico.LAYERS
    for layer, block in enumerate(residual.blocks(model)):

        def count(_module: object, inputs: tuple[torch.Tensor], layer: int = layer) -> None:
            tokens[layer] += inputs[0].shape[0] * inputs[0].shape[1]

        block.mlp.register_forward_pre_hook(count)
    strengths = (-2, -1, 1, 2)
    Completions(model, items).scores([f"{s}*a[{layer}]" for layer in range(4) for s in strengths], vectors())
    distinct = {tuple(each.ids[:length]) for each in items for length in range(1, each.length)}
    # Once to know the stream at each layer, and then once for each strength at each layer below.
    assert tokens == [len(distinct) * (1 + len(strengths) * layer) for layer in range(4)]


def test_a_completion_without_tokens_has_no_figures() -> None:
    model = pico.build("llama")
    (scored,) = Completions(model, [Completion([5, 6], []), Completion([5], [7])]).scores(["a[1]"], vectors())
    assert [len(each) for each in scored.log_likelihoods] == [0, 1]
    assert scored.divergences == []
    (none,) = Completions(model, [Completion([5, 6], [])], divergence=True).scores([None])
    assert [len(each) for each in none.divergences] == [0]


def test_a_vector_of_another_size_is_refused() -> None:
    with pytest.raises(ArtifactError, match="hidden size 3"):
        Completions(pico.build("llama"), completions()).scores([{1: torch.ones(3)}])


def test_a_small_divergence_keeps_its_digits() -> None:
    model, items = pico.build("llama"), completions()
    one, ten = Completions(model, items, divergence=True).scores(["0.001*a[1]", "0.01*a[1]"], vectors())
    # A divergence grows with the square of a small change.
    ratio = torch.cat(ten.divergences).sum() / torch.cat(one.divergences).sum()
    assert float(ratio) == pytest.approx(100, rel=0.1)
