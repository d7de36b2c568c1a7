"""Baking by training: prepare samples, train a student, write the result, measure what was written, say everything."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from merges.inputs.sources import Source, open_source
from probes import evaluation_set
from probes.data.reading import read
from probes.evaluation_set import Behaviour, EvaluationSet, contrast_of, evaluate
from probes.interventions import no_intervention
from probes.models.loading import LoadedModel, find, load
from steer.folding import model_folder
from steer.folding.fold import identity_of
from steer.reports import training as training_report
from steer.training import loop, result, student, work
from steer.training.data import files, samples
from steer.training.data.samples import BEHAVIOUR, Sample
from steer.training.data.teachers import Teacher
from steer.training.distributed import processes, sharding
from steer.training.frozen_pass import FrozenPass
from steer.training.loop import Settings
from steer.training.objectives.protocol import Objective
from steer.training.student import Lora
from vectors.errors import SteerError, UsageError, kept, raise_together
from vectors.files import canonical_json, digest_json, write_atomically
from vectors.folders import new_folder

Tell = Callable[[dict[str, Any]], None]
WITHOUT_MIX = "without-mix"
TRAIN, HELD_OUT, COUNTS = "train.safetensors", "held_out.safetensors", "counts.json"  # in the folder of a run


@dataclass(frozen=True)
class Request:
    """Everything that a training bake follows from."""

    model: str
    out: Path
    as_: str = "model"
    settings: Settings = field(default_factory=Settings)
    lora: Lora | None = field(default_factory=Lora)  # None trains all weights
    mix: files.Mix = field(default_factory=lambda: files.parse_mix(None))
    compare_mix: bool = False  # train once more without general data, and report its retention
    context: str = "full"  # or frozen
    pos: Path | None = None  # held-out examples that show the trait, and its opposite
    neg: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # what the mode adds, as JSON values


class Prepared(NamedTuple):
    """What a mode makes of its inputs: samples to train on and held out, and what they came from."""

    train: list[Sample]
    held_out: list[Sample]
    counts: dict[str, Any]


class Mode(NamedTuple):
    """A way of training: what it is called, what it teaches, its objective, and how its samples are made."""

    name: str
    behaviour: str
    objective: Objective
    teacher: Callable[[LoadedModel], Teacher] | None
    prepare: Callable[[LoadedModel, Teacher | None, Tell], Prepared]
    identity: Mapping[str, Any]  # what its inputs are, by digest


def bake(request: Request, mode: Mode, *, tell: Tell = lambda entry: None) -> dict[str, Any]:
    """Train, write, measure; returns the report. What fails keeps its checkpoints and leaves no output.

    Of several processes only the leading one has a report; the others train with it and return nothing. Raises
    UsageError, ExampleError, ArtifactError, OutputError before any work; TrainingError.
    """
    started = time.monotonic()
    source, identity = check(request, mode)
    run = run_of(request, mode, identity)
    if not processes.is_main():
        _follow(request, mode, work.place(request.out))
        return {}
    going_on = work.check(request.out, run)
    loaded = load(find(request.model), request.device, request.dtype)
    teacher = mode.teacher(loaded) if mode.teacher else None
    shown = contrast_of(loaded, request.pos, request.neg)
    # Neutral text is asked for without a prompt, so the margin is all that can be said of a model that is prompted.
    prompted = teacher.intervention is no_intervention if teacher is not None else False
    as_prompted = (
        contrast_of(loaded, request.pos, request.neg, as_prompted=teacher.as_prompted) if teacher and prompted else None
    )
    with work.working(request.out, run) as place:
        prepared = _prepared(place, going_on, loaded, teacher, mode, tell)
        tell({"stage": "asking the base for neutral text"})
        held_out = [sample for sample in prepared.held_out if sample.kind == BEHAVIOUR]
        behaviour = Behaviour([s.completion for s in held_out], [s.target for s in held_out], teacher is not None)
        measured = evaluation_set.evaluation_set(loaded, shown, behaviour, seed=request.settings.seed)
        tell({"stage": "measuring the base" + (" and the teacher" if teacher is not None else "")})
        models = {"base": evaluate(loaded.model, measured)}
        if teacher is not None and not prompted:
            models["steered"] = evaluate(loaded.model, measured, teacher.intervention)
        elif as_prompted is not None and as_prompted.positive:
            models["prompted"] = {"kl_teacher": 0.0, "margin": evaluation_set.margin(loaded.model, as_prompted)}
        processes.barrier()
        scored = _scored(tell, models["base"].get("kl_teacher", 0.0)) if teacher is not None else tell
        trained, model, more = _train(request, mode, loaded, prepared.train, prepared.held_out, place, scored)
        without = None
        if request.compare_mix:
            tell({"stage": "training once more, without general data"})
            without = _without_mix(request, mode, prepared, measured, models["base"], place, tell)
        processes.close()
        model.eval()
        found: dict[str, Any] = {
            "schema": 1, "mode": mode.name, "behaviour": mode.behaviour, "base": identity,
            "inputs": run["inputs"], "as": request.as_,
            "settings": {**run["settings"], **{key: run[key] for key in ("lora", "mix", "context", "device", "dtype")}},
            "samples": {**prepared.counts, "training": len(prepared.train), "held_out": len(prepared.held_out)},
            "extra": run["extra"], **more,
        }  # fmt: skip
        kept_at = result.keep(model, place, source, request.lora is None)
        if request.as_ == "model":
            del model, loaded, teacher  # what was written is loaded to be measured: one copy at a time
            model = None
        tell({"stage": "writing"})
        _finish(request, found, models, trained, kept_at, source, measured, model, without)
    return {**found, "seconds": {"training": trained.seconds, "all": time.monotonic() - started}}


def _follow(request: Request, mode: Mode, place: Path) -> None:
    """Train along with the process that leads, on its samples."""

    def silent(_entry: dict[str, Any]) -> None:
        return None

    processes.barrier()
    prepared = _made(place)
    loaded = load(find(request.model), request.device, request.dtype)
    _train(request, mode, loaded, prepared.train, prepared.held_out, place, silent)
    if request.compare_mix:
        _student_without_mix(request, mode, prepared, place, silent)
    processes.close()


def check(request: Request, mode: Mode) -> tuple[Source, dict[str, Any]]:
    """Everything that can be known before a model is loaded. Raises all problems together."""
    errors: list[SteerError] = []
    problems = loop.check(request.settings) + (student.check(request.lora) if request.lora else [])
    source = open_source(request.model)
    identity = identity_of(source)
    size = sum(entry.size for entry in source.entries.values())
    with kept(errors):
        result.check(request.as_, request.out, size, request.lora is None)
    if request.mix.path is not None:
        with kept(errors):
            files.examples_of(request.mix.path, "--mix")
            same = files.file_digest(request.mix.path) in mode.identity.values()
            if same:
                problems.append(
                    f"the general data {request.mix.path} are the training data: they would hold nothing back"
                )
    if request.pos or request.neg:
        with kept(errors):
            read(request.pos, request.neg)
    problems += processes.problems_of(request.settings.batch, request.context)
    problems += sharding.problems_of(
        request.settings.sharded, request.settings.optimiser, request.lora is None, request.dtype, request.context
    )
    problems += student.missing(request.lora, source.entries) if request.lora else []
    if problems:
        errors.append(UsageError(problems, "see steer bake --help"))
    raise_together(errors)
    return source, identity


def run_of(request: Request, mode: Mode, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a run follows from, as JSON values: only its own checkpoints are gone on from."""
    measured = {name: files.file_digest(path) for name, path in (("pos", request.pos), ("neg", request.neg)) if path}
    found: dict[str, Any] = json.loads(json.dumps({
        "base": identity["digest"], "mode": mode.name, "behaviour": mode.behaviour,
        "inputs": {**mode.identity, **measured}, "settings": request.settings.identity(),
        "lora": request.lora._asdict() if request.lora else None, "mix": _mixed(request.mix),
        "context": request.context, "device": request.device, "dtype": request.dtype, "extra": dict(request.extra),
    }))  # fmt: skip
    return found


def _scored(tell: Tell, apart: float) -> Tell:
    """`tell` with the trait's score so far: the share of the base's divergence from the teacher that is gone."""

    def told(entry: dict[str, Any]) -> None:
        held = entry.get(f"eval_{BEHAVIOUR}_loss")
        tell(entry if held is None or not apart else {**entry, "trait": 1 - held / apart})

    return told


def _mixed(mix: files.Mix) -> dict[str, Any]:
    return {"share": mix.share, "file": files.file_digest(mix.path) if mix.path else None}


def _prepared(
    place: Path, going_on: bool, loaded: LoadedModel, teacher: Teacher | None, mode: Mode, tell: Tell
) -> Prepared:
    """The samples: made now, or by the run that is gone on with."""
    if going_on and (place / COUNTS).is_file():
        tell({"stage": "going on with a run that was interrupted"})
        return _made(place)
    prepared = mode.prepare(loaded, teacher, tell)
    samples.save_all(prepared.train, place / TRAIN)
    samples.save_all(prepared.held_out, place / HELD_OUT)
    write_atomically(place / COUNTS, canonical_json(prepared.counts).encode())  # last: without it nothing is whole
    return prepared


def _made(place: Path) -> Prepared:
    """The samples that lie in the folder of a run."""
    train, held_out = samples.load_all(place / TRAIN), samples.load_all(place / HELD_OUT)
    return Prepared(train, held_out, json.loads((place / COUNTS).read_text(encoding="utf-8")))


def _train(
    request: Request, mode: Mode, loaded: LoadedModel, train: list[Sample], held_out: list[Sample], place: Path,
    tell: Tell,
) -> tuple[loop.Trained, Any, dict[str, Any]]:  # fmt: skip
    """A student, trained in place, and what more there is to report: learning rates that were tried, stale contexts."""
    settings, more = request.settings, dict[str, Any]()
    pad = loaded.tokenizer.pad_token_id or 0
    adapted: list[Any] = []
    frozen: list[FrozenPass] = []
    if request.context == "frozen":  # batches come again in one order, in which all kinds of samples are mixed
        train = sorted(train, key=lambda sample: digest_json([settings.seed, sample.digest]))

    def fresh(again: bool = request.settings.lr is None) -> Any:
        # The model itself, so that there is one; where learning rates are tried it is needed `again` as it was.
        if request.lora is None or settings.sharded:
            own = load(loaded.source.path, request.device, request.dtype).model if again else loaded.model
            return student.adapted(own, request.lora, settings.seed) if request.lora else student.freed(own)
        if adapted:
            adapted.pop().unload()  # PEFT puts its layers into the model itself
        adapted.append(student.adapted(loaded.model, request.lora, settings.seed))
        return adapted[-1]

    name = request.out.stem if request.as_ == "vector" else request.out.name
    logged = request.out.parent / "runs" / (name if place.name != WITHOUT_MIX else f"{name}-{WITHOUT_MIX}")

    def run(model: Any, own: Settings, where: Path) -> loop.Trained:
        if request.context == "frozen":
            frozen[:] = [FrozenPass(loop.looks(own) * own.accumulate)]
        return loop.train(
            model, train, held_out, mode.objective, own, where, logged, pad=pad, tell=tell, shuffled=not frozen,
            forward=frozen[0] if frozen else loop.whole_pass,
        )  # fmt: skip

    if settings.lr is None:
        noted = place / "rates.json"
        if noted.is_file():
            rates = json.loads(noted.read_text(encoding="utf-8"))
        else:
            tell({"stage": "trying learning rates"})
            rates = loop.sweep(fresh, run, settings, place / "sweep")
            if processes.is_main():
                write_atomically(noted, json.dumps(rates).encode())
        more["learning_rates"] = {rate: loss if math.isfinite(loss) else None for rate, loss in rates.items()}
        settings = settings._replace(lr=float(min(rates, key=lambda name: rates[name])))
    tell({"stage": f"training at learning rate {settings.lr:g}"})
    model = fresh()
    trained = run(model, settings, place / "checkpoints")
    if settings.sharded:
        model = sharding.gathered(model, lambda: fresh(again=True))
    if frozen:
        more["staleness"] = frozen[0].stale
    return trained, model, more


def _without_mix(
    request: Request,
    mode: Mode,
    prepared: Prepared,
    held: EvaluationSet,
    base: dict[str, float],
    place: Path,
    tell: Tell,
) -> float:
    """The retention of a student that had no general data."""
    model = _student_without_mix(request, mode, prepared, place, tell)
    return evaluation_set.retention(base, evaluate(model.eval(), held))


def _student_without_mix(request: Request, mode: Mode, prepared: Prepared, place: Path, tell: Tell) -> Any:
    loaded = load(find(request.model), request.device, request.dtype)
    alone = [sample for sample in prepared.train if sample.kind == BEHAVIOUR]
    return _train(request, mode, loaded, alone, prepared.held_out, place / WITHOUT_MIX, tell)[1]


def _finish(
    request: Request, found: dict[str, Any], models: dict[str, dict[str, float]], trained: loop.Trained,
    kept_at: Path, source: Source, held: EvaluationSet, model: Any, without: float | None,
) -> None:  # fmt: skip
    """Write the result, measure what was written, and report."""

    def measure(measured: Any) -> None:
        models["baked"] = evaluate(measured, held)
        teacher = models.get("steered") or models.get("prompted") or {"kl_teacher": 0.0, **models["base"]}
        found.update(
            models=models, dose=evaluation_set.dose(models["base"], teacher, models["baked"]),
            retention=evaluation_set.retention(models["base"], models["baked"]), steps=trained.steps,
            history=trained.history,
        )  # fmt: skip
        if without is not None:
            found["retention_without_mix"] = without

    def quietly(done: int, total: int) -> None:
        return None

    if request.as_ == "vector":
        measure(model)
        found["outputs"] = result.write(
            "vector", kept_at, source, request.out, threads=request.threads, progress=quietly
        )
        training_report.write(request.out.parent, found, trained.history, f"{request.out.stem}.")
        return
    size = sum(entry.size for entry in source.entries.values()) if request.as_ == "model" else 0
    with new_folder(request.out, size) as target:
        outputs = result.write(request.as_, kept_at, source, target, threads=request.threads, progress=quietly)
        found["outputs"] = outputs
        if request.as_ == "model":
            measure(load(target, request.device, request.dtype).model)
        else:
            measure(model)
        training_report.write(target, found, trained.history)
        model_folder.write_card(target, found, source, f"`{found['behaviour']}` baked by {found['mode']}.")
