"""How long the commands take that say if a vector steers: `steer extract` with its calibration, and `steer eval`.

    .venv/bin/python tests/bench/evaluation.py [--rounds 3] [--persona FILE] [--eval-only]

Each is a whole command on all cores, from the start of Python to its end. The evaluation has every control: negation,
16 draws of shuffled labels, 8 of each kind of random direction, at equal norm and at equal KL, a donor, the prompt, the
prompt with the vector; the curve of eight strengths; the answers to ten prompts; 64 test items. These are the project's
own pairs (warm and cold, formal and casual), about 40 tokens each side, or statements of a persona (`--persona`, a file
in the form of Anthropic's model-written evaluations), about 15: the vector is extracted from 300 of each side, and 140
other pairs are divided into development and test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import machine, spread

DATA = Path(__file__).parents[2] / "examples" / "data"
ANSWERS = ("Yes", "No")  # that match the behaviour: of its positive and of its negative statements


def pairs(*sides: tuple[str, str]) -> list[str]:
    """The lines of a file of pairs: the examples of each two files, in order, with the prompt of the first."""
    lines = []
    for positive, negative in sides:
        both = ([json.loads(line) for line in (DATA / f"{name}.jsonl").open()] for name in (positive, negative))
        for one, other in zip(*both, strict=True):
            pair = {"prompt": one["prompt"], "positive": one["completion"], "negative": other["completion"]}
            lines.append(json.dumps(pair))
    return lines


def seconds(*words: str | Path) -> float:
    """How long a command takes, which must succeed."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "steer", "-q", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def statements(persona: Path, folder: Path) -> dict[str, list[str | Path]]:
    """The statements of a persona as files of the folder: those to extract from, and those to evaluate on."""
    rows = [json.loads(line) for line in persona.open()]
    sides = [
        [row["statement"] for row in rows if row["answer_matching_behavior"].strip() == answer] for answer in ANSWERS
    ]
    for name, first, last in (("examples", 0, 300), ("items", 300, 440)):
        for side, found in zip(("positive", "negative"), sides, strict=True):
            lines = (json.dumps({"text": text}) for text in found[first:last])
            (folder / f"{name}-{side}.jsonl").write_text("\n".join(lines))
    return {
        name: ["--pos", folder / f"{name}-positive.jsonl", "--neg", folder / f"{name}-negative.jsonl"]
        for name in ("examples", "items")
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--persona", type=Path, help="a file of persona statements instead of the project's own examples"
    )
    parser.add_argument("--eval-only", action="store_true", help="extract once, and measure the evaluation alone")
    arguments = parser.parse_args()
    took: dict[str, list[float]] = {"extract": [], "extract --budget-kl 0": [], "eval": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        formal = ("--pos", DATA / "formal.jsonl", "--neg", DATA / "casual.jsonl")
        if arguments.persona:
            files = statements(arguments.persona, folder)
            examples, items = files["examples"], files["items"]
        else:
            (folder / "pairs.jsonl").write_text("\n".join(pairs(("warm", "cold"), ("formal", "casual"))))
            examples = ["--pos", DATA / "warm.jsonl", "--neg", DATA / "cold.jsonl"]
            items = ["--pairs", folder / "pairs.jsonl", "--allow-overlap"]
        vector = folder / "vector.safetensors"
        seconds("extract", *formal, "-o", folder / "formal.safetensors")
        seconds("extract", *examples, "-o", vector)
        for number in range(arguments.rounds):
            if not arguments.eval_only:
                took["extract"].append(seconds("extract", *examples, "--force", "-o", vector))
                plain = seconds("extract", *examples, "--budget-kl", "0", "--force", "-o", folder / "plain.safetensors")
                took["extract --budget-kl 0"].append(plain)
            took["eval"].append(
                seconds(
                    "eval", vector, *items, "--donor", folder / "formal.safetensors", "--prompt", "Answer warmly.",
                    "--out", folder / f"report-{number}",
                )
            )  # fmt: skip
            print(", ".join(f"{each} {values[-1]:.1f} s" for each, values in took.items() if values), flush=True)
    print(f"{machine()}, smollm2, float32, {arguments.rounds} rounds")
    for each, values in took.items():
        if values:
            print(f"steer {each:22} {spread(values, '.1f')} s")
    if took["extract"]:
        calibrated = [a - b for a, b in zip(took["extract"], took["extract --budget-kl 0"], strict=True)]
        print(f"the calibration        {spread(calibrated, '.1f')} s")


if __name__ == "__main__":
    main()
