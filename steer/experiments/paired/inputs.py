"""What a paired experiment reads and checks before a model is loaded: all problems at once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch

from probes.data.reading import prompt_lines
from probes.models.loading import OpenedModel, choose_device, choose_dtype, open_model
from probes.models.markers import given_markers, require_sections
from probes.models.residual import context_length, text_part
from probes.models.tokens import rendered
from probes.strengths import with_system
from steer.evaluation import scorers
from steer.evaluation.arms.arm import Arm
from steer.evaluation.judging import options as judging
from steer.evaluation.judging.endpoint import Endpoint, endpoint
from steer.evaluation.scorers import ConfiguredScorer
from steer.experiments import document
from steer.experiments.paired.request import Request
from steer.experiments.running.questions import require_keys
from steer.experiments.specification import Experiment
from vectors import fit, references
from vectors.errors import ExampleError, SteerError, UsageError, collecting, raise_together
from vectors.expression import parse
from vectors.language.markers import markers_in


class Inputs(NamedTuple):
    """The experiment, its arms as an evaluation has them (the control first), the prompts, and the opened model.

    `repeated` prompts of the file stand there before, and are left out. `prompt_ids` are the ids of every prompt by the
    arms' system prompts (None: without one), and `markers` those that the request gives for sections of an answer, by
    their kind.
    """

    experiment: Experiment
    arms: list[Arm]
    prompts: list[str]
    prompts_digest: str
    opened: OpenedModel
    prompt_ids: dict[str | None, list[list[int]]]
    scorers: list[ConfiguredScorer]
    judge: Endpoint | None
    out: Path
    markers: dict[str, list[str]]
    repeated: int = 0

    @property
    def longest(self) -> int:
        """The tokens of the longest prompt, with its system prompt."""
        return max(len(ids) for listed in self.prompt_ids.values() for ids in listed)


def read_inputs(request: Request) -> Inputs:
    """Read and check everything that a request names. Raises one error with all problems."""
    errors: list[SteerError] = []
    experiment: Experiment | None = None
    prompts, digest, repeated = [""], "", 0
    markers = dict[str, list[str]]()
    with collecting(errors):
        experiment = document.read(document.find(request.experiment), model=request.model)
        require_keys(experiment)
    with collecting(errors):
        lines, digest = prompt_lines(request.prompt_file)
        prompts = list(dict.fromkeys(lines))
        repeated = len(lines) - len(prompts)
    with collecting(errors):
        markers = markers_in(request.steer_markers)
    with collecting(errors):
        choose_device(request.device)
    with collecting(errors):
        choose_dtype(request.dtype, torch.device("cpu"))
    configured = _scorers(request, experiment, errors)
    judge = _judge(request, errors)
    several = experiment is not None and len(experiment.arms) > 2
    if several and (judge is not None or request.vote) and importlib.util.find_spec("evalica") is None:
        errors.append(UsageError("votes between more than two arms need evalica", "pip install 'steer-workbench[ab]'"))
    raise_together(errors)
    assert experiment is not None
    opened = open_model(request.model or experiment.model or base_of(experiment))
    text = text_part(opened.config)
    with collecting(errors):
        fit.require_fit(
            {**experiment.probes, **experiment.vectors}.items(), hidden_size=int(text.hidden_size),
            layers=int(text.num_hidden_layers),
            base=references.identified(opened.source, opened.identity), any_base=request.any_base,
        )  # fmt: skip
    arms, ids = arms_of(experiment), dict[str | None, list[list[int]]]()
    with collecting(errors):
        conditions = [each for arm in arms if arm.composition is not None for each in arm.composition.conditions]
        require_sections(conditions, given_markers(opened.tokenizer, markers))
    with collecting(errors):
        ids = {None: rendered(prompts, opened.tokenizer)}
        ids |= {arm.system: with_system(prompts, arm.system, opened.tokenizer) for arm in arms}
    raise_together(errors)
    out = request.out or experiment.file.with_name(f"{experiment.file.stem}.paired")
    inputs = Inputs(experiment, arms, prompts, digest, opened, ids, configured, judge, out, markers, repeated)
    limit = context_length(opened.config)
    if limit is not None and inputs.longest + request.max_tokens > limit:
        raise ExampleError(
            f"the longest prompt has {inputs.longest} tokens; {request.max_tokens} more exceed the model's context of "
            f"{limit}",
            "shorten the prompt, or lower --max-tokens",
        )
    return inputs


def engine_of(request: Request) -> str:
    """What runs the model: vLLM where it is installed."""
    if request.engine != "auto":
        return request.engine
    return "vllm" if importlib.util.find_spec("vllm") is not None else "transformers"


def arms_of(experiment: Experiment) -> list[Arm]:
    """The arms of an experiment as an evaluation has them, the control first."""
    ordered = sorted(experiment.arms, key=lambda arm: arm.name != experiment.control.name)
    return [
        Arm(
            arm.name, model=arm.lora or None, composition=parse(arm.steer) if arm.steer else None,
            vectors={name: vector for name, vector in experiment.vectors.items() if name in arm.vectors},
            system=arm.system or None,
            probes={name: source for name, source in experiment.probes.items() if name in arm.vectors},
        )
        for arm in ordered
    ]  # fmt: skip


def base_of(experiment: Experiment) -> str:
    """The model that the vectors and probes of an experiment record as their base. Raises UsageError."""
    sources = [*experiment.vectors.values(), *experiment.probes.values(), *experiment.readouts.values()]
    bases = [source.base for source in sources if "name" in source.base]
    names = {f"{base['name']}@{base['revision']}" if "revision" in base else str(base["name"]) for base in bases}
    if len(names) == 1:
        return names.pop()
    if sources and not names:
        raise UsageError("the vectors do not record the model they belong to", "give it: --model FOLDER")
    return references.DEFAULT


def _scorers(request: Request, experiment: Experiment | None, errors: list[SteerError]) -> list[ConfiguredScorer]:
    """The scorers of the request, and those among the judges of the experiment."""
    found: list[ConfiguredScorer] = []
    for text in request.scorer:
        with collecting(errors):
            found.append(scorers.parse(text))
    for judge in experiment.judges if experiment is not None else ():
        assert experiment is not None
        if judge.scorer:
            with collecting(errors):
                parsed = scorers.parse(judge.scorer, experiment.file.parent, "scorer")
                found.append(parsed._replace(name=judge.name))
    taken = [*(each.name for each in found), *(j.name for j in (experiment.judges if experiment else ()) if j.url)]
    twice = sorted({name for name in taken if taken.count(name) > 1})
    if twice:
        errors.append(UsageError(f"several scorers are called {', '.join(twice)}", "name them: --scorer NAME=KIND:…"))
    return found


def _judge(request: Request, errors: list[SteerError]) -> Endpoint | None:
    """The judge that votes. What is given without one is a problem."""
    errors += judging.errors_without_judge(request)
    if request.judge is None:
        return None
    if not (request.concept or "").strip():
        errors.append(UsageError("--judge needs a concept", '--concept "a warm, friendly tone"'))
    with collecting(errors):
        return endpoint(request.judge, model=request.judge_model, key_file=request.judge_key_file)
    return None
