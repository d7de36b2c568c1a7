"""The sentence of a verdict, on figures of which the verdict is known."""

from __future__ import annotations

import pytest
import torch

from probes.statistics.paired import difference
from probes.statistics.verdict import verdict
from steer.evaluation.arms.arm import Arm
from steer.evaluation.arms.subjects import Subject
from steer.evaluation.judgement import Judged, Metric, judged, sentence, value_of
from steer.evaluation.measuring.divergences import Divergence
from steer.evaluation.planning import Plan
from vectors.storage.files import finite

KL = Divergence(*[0.0] * len(Divergence._fields))


def judgement(effect: float, *, spread: float = 0.3, groups: list[str] | None = None, items: int = 64) -> Judged:
    """A subject that moves every item by `effect` and noise, against its negation and draws that lie `spread` apart."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(items, generator=generator)
    moved = effect + 0.1 * torch.randn(items, generator=generator)
    draws = base + spread * torch.randn(8, 1, generator=generator) + 0.05 * torch.randn(8, items, generator=generator)
    controls = {"base": base[None], "negation": (base - moved)[None], "shuffled": draws}
    found = verdict(base + moved, controls, groups)
    metric = Metric("margin", "nats per token", list(range(items)), groups, None)
    return Judged(metric, difference(moved, groups), found, None, [], None, None, None, None, None)


def test_the_detectable_difference_is_that_of_the_control_that_is_hardest_to_beat() -> None:
    judged = judgement(0.2)
    said = sentence("warm", [judged], KL)
    _, negation, shuffled = judged.verdict.against
    assert not shuffled.beaten
    assert f"a difference of {shuffled.detectable:.3f} from shuffled would be detected" in said
    assert shuffled.detectable > 10 * judged.effect.detectable
    # A difference from the negation is two effects, so it is the easier one to find at up to twice the size.
    even = judgement(0.2, spread=0.0)
    _, negation, shuffled = even.verdict.against
    assert negation.detectable > shuffled.detectable
    assert "from negation would be" not in sentence("warm", [even], KL)


def test_what_changes_no_item_has_no_detectable_difference_and_no_share_of_items() -> None:
    base = torch.randn(64, generator=torch.Generator().manual_seed(0))
    figures = {name: base for name in ("base", "none", "minus none")}
    subject = Subject("none", "composition", Arm("none"), "0*warm")
    plan = Plan(subject, {"base": [Arm("base")]}, {"opposite": Arm("minus none")})
    metric = Metric("margin", "nats per token", list(range(64)), None, None)
    found = judged(plan, metric, figures, None, {}, {}, 0.0, frozenset(), 0)
    assert found.slopes is None
    assert found.verdict.outcome == "does not work"
    assert "would be detected" not in sentence("none", [found], KL)
    assert finite(value_of(found))["against"][0]["detectable"] is None


@pytest.mark.parametrize(
    ("items", "groups", "reason"),
    [
        (20, None, "and there are only 20 items; a verdict takes at least 30"),
        (64, [str(i % 3) for i in range(64)], "and the items belong to 3 groups; a verdict takes at least 8"),
    ],
)
def test_what_is_too_few_is_named(items: int, groups: list[str] | None, reason: str) -> None:
    said = sentence("warm", [judgement(0.2, items=items, groups=groups)], KL)
    assert said.startswith("warm can't be judged: ")
    assert reason in said


def test_what_a_prompt_does_to_each_item_cancels_where_the_subject_is_added_to_it() -> None:
    generator = torch.Generator().manual_seed(0)
    base, prompted = torch.randn(2, 64, generator=generator)
    moves = 0.2 + 0.05 * torch.randn(64, generator=generator)
    figures = {"base": base, "warm": base + moves, "kind": base + 3 * prompted, "both": base + 3 * prompted + moves}
    subject = Subject("warm", "composition", Arm("warm"), "1*warm")
    others = {"prompt": Arm("kind"), "prompt + subject": Arm("both")}
    metric = Metric("margin", "nats per token", list(range(64)), None, None)
    plan = Plan(subject, {"base": [Arm("base")]}, others)
    found = judged(plan, metric, figures, None, {}, {}, 0.0, frozenset(), 0)
    assert found.added_to_prompt is not None
    assert found.beyond_prompt is not None
    assert found.added_to_prompt.mean == pytest.approx(float(moves.mean()), abs=1e-6)
    assert found.added_to_prompt.error == pytest.approx(found.effect.error, rel=1e-6)
    assert found.beyond_prompt.error > 20 * found.added_to_prompt.error
    alone = judged(Plan(subject, plan.controls), metric, figures, None, {}, {}, 0.0, frozenset(), 0)
    assert (alone.beyond_prompt, alone.added_to_prompt) == (None, None)
