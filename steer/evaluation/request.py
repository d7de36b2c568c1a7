"""The request of an evaluation: its fields are the arguments of `steer.evaluate` and the options of `steer eval`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from steer.evaluation.judging import options as judging
from vectors.documents.numbers import number
from vectors.errors import UsageError
from vectors.language.markers import OPTION as MARKERS
from vectors.registry.options import option

CONTROL_NAMES = ("negation", "shuffled", "random", "random-kl", "orthogonal", "none")
EXPORTS = ("inspect", "lm-eval")
ENGINES = ("transformers", "vllm")
SCORES = "Scores of the answers"


def factors(texts: str | tuple[str, ...]) -> tuple[float, ...]:
    """The numbers of --curve, ascending. Raises UsageError with every malformed one."""
    values, problems = set[float](), []
    for part in ",".join((texts,) if isinstance(texts, str) else texts).split(","):
        value = number(part.strip())
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6:
            values.add(float(value))
        else:
            problems.append(f"--curve: {part.strip()!r} is not a number")
    if problems:
        raise UsageError(problems, "write factors of the strength separated by commas: --curve -2,-1,0.5,2")
    return tuple(sorted(values))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is evaluated, on what, against which controls."""

    subjects: tuple[str, ...] = option(
        (), help="A vector, an expression, prompt:TEXT, a model's or adapter's folder, or a task vector; several are "
        "compared.", argument=True, metavar="SUBJECT...", complete="vectors",
    )  # fmt: skip
    suite: Path | None = option(None, help="A suite of items, as YAML or JSON.", group="Items")
    pos: Path | None = option(None, help="Examples that show the behaviour, one JSON value per line.", group="Items")
    neg: Path | None = option(None, help="Examples that show the opposite behaviour.", group="Items")
    pairs: Path | None = option(None, help="One file that holds both classes.", group="Items")
    choices: Path | None = option(
        None, help="Multiple-choice questions in the yes/no persona format or the A/B format of CAA.", group="Items"
    )
    prompt_file: Path | None = option(
        None, help="Prompts that every arm answers, one per line.", flag="--prompts", group="Items",
        default_text="ten neutral ones",
    )  # fmt: skip
    neutral: Path | None = option(
        None, help="Neutral prompts on which the KL to the unsteered model is measured.", group="Items",
        default_text="built-in everyday prompts",
    )  # fmt: skip
    entangled: tuple[Path, ...] = option(
        (), help="A suite of another behaviour, which should not change; may be given several times.", group="Items"
    )
    items: int = option(64, help="The most test items; half as many are for development.", low=2, group="Items")
    allow_overlap: bool = option(
        False, help="Allow test items that a vector was extracted from, or that a sweep chose its strength on; the "
        "report says so.", group="Items",
    )  # fmt: skip
    strength: float | None = option(
        None, help="The factor of every expression.", default_text="what a vector recommends, else 1"
    )
    curve: tuple[float, ...] = option(
        (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0), help="The strengths of the curve on development items, as factors "
        "of the strength; 0 and 1 are always on it.", parse=factors, metavar="FACTORS",
        default_text="-2,-1,-0.5,0,0.5,1,1.5,2",
    )  # fmt: skip
    control: tuple[str, ...] = option(
        (), help=f"A control that the subject must beat: {', '.join(CONTROL_NAMES)}; may be given several times.",
        choices=CONTROL_NAMES, default_text="all that apply", group="Controls",
    )  # fmt: skip
    donor: Path | None = option(None, help="The vector of another behaviour, as a control.", group="Controls")
    prompt: str | None = option(
        None, help="A system prompt that asks for the behaviour: compared alone, and with the subject.",
        metavar="TEXT", group="Controls",
    )  # fmt: skip
    draws: int = option(
        8, help="Random directions of each kind, 3 to 100; of shuffled labels, which come nearest to a behaviour, "
        "twice as many.",
        low=3, high=100, group="Controls",
    )  # fmt: skip
    extraction_pos: Path | None = option(
        None, help="The positive examples that the vector was extracted from, for shuffled labels.", group="Controls",
        default_text="the development items",
    )  # fmt: skip
    extraction_neg: Path | None = option(None, help="The negative ones.", group="Controls")
    extraction_pairs: Path | None = option(None, help="One file that holds both.", group="Controls")
    max_tokens: int = option(48, help="The most tokens of an answer; 0 writes none.", low=0)
    scorer: tuple[str, ...] = judging.scorer(SCORES)
    judge: str | None = judging.judge(SCORES, "of the answers")
    judge_model: str | None = judging.judge_model(SCORES)
    judge_key_file: Path | None = option(None, group=SCORES, **judging.KEY_FILE)
    concept: str | None = judging.concept(SCORES, "is asked about")
    labels: Path | None = option(
        None, help="Texts with hand labels, to measure how far the scorers agree with people.",
        group=SCORES,
    )  # fmt: skip
    task: tuple[str, ...] = option(
        (), help="A task of lm-evaluation-harness, by name or by its YAML file; may be given several times.",
        flag="--tasks", metavar="TASK", group="Tasks",
    )  # fmt: skip
    task_limit: int | None = option(
        None, help="The most documents of each task.", low=1, default_text="all", group="Tasks"
    )
    export: tuple[str, ...] = option(
        (), help="A further form to write into --out: logs of Inspect, or the subject as the steering file of "
        "lm-evaluation-harness.", choices=EXPORTS,
    )  # fmt: skip
    model: str | None = option(
        None, help="The base: a folder, a hub id (org/name@revision), or the bundled smollm2.",
        default_text="the model the vectors were made from", complete="models",
    )  # fmt: skip
    vectors: Mapping[str, Path] = option(
        {}, help="The vector file for a name in an expression; may be given several times.", flag="--vector",
        metavar="NAME=FILE", complete="vectors",
    )  # fmt: skip
    steer_markers: tuple[str, ...] = option((), **MARKERS)
    any_base: bool = option(False, help="Allow vectors of other models of the same size.")
    allow_strength: bool = option(False, help="Allow strengths beyond twenty times the recommended one.")
    out: Path | None = option(
        None, help="A folder to write run.json, report.json, report.html and pictures to.", flag=("-o", "--out")
    )
    engine: str = option(
        "transformers", help="What runs the arms: hooks in transformers, or vLLM, all arms as one batch of requests "
        "that are steered differently.", choices=ENGINES, group="Computing",
    )  # fmt: skip
    device: str = option("auto", help="The device to compute on: auto, cpu, cuda, cuda:N or mps.", group="Computing")
    dtype: str = option("auto", help="The dtype to compute in: auto, float32, bfloat16 or float16.", group="Computing")
    seed: int = option(0, help="The random seed.", group="Computing")
    # The names of subjects in tables and reports, by the text of the subject: of a version of the store, whose text is
    # an expression over its files.
    subject_names: Mapping[str, str] = field(default_factory=dict)
