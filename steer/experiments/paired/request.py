"""The request of a paired experiment: its fields are the options of `steer ab paired`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steer.evaluation.judging import options as judging
from vectors.language.markers import OPTION as MARKERS
from vectors.registry.options import option

ENGINES = ("auto", "vllm", "transformers")
SCORES = "Scores and votes"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is compared on which prompts, by which scores and votes."""

    experiment: str = option(help="The experiment: its file, or NAME for NAME.yaml here.", argument=True)
    prompt_file: Path = option(help="The prompts that every arm answers, one per line.", flag="--prompts")
    model: str | None = option(
        None, help="The model: a folder, a hub id (org/name@revision), or the bundled smollm2.", complete="models",
        default_text="that of the experiment, or of its vectors",
    )  # fmt: skip
    samples: int = option(1, help="Answers to each prompt, each with random numbers of its own.", low=1, high=1000)
    max_tokens: int = option(60, help="The most tokens of an answer.", low=1)
    temperature: float = option(0.7, help="The sampling temperature; 0 is greedy decoding.", low=0)
    likelihood: bool = option(True, help="Measure how likely the answers are under the unsteered model.", group=SCORES)
    steer_markers: tuple[str, ...] = option((), **MARKERS)
    scorer: tuple[str, ...] = judging.scorer(SCORES)
    judge: str | None = judging.judge(SCORES, "that votes between the answers of two arms")
    judge_model: str | None = judging.judge_model(SCORES)
    judge_key_file: Path | None = option(None, group=SCORES, **judging.KEY_FILE)
    concept: str | None = judging.concept(SCORES, "compares")
    vote: bool = option(
        False, help="Vote yourself, in the terminal, without knowing which arm wrote what; goes on where it was.",
        group=SCORES,
    )  # fmt: skip
    out: Path | None = option(
        None, help="The folder of the page, the answers and the votes. Answers that it holds are not written again.",
        flag=("-o", "--out"), default_text="NAME.paired beside the experiment",
    )  # fmt: skip
    force: bool = option(False, help="Replace a folder with other answers.")
    engine: str = option(
        "auto", help="What runs the model.", choices=ENGINES, default_text="vllm, if it is installed",
        group="Computing",
    )  # fmt: skip
    any_base: bool = option(False, help="Allow vectors of other models of the same size.")
    device: str = option("auto", help="The device of transformers: auto, cpu, cuda, cuda:N or mps.", group="Computing")
    dtype: str = option("auto", help="The dtype to compute in: auto, float32, bfloat16 or float16.", group="Computing")
    seed: int = option(0, help="The random seed.", group="Computing")
