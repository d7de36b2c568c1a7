"""A training bake in six steps: check, prepare, evaluate the references, train, write and evaluate, report."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from merges.inputs.sources import Source, open_source
from probes import evaluation_set
from probes.data import prompts
from probes.data.examples import Example
from probes.data.overlap import problems_of_overlap
from probes.data.reading import read
from probes.evaluation_set import Behaviour, Contrast, EvaluationSet, contrast_of, evaluate
from probes.generation import answers
from probes.interventions import Intervention, no_intervention
from probes.models.loading import LoadedModel, load, open_model
from probes.models.tokens import rendered
from steer.folding import model_folder
from steer.folding.fold import identity_of
from steer.reports import page
from steer.reports import training as training_report
from steer.training import loop, result, student, work
from steer.training.data import files, samples
from steer.training.data.samples import BEHAVIOUR, Samples
from steer.training.data.teachers import Teacher
from steer.training.distributed import processes, sharding
from steer.training.mode import Mode
from steer.training.requests import TrainingRequest
from steer.training.train_student import WITHOUT_REPLAY, Student, train_student
from vectors.errors import ArtifactError, ExampleError, SteerError, UsageError, collecting, raise_together
from vectors.events import Event, OnEvent, ignore
from vectors.registry.options import problems_of
from vectors.storage.files import canonical_json, write_atomically
from vectors.storage.folders import new_folder

TRAIN, HELD_OUT, COUNTS = "train.safetensors", "held_out.safetensors", "counts.json"  # in the work folder

ANSWERED, ANSWER_TOKENS = 10, 32  # held-out prompts whose answers the report shows, and the tokens of each

Figures = dict[str, float]  # measurements of one model, by name


class Job(NamedTuple):
    """A checked request, its mode and base, and the identity that a resumed run must have too."""

    request: TrainingRequest
    mode: Mode
    source: Source
    base: dict[str, Any]
    identity: dict[str, Any]


class Prepared(NamedTuple):
    """The loaded base, the teacher (None for a mode without one) and the samples."""

    loaded: LoadedModel
    teacher: Teacher | None
    samples: Samples


class References(NamedTuple):
    """The evaluation set, the figures of the base and of the teacher on it, and their answers to held-out prompts."""

    evaluation_set: EvaluationSet
    figures: dict[str, Figures]
    answers: dict[str, list[str]]

    @property
    def base(self) -> Figures:
        """The figures of the base."""
        return self.figures["base"]

    @property
    def teacher(self) -> Figures:
        """The figures that training aims at: the teacher's; without a teacher, the base's."""
        return self.figures.get("steered") or self.figures.get("prompted") or {"kl_teacher": 0.0, **self.base}


class Written(NamedTuple):
    """The output's files by digest, and the figures and answers of the model that they hold."""

    outputs: dict[str, str]
    figures: Figures
    answers: list[str]


def bake(request: TrainingRequest, mode: Mode, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Train, write and evaluate; returns the report. A failure keeps the checkpoints and leaves no output.

    With several processes, rank 0 returns the report; the others only train and return an empty one. Raises UsageError,
    ExampleError, ArtifactError, OutputError before any work; TrainingError.
    """
    started = time.monotonic()
    job = job_of(request, mode)
    if not processes.is_main():
        _train_along(job)
        return {}
    resumed = work.can_resume(request.out, job.identity)
    loaded, teacher = _load(job, on_event)
    examples = _examples(job, loaded, teacher)
    with work.work_folder(request.out, job.identity) as folder:
        prepared = Prepared(loaded, teacher, prepare(job, loaded, teacher, folder, resumed=resumed, on_event=on_event))
        references = evaluate_references(job, prepared, examples, on_event)
        processes.barrier()
        trained = train(job, prepared, references, folder, on_event)
        retention = _retention_without_replay(job, prepared.samples, references, folder, on_event)
        processes.close()
        trained.model.eval()
        saved = result.save_trained(trained.model, folder, job.source, full=request.adapter.full)
        model = None if request.as_ == "model" else trained.model
        facts, tokenizer = _facts(job, prepared.samples, trained, retention), prepared.loaded.tokenizer
        del (
            loaded,
            teacher,
            prepared,
            trained,
        )  # the written model is loaded for evaluation: one copy in memory at a time
        with _output(job) as target:
            written = write_and_evaluate(job, saved, target, model, tokenizer, references, on_event)
            report = report_of(facts, references, written)
            _write_report(job, report, target)
    return {**report, "seconds": {"training": facts["seconds"], "all": time.monotonic() - started}}


def job_of(request: TrainingRequest, mode: Mode) -> Job:
    """The job of a request. Raises every problem that can be found before a model is loaded, all together."""
    errors: list[SteerError] = []
    settings, lora = request.settings, request.adapter.lora(mode.first_layer)
    problems = problems_of(request) + loop.problems_of_settings(settings)
    source = open_source(request.model)
    base = identity_of(source)
    replayed: dict[str, Sequence[Example]] = {}
    held_out: dict[str, Sequence[Example]] = {}
    with collecting(errors):
        result.require_output(request.as_, request.out, _size(source), full=request.adapter.full)
    if request.as_ == "model":
        with collecting(errors):
            model_folder.beside_weights(source)
    if request.replay.path is not None:
        with collecting(errors):
            replay, _ = files.examples_of(request.replay.path, "--replay")
            replayed[f"--replay {request.replay.path}"] = replay
            if files.file_digest(request.replay.path) in mode.inputs.values():
                problems.append(
                    f"the replay data {request.replay.path} are the training data, so they preserve nothing"
                )
    if bool(request.pos) != bool(request.neg):
        problems.append("--pos and --neg are evaluated together: give both")
    elif request.pos:
        with collecting(errors):
            contrast = read(request.pos, request.neg)
            held_out = {f"--pos {request.pos}": contrast.positive, f"--neg {request.neg}": contrast.negative}
    overlap = problems_of_overlap(mode.examples, replayed, held_out)
    if overlap:
        hint = "leave these examples out of one of the files; without --pos and --neg a part of the data is held out"
        errors.append(ExampleError(overlap, hint))
    problems += processes.problems_of(settings.batch, request.context)
    problems += sharding.problems_of(
        settings.sharded, settings.optimiser, request.adapter.full, request.dtype, request.context
    )
    problems += student.problems_of_targets(lora, source.entries) if lora else []
    if problems:
        errors.append(UsageError(problems, "see steer bake --help"))
    raise_together(errors)
    return Job(request, mode, source, base, _identity(request, mode, base["digest"]))


def _identity(request: TrainingRequest, mode: Mode, base: str) -> dict[str, Any]:
    """Everything that determines a run, as JSON values, named as in the first release: its runs can be resumed."""
    evaluated = {name: files.file_digest(path) for name, path in (("pos", request.pos), ("neg", request.neg)) if path}
    lora, replay = request.adapter.lora(mode.first_layer), request.replay
    identity: dict[str, Any] = json.loads(json.dumps({
        "base": base, "mode": mode.name, "behaviour": mode.behaviour, "inputs": {**mode.inputs, **evaluated},
        "settings": request.settings.identity(), "lora": lora._asdict() if lora else None,
        "mix": {"share": replay.share, "file": files.file_digest(replay.path) if replay.path else None},
        "context": request.context, "device": request.device, "dtype": request.dtype, "extra": request.sampling,
    }))  # fmt: skip
    return identity


def prepare(
    job: Job, loaded: LoadedModel, teacher: Teacher | None, folder: Path, *, resumed: bool, on_event: OnEvent
) -> Samples:
    """The samples: made now, or read from the run that is resumed."""
    if resumed and (folder / COUNTS).is_file():
        on_event(Event("resuming a run that was interrupted"))
        return _saved_samples(folder)
    made = job.mode.prepare(loaded, teacher, on_event)
    samples.save_all(made.train, folder / TRAIN)
    samples.save_all(made.held_out, folder / HELD_OUT)
    write_atomically(
        folder / COUNTS, canonical_json(made.counts).encode()
    )  # last, since it marks the other files as complete
    return made


def evaluate_references(job: Job, prepared: Prepared, examples: Examples, on_event: OnEvent) -> References:
    """The evaluation set, and the base's and the teacher's figures on it."""
    loaded, teacher, held_out = prepared.loaded, prepared.teacher, prepared.samples.held_out
    on_event(Event("sampling neutral text from the base"))
    chosen = [sample for sample in held_out if sample.kind == BEHAVIOUR]
    behaviour = Behaviour([s.completion for s in chosen], [s.target for s in chosen], teacher is not None)
    evaluated = evaluation_set.evaluation_set(loaded, examples.plain, behaviour, seed=job.request.settings.seed)
    on_event(Event("evaluating the base" + (" and the teacher" if teacher is not None else "")))
    figures = {"base": evaluate(loaded.model, evaluated)}
    if teacher is not None and not _is_prompted(teacher):
        figures["steered"] = evaluate(loaded.model, evaluated, teacher.intervention)
    elif examples.prompted is not None and examples.prompted.positive:
        figures["prompted"] = {"kl_teacher": 0.0, "margin": evaluation_set.margin(loaded.model, examples.prompted)}
    asked = prompts.held_out()[:ANSWERED]
    answered = {"base": _answers(loaded.model, loaded.tokenizer, rendered(asked, loaded.tokenizer))}
    if teacher is not None:
        ids = teacher.prompt_ids(asked, loaded.tokenizer)
        name = "prompted" if _is_prompted(teacher) else "steered"
        answered[name] = _answers(loaded.model, loaded.tokenizer, ids, teacher.intervention)
    return References(evaluated, figures, answered)


def _answers(
    model: Any, tokenizer: Any, ids: Sequence[Sequence[int]], intervention: Intervention = no_intervention
) -> list[str]:
    return answers(model, tokenizer, ids, intervention, max_tokens=ANSWER_TOKENS)


def train(job: Job, prepared: Prepared, references: References, folder: Path, on_event: OnEvent) -> Student:
    """The student, trained in place. Raises TrainingError."""
    if prepared.teacher is not None:
        on_event = _with_trait(on_event, references.base.get("kl_teacher", 0.0))
    return train_student(job.request, job.mode, prepared.loaded, prepared.samples, folder, on_event)


def write_and_evaluate(
    job: Job, saved: Path, target: Path, model: Any, tokenizer: Any, references: References, on_event: OnEvent
) -> Written:
    """Write the output at `target` from what was saved; evaluate the written model, or `model` if there is none."""
    on_event(Event("writing"))
    request = job.request
    outputs = result.write(request.as_, saved, job.source, target, threads=request.threads, on_event=on_event)
    on_event(Event("evaluating the result"))
    evaluated = load(target, request.device, request.dtype).model if model is None else model
    asked = rendered(prompts.held_out()[:ANSWERED], tokenizer)
    return Written(outputs, evaluate(evaluated, references.evaluation_set), _answers(evaluated, tokenizer, asked))


def report_of(facts: Mapping[str, Any], references: References, written: Written) -> dict[str, Any]:
    """The report of the bake, as JSON values."""
    return {
        **{key: value for key, value in facts.items() if key != "seconds"},
        "models": {**references.figures, "baked": written.figures},
        "measured_on": evaluation_set.counts(references.evaluation_set),
        "dose": evaluation_set.dose(references.base, references.teacher, written.figures),
        "retention": evaluation_set.retention(references.base, written.figures),
        "examples": page.examples_of(prompts.held_out()[:ANSWERED], {**references.answers, "baked": written.answers}),
        "outputs": written.outputs,
    }


def _facts(job: Job, made: Samples, trained: Student, retention: float | None) -> dict[str, Any]:
    """The part of the report about the request and the training."""
    identity, names = job.identity, ("lora", "mix", "context", "device", "dtype")
    optional = {
        "learning_rates": trained.learning_rates, "staleness": trained.staleness, "retention_without_mix": retention,
    }  # fmt: skip
    return {
        "schema": 1, "mode": job.mode.name, "behaviour": job.mode.behaviour, "base": job.base,
        "inputs": identity["inputs"], "as": job.request.as_,
        "settings": {
            **identity["settings"], "steps": job.request.settings.for_samples(len(made.train)).total_steps,
            **{name: identity[name] for name in names},
        },
        "samples": {**made.counts, "training": len(made.train), "held_out": len(made.held_out)},
        "extra": identity["extra"], "steps": trained.training.steps, "history": trained.training.history,
        "best": {"step": trained.training.best_step, "held_out_loss": trained.training.best},
        "seconds": trained.training.seconds, **{key: value for key, value in optional.items() if value is not None},
    }  # fmt: skip


def _write_report(job: Job, report: Mapping[str, Any], target: Path) -> None:
    training_report.write(target, report, report["history"])
    if job.request.as_ != "vector":
        model_folder.write_card(target, report, job.source, f"`{report['behaviour']}` baked by {report['mode']}.")


@contextlib.contextmanager
def _output(job: Job) -> Iterator[Path]:
    """Within: where the output is written. A folder appears whole at the end; a vector is one file, written whole."""
    request = job.request
    if request.as_ == "vector":
        yield request.out
        return
    with new_folder(request.out, _size(job.source) if request.as_ == "model" else 0) as target:
        yield target


class Examples(NamedTuple):
    """Held-out examples of a trait and its opposite: as the model sees them, and as a prompted teacher does."""

    plain: Contrast
    prompted: Contrast | None


def _load(job: Job, on_event: OnEvent) -> tuple[LoadedModel, Teacher | None]:
    on_event(Event("loading the model"))
    loaded = load(open_model(job.request.model), job.request.device, job.request.dtype)
    return loaded, job.mode.teacher(loaded) if job.mode.teacher else None


def _examples(job: Job, loaded: LoadedModel, teacher: Teacher | None) -> Examples:
    """The examples of --pos and --neg, read before the work folder is made, so that a bad file leaves nothing."""
    pos, neg = job.request.pos, job.request.neg
    plain = contrast_of(loaded, pos, neg)
    # Neutral text has no prompt, so the margin is the only figure of a prompted teacher.
    if teacher is None or not _is_prompted(teacher):
        return Examples(plain, None)
    return Examples(plain, contrast_of(loaded, pos, neg, as_prompted=teacher.as_prompted))


def _is_prompted(teacher: Teacher) -> bool:
    return teacher.intervention is no_intervention


def _train_along(job: Job) -> None:
    """On ranks other than 0: train on the samples that rank 0 has prepared."""
    folder, request = work.path_of(job.request.out), job.request
    processes.barrier()
    made = _saved_samples(folder)
    loaded = load(open_model(request.model), request.device, request.dtype)
    train_student(request, job.mode, loaded, made, folder, ignore)
    if request.compare_replay:
        _train_without_replay(job, made, folder, ignore)
    processes.close()


def _retention_without_replay(
    job: Job, made: Samples, references: References, folder: Path, on_event: OnEvent
) -> float | None:
    """The retention of a second student trained without replay data, if --compare-replay asks for it."""
    if not job.request.compare_replay:
        return None
    on_event(Event("training once more, without replay data"))
    model = _train_without_replay(job, made, folder, on_event)
    return evaluation_set.retention(references.base, evaluate(model.eval(), references.evaluation_set))


def _train_without_replay(job: Job, made: Samples, folder: Path, on_event: OnEvent) -> Any:
    loaded = load(open_model(job.request.model), job.request.device, job.request.dtype)
    alone = made._replace(train=[sample for sample in made.train if sample.kind == BEHAVIOUR])
    return train_student(job.request, job.mode, loaded, alone, folder / WITHOUT_REPLAY, on_event).model


def _saved_samples(folder: Path) -> Samples:
    """The samples in a work folder. Raises ArtifactError for files that are damaged."""
    from safetensors import SafetensorError

    try:
        counts = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
        return Samples(samples.load_all(folder / TRAIN), samples.load_all(folder / HELD_OUT), counts)
    except (OSError, ValueError, LookupError, TypeError, RecursionError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            f"the samples in {folder} are damaged: {type(error).__name__}: {error}", f"start anew: rm -r {folder}"
        ) from error


def _with_trait(on_event: OnEvent, base_divergence: float) -> OnEvent:
    """Add the metric `trait`: 1 - held-out loss / divergence of the base from the teacher (`base_divergence`, nats)."""

    def report(event: Event) -> None:
        loss = event.metrics.get(f"eval_{BEHAVIOUR}_loss")
        trait = {} if loss is None or not base_divergence else {"trait": 1 - loss / base_divergence}
        on_event(Event(event.stage, event.done, event.total, event.unit, {**event.metrics, **trait}, event.message))

    return report


def _size(source: Source) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(entry.size for entry in source.entries.values())
