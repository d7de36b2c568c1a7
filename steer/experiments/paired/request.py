"""The request of a paired experiment: its fields are the options of `steer ab paired`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vectors.registry import plugins
from vectors.registry.options import option

ENGINES = ("auto", "vllm", "transformers")


def _scorers() -> list[str]:
    """The names of the scorers."""
    return plugins.names("steer.evaluation.scorers", "steer.scorers")


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
    likelihood: bool = option(
        True, help="Measure how likely the answers are under the unsteered model.", group="Scores and votes"
    )
    scorer: tuple[str, ...] = option(
        (), help="A scorer of the answers: {names}, with its first setting; may be given several times.",
        names=_scorers, metavar="[NAME=]KIND:VALUE", group="Scores and votes",
    )  # fmt: skip
    judge: str | None = option(
        None, help="A judge that votes between the answers of two arms: the URL of an OpenAI-compatible server, or a "
        "YAML file with url and model.", metavar="URL|FILE", group="Scores and votes",
    )  # fmt: skip
    judge_model: str | None = option(None, help="The judge's model, by name.", group="Scores and votes")
    judge_key_file: Path | None = option(
        None, help="A file with the judge's API key.", default_text="the key in STEER_JUDGE_KEY, if set",
        group="Scores and votes",
    )  # fmt: skip
    concept: str | None = option(
        None, help='What the judge compares, in words: "a warm, friendly tone".', metavar="TEXT",
        group="Scores and votes",
    )  # fmt: skip
    vote: bool = option(
        False, help="Vote yourself, in the terminal, without knowing which arm wrote what; goes on where it was.",
        group="Scores and votes",
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
