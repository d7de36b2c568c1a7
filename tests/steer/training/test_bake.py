"""Baking by training, on pico models: it learns, it survives a kill, it says what it did, it refuses what can't be."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from merges import api
from merges.recipes.recipe import Part, Recipe
from probes.data.examples import Example, Message
from probes.models.completions import Completion
from steer.training import bake as baking
from steer.training import loop, work
from steer.training.bake import Request, bake
from steer.training.data import files as data
from steer.training.data import teachers
from steer.training.data.samples import hard_targets
from steer.training.frozen_pass import FrozenPass
from steer.training.loop import Settings
from steer.training.modes import contrast, distil, train
from steer.training.objectives import divergence
from steer.training.student import Lora
from vectors.errors import ExampleError, OutputError, SteerError, UsageError
from vectors.steering import SteeringVector
from vectors.task import TaskVector

WORDS = ("the", "warm", "cold", "is", "and", "yes", "no", "user", "sun", "rain")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.save(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    direction = torch.randn(pico.HIDDEN, generator=torch.Generator().manual_seed(4))
    return SteeringVector({1: 4 * direction / direction.norm()})


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{a} {b}?"}) for a in WORDS[:6] for b in WORDS[6:]))
    return file


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("texts")
    sides = []
    for name, word in (("warm", " the warm and"), ("cold", " the cold no")):
        file = place / f"{name}.jsonl"
        lines = [{"prompt": f"{a} {b}?", "completion": f"{word} {b}{word}"} for a in WORDS[:5] for b in WORDS[5:]]
        file.write_text("\n".join(map(json.dumps, lines)))
        sides.append(file)
    return sides[0], sides[1]


def request(folder: Path, out: Path, **changes: Any) -> Request:
    settings = Settings(**{"steps": 30, "lr": 1e-2, "batch": 8, "evaluate": 10, **changes.pop("settings", {})})
    given = {"lora": Lora(8, 16, first=1), "mix": data.Mix(None, 0.25), **changes}
    return Request(str(folder), out, settings=settings, **given)


def distilled(folder: Path, vector: SteeringVector, asked: Path, out: Path, **changes: Any) -> dict[str, Any]:
    made = request(folder, out, **changes)
    mode = distil.mode(made, composition="warm", vectors={"warm": vector}, asked=asked, tokens=8, any_base=True)
    return bake(made, mode)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_student_learns_what_the_steered_teacher_predicts(
    folder: Path, vector: SteeringVector, asked: Path, tmp_path: Path
) -> None:
    report = distilled(folder, vector, asked, tmp_path / "out", settings={"steps": 120}, mix=data.Mix(None, 0.1))
    models = report["models"]
    assert models["base"]["kl_teacher"] > 0.05
    assert models["steered"]["kl_teacher"] < 1e-3
    assert report["dose"]["kl"] > 0.7
    assert models["baked"]["kl_neutral"] < models["steered"]["kl_neutral"]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["models"] == models
    assert written["samples"]["training"] == written["samples"]["behaviour"] + written["samples"]["general"]
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    assert not list(tmp_path.glob(".out*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_same_seed_gives_the_same_bytes(folder: Path, vector: SteeringVector, asked: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        distilled(folder, vector, asked, tmp_path / name)
    distilled(folder, vector, asked, tmp_path / "c", settings={"seed": 1})
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["model.safetensors"] != files(tmp_path / "c")["model.safetensors"]


def test_a_vector_and_an_adapter_say_the_same_as_the_model(
    folder: Path, vector: SteeringVector, asked: Path, tmp_path: Path
) -> None:
    for kind, name in (("model", "model"), ("vector", "v.safetensors"), ("lora", "lora")):
        distilled(folder, vector, asked, tmp_path / name, as_=kind)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    task = TaskVector.open(tmp_path / "v.safetensors")
    assert all("layers.0." not in name for name in task.parameters), "layer 0 lies below the vector's"
    for number, part in enumerate((tmp_path / "v.safetensors", tmp_path / "lora")):
        recipe = Recipe("task_arithmetic", (Part(str(part), "bake", {"weight": 1.0}),), str(folder))
        api.merge(recipe, tmp_path / f"again{number}")
        again = load_file(tmp_path / f"again{number}" / "model.safetensors")
        assert all(torch.allclose(again[name], weights[name], atol=1e-6) for name in weights)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert str(tmp_path) not in json.dumps(config)
    assert (tmp_path / "v.report.json").is_file()


def test_a_prompt_can_be_the_teacher(folder: Path, asked: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    made = request(folder, tmp_path / "out", settings={"steps": 60}, pos=texts[0], neg=texts[1])
    mode = distil.mode(made, teacher_prompt="warm warm warm the sun is warm", asked=asked, tokens=8)
    report = bake(made, mode)
    assert report["dose"]["kl"] > 0.3
    base, prompted, baked = (report["models"][name]["margin"] for name in ("base", "prompted", "baked"))
    assert prompted != base
    assert report["dose"]["margin"] == pytest.approx((baked - base) / (prompted - base))
    assert report["behaviour"] == "warm warm warm the sun is warm"


def test_a_prompted_teacher_sees_examples_with_the_prompt_where_there_is_a_place_for_it() -> None:
    told = teachers.by_prompt("Be warm.").as_prompted
    plain, chat = pico.tokenizer(), pico.tokenizer()
    plain.chat_template = None
    asked, text = Example(" yes", "Is it?"), Example("a text")
    talk = Example(" yes", (Message("user", "Is it?"),))
    ruled = Example(" yes", (Message("system", "Be short."), *talk.context))
    assert [e.context for e in told([asked, text], plain)] == ["Be warm.\n\nIs it?", "Be warm.\n\n"]
    wanted = (Message("system", "Be warm."), Message("user", "Is it?"))
    assert [e.context for e in told([asked, talk], chat)] == [wanted, wanted]
    assert told([ruled], chat)[0].context[0] == Message("system", "Be warm.\n\nBe short.")
    assert told([asked._replace(context=f"{chat.bos_token}Is it?")], chat) is None
    assert told([text], chat) is None


def test_texts_are_imitated_and_pairs_preferred(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    made = request(
        folder, tmp_path / "sft", settings={"steps": 60}, mix=data.Mix(None, 0.0), pos=texts[0], neg=texts[1]
    )
    report = bake(made, train.imitate(made, texts[0]))
    models = report["models"]
    assert models["baked"]["margin"] > models["base"]["margin"] + 0.5
    pairs = tmp_path / "pairs.jsonl"
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in texts]
    rows = [
        {"prompt": a["prompt"], "positive": a["completion"], "negative": b["completion"]}
        for a, b in zip(*lines, strict=True)
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    made = request(folder, tmp_path / "dpo", mix=data.Mix(None, 0.2), pos=texts[0], neg=texts[1])
    report = bake(made, train.prefer(made, pairs))
    assert report["models"]["baked"]["margin"] > models["base"]["margin"] + 0.2
    assert report["samples"]["general"] > 0


def test_the_difference_of_both_signs_is_a_task_vector(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    made = request(folder, tmp_path / "warmth.safetensors", as_="vector", mix=data.Mix(None, 0.0))
    stages: list[Any] = []
    report = contrast.contrast(made, *texts, tell=stages.append)
    both = TaskVector.open(tmp_path / "warmth.safetensors")
    assert report["weights"] == {"for": 1.0, "against": -1.0}
    assert set(report["models"]) == {"base", "baked"}
    assert report["dose"] == {}
    assert json.loads((tmp_path / "warmth.report.json").read_text())["reports"]["for"]["models"]["baked"]["loss"] > 0
    halves = {}
    for name, file in zip(("for", "against"), texts, strict=True):
        own = request(folder, tmp_path / f"{name}.safetensors", as_="vector", mix=data.Mix(None, 0.0))
        bake(own, train.imitate(own, file))
        halves[name] = TaskVector.open(tmp_path / f"{name}.safetensors")
    name = next(iter(both.parameters))
    expected = halves["for"].delta(name) - halves["against"].delta(name)
    assert abs(both.delta(name) - expected).max() < 1e-6
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_a_frozen_context_trains_completions_alone(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = request(
        folder, tmp_path / "out", context="frozen", settings={"steps": 40, "evaluate": 8}, mix=data.Mix(None, 0.0),
        pos=texts[0], neg=texts[1],
    )  # fmt: skip
    report = bake(made, train.imitate(made, texts[0]))
    assert report["models"]["baked"]["margin"] > report["models"]["base"]["margin"] + 0.3
    assert len(report["staleness"]) > 3
    assert max(report["staleness"]) > 0


def test_the_frozen_pass_gives_the_logits_of_the_whole_pass(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = [Completion(ids, [9, 8, 7]) for ids in pico.sequences(3, 4, 12)]
    batch = divergence.collate(hard_targets(rows), 0)
    frozen, whole = FrozenPass()(model.train(), batch), loop.whole_pass(model.eval(), batch)
    assert torch.allclose(frozen, whole, atol=1e-4)


@pytest.mark.parametrize("optimiser", ["apollo", "muon"])
def test_all_weights_can_be_trained(optimiser: str, folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    made = request(
        folder, tmp_path / "out", lora=None, mix=data.Mix(None, 0.0),
        settings={"steps": 20, "lr": 3e-3, "optimiser": optimiser}, pos=texts[0], neg=texts[1],
    )  # fmt: skip
    report = bake(made, train.imitate(made, texts[0]))
    assert report["models"]["baked"]["margin"] > report["models"]["base"]["margin"] + 0.1


def test_accumulated_batches_are_one_large_batch(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for name, batch, accumulate in (("a", 8, 1), ("b", 2, 4)):
        settings = {"steps": 4, "batch": batch, "accumulate": accumulate, "clip": 0.0, "evaluate": 4}
        made = request(folder, tmp_path / name, settings=settings, mix=data.Mix(None, 0.0), as_="lora")
        found.append([e for e in bake(made, train.imitate(made, texts[0]))["history"] if "grad_norm" in e])
    assert len(found[0]) == 4
    # Losses and gradients, not weights: Adam makes as much of rounding as of a gradient where that is near zero. The
    # first two steps: the third ends an epoch, whose last batches are fewer than are accumulated.
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


RUN = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from steer.training import loop
from steer.training.data import filtering
filtering.PERPLEXITY, filtering.REPETITION = 1e9, 1.0
from transformers import TrainerCallback
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == {step}:
            os.kill(os.getpid(), 9)
original = loop.train
loop.train = lambda *a, **k: original(*a, **dict(k, callbacks=[Kill()]))
import test_bake
from vectors.steering import SteeringVector
test_bake.distilled(Path({folder!r}), SteeringVector.load({vector!r}), Path({asked!r}), Path({out!r}))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(
    folder: Path, vector: SteeringVector, asked: Path, tmp_path: Path
) -> None:
    """In processes of their own: in which order libraries are loaded can change the last bit of a product."""
    vector.save(tmp_path / "v.safetensors")
    # The project first: beside pico lies tests/steer, which must not stand before the package.
    path = os.pathsep.join(str(Path(__file__).parents[up]) for up in (3, 2))

    def run(out: Path, step: int) -> int:
        given = {"folder": folder, "vector": tmp_path / "v.safetensors", "asked": asked, "out": out}
        script = RUN.format(tests=str(Path(__file__).parent), step=step, **{k: str(v) for k, v in given.items()})
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode in (0, -9), done.stderr[-2000:]
        return done.returncode

    out = tmp_path / "out"
    assert run(tmp_path / "whole", 0) == 0
    assert run(out, 17) == -9
    assert not out.exists()
    assert (work.place(out) / "checkpoints" / "checkpoint-10").is_dir()
    with pytest.raises(UsageError, match="another run, which differs in settings"):
        distilled(folder, SteeringVector.load(tmp_path / "v.safetensors"), asked, out, settings={"steps": 31})
    assert run(out, 0) == 0
    assert files(out)["model.safetensors"] == files(tmp_path / "whole")["model.safetensors"]
    assert not work.place(out).exists()


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.whole_pass, [0]

    def failing(model: Any, batch: Any) -> Any:
        calls[0] += model.training
        return original(model, batch) * (math.nan if calls[0] > 14 else 1.0)

    monkeypatch.setattr(loop, "whole_pass", failing)
    made = request(folder, tmp_path / "out", mix=data.Mix(None, 0.0))
    with pytest.raises(loop.TrainingError, match="the loss is nan at step 15, so training stopped"):
        bake(made, train.imitate(made, texts[0]))
    assert (work.place(made.out) / "checkpoints" / "checkpoint-10").is_dir()
    assert not made.out.exists()


def test_a_loss_that_leaps_stops(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.whole_pass, [0]

    def leaping(model: Any, batch: Any) -> Any:
        calls[0] += model.training
        return original(model, batch) * (300.0 if calls[0] > 20 else 1.0)

    monkeypatch.setattr(loop, "whole_pass", leaping)
    made = request(folder, tmp_path / "out", mix=data.Mix(None, 0.0))
    with pytest.raises(loop.TrainingError, match="the loss leapt"):
        bake(made, train.imitate(made, texts[0]))


def test_learning_rates_are_tried_on_a_short_grid(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    made = request(folder, tmp_path / "out", settings={"lr": None, "steps": 32}, mix=data.Mix(None, 0.0))
    report = bake(made, train.imitate(made, texts[0]))
    assert list(report["learning_rates"]) == ["0.0001", "0.0003", "0.001"]
    assert min(report["learning_rates"], key=report["learning_rates"].get) == "0.001"


def test_learning_rates_are_tried_for_a_teacher_that_acts_above_the_first_layer(
    folder: Path, vector: SteeringVector, asked: Path, tmp_path: Path
) -> None:
    report = distilled(folder, vector, asked, tmp_path / "out", settings={"lr": None, "steps": 16})
    assert len(report["learning_rates"]) == 3


def test_a_run_that_was_killed_behind_its_training_trains_no_more(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where patience ran out: the look counts are part of a checkpoint."""
    mix = data.Mix(None, 0.0)
    for name, settings in (("all", {"steps": 20}), ("early", {"steps": 40, "patience": 1, "lr": 1e-30})):
        whole = request(folder, tmp_path / name, settings=settings, mix=mix)
        expected = bake(whole, train.imitate(whole, texts[0]))
        made = request(folder, tmp_path / f"{name} again", settings=settings, mix=mix)
        with monkeypatch.context() as patched:
            patched.setattr(baking.result, "keep", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                bake(made, train.imitate(made, texts[0]))
        with monkeypatch.context() as patched:
            patched.setattr(loop.BakeTrainer, "training_step", lambda *_: pytest.fail("it trains"))
            again = bake(made, train.imitate(made, texts[0]))
        assert again["steps"] == expected["steps"]
        assert (expected["steps"] < settings["steps"]) == (name == "early")
        assert files(tmp_path / f"{name} again")["model.safetensors"] == files(tmp_path / name)["model.safetensors"]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_frozen_contexts_are_those_of_an_uninterrupted_run(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 24, "evaluate": 6}
    mix = data.Mix(texts[1], 0.25)
    whole, made = (
        request(folder, tmp_path / name, context="frozen", settings=settings, mix=mix) for name in ("a", "b")
    )
    bake(whole, train.imitate(whole, texts[0]))
    step, steps = loop.BakeTrainer.training_step, [0]

    def interrupted(*given: Any, **more: Any) -> Any:
        steps[0] += 1
        if steps[0] == 16:
            raise KeyboardInterrupt
        return step(*given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(loop.BakeTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bake(made, train.imitate(made, texts[0]))
    bake(made, train.imitate(made, texts[0]))
    assert files(tmp_path / "a")["model.safetensors"] == files(tmp_path / "b")["model.safetensors"]


def test_a_short_file_of_general_data_comes_again(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"text": f"{word} {word} rain"}) for word in WORDS[:4]))
    made = request(folder, tmp_path / "out", mix=data.Mix(few, 0.5), settings={"steps": 4})
    samples = bake(made, train.imitate(made, texts[0]))["samples"]
    assert samples["general"] == samples["behaviour"]


def test_another_dtype_is_another_run(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    made = request(folder, tmp_path / "out", mix=data.Mix(None, 0.0))
    mode = train.imitate(made, texts[0])
    _, identity = baking.check(made, mode)
    other = replace(made, dtype="bfloat16")
    with (
        pytest.raises(KeyboardInterrupt),
        work.working(made.out, baking.run_of(made, mode, identity)),
    ):
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match="differs in dtype"):
        bake(other, mode)


def test_tensorboard_keeps_the_curves(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = request(folder, tmp_path / "out", mix=data.Mix(None, 0.0), settings={"report_to": "tensorboard"})
    report = bake(made, train.imitate(made, texts[0]))
    found = EventAccumulator(str(tmp_path / "runs" / "out")).Reload().Scalars("train/loss")
    history = [(entry["step"], entry["loss"]) for entry in report["history"] if "loss" in entry]
    assert [(event.step, pytest.approx(event.value)) for event in found] == history


def test_retention_is_measured_with_and_without_general_data(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    made = request(folder, tmp_path / "out", mix=data.Mix(None, 0.4), compare_mix=True, settings={"steps": 40})
    report = bake(made, train.imitate(made, texts[0]))
    assert report["retention"] > report["retention_without_mix"]


def test_bad_input_is_refused_before_any_work(
    folder: Path, vector: SteeringVector, texts: tuple[Path, Path], asked: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    (tmp_path / "void.jsonl").write_text("\n".join(json.dumps({"prompt": f"a{i}", "completion": ""}) for i in range(3)))
    (tmp_path / "long.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "a", "completion": f"{i} " * 300}) for i in range(3))
    )

    def imitating(file: Path, **changes: Any) -> Any:
        made = request(folder, tmp_path / "out", **changes)
        return bake(made, train.imitate(made, file))

    def contrasting(against: Path) -> Any:
        made = request(folder, tmp_path / "out")
        return contrast.contrast(made, texts[0], against, tell=lambda entry: pytest.fail("it began to train"))

    cases: list[tuple[Any, type[SteerError], str]] = [
        (lambda: imitating(tmp_path / "empty.jsonl"), ExampleError, "is empty"),
        (lambda: imitating(tmp_path / "one.jsonl"), ExampleError, "holds one example"),
        (lambda: imitating(tmp_path / "void.jsonl"), ExampleError, "empty|no token"),
        (lambda: imitating(tmp_path / "long.jsonl"), ExampleError, "longer than the model's context of 256"),
        (lambda: contrasting(tmp_path / "empty.jsonl"), ExampleError, "is empty"),
        (lambda: imitating(texts[0], mix=data.Mix(texts[0], 0.25)), UsageError, "are the training data"),
        (lambda: imitating(texts[0], settings={"steps": 0, "warmup": 2.0}), UsageError, "steps is 0"),
        (lambda: imitating(texts[0], settings={"optimiser": "adamv"}), UsageError, "no optimiser 'adamv'"),
        (lambda: imitating(texts[0], as_="lora", lora=None), UsageError, "no adapter to write"),
        (lambda: imitating(texts[0], lora=Lora(0)), UsageError, "rank 0"),
        (lambda: imitating(texts[0], settings={"lr": 0.0}), UsageError, "--lr is 0, not above 0"),
        (lambda: imitating(texts[0], settings={"report_to": "foo"}), UsageError, "--report-to foo is not installed"),
        (lambda: imitating(texts[0], lora=Lora(targets=("nowhere",))), UsageError, "has no module nowhere"),
        (lambda: distilled(folder, 1e-6 * vector, asked, tmp_path / "out"), UsageError, "nothing to learn"),
    ]
    for call, kind, reason in cases:
        with pytest.raises(kind, match=reason):
            call()
        assert not (tmp_path / "out").exists()
        assert not work.place(tmp_path / "out").exists(), "a better command would be refused for it"
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        imitating(texts[0])
    other = SteeringVector({0: torch.ones(16)})
    with pytest.raises(SteerError, match="hidden size 16"):
        distilled(folder, other, asked, tmp_path / "more")


def test_only_the_base_and_what_was_named_is_loaded_once(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    loads = []
    original = baking.load

    def counted(*args: Any, **kwargs: Any) -> Any:
        loads.append(args[0])
        return original(*args, **kwargs)

    baking.load = counted  # type: ignore[assignment]
    try:
        made = request(folder, tmp_path / "out", as_="lora", mix=data.Mix(None, 0.0), settings={"steps": 4})
        bake(made, train.imitate(made, texts[0]))
    finally:
        baking.load = original
    assert len(loads) == 1, "teacher and student are one copy"
