"""How long the commands take that say if a vector steers: `steer extract` with its calibration, and `steer eval`.

    .venv/bin/python tests/bench/evaluation.py [--rounds 3]

Each is a whole command on all cores, from the start of Python to its end. The evaluation has every control: negation,
16 draws of shuffled labels, 8 of each kind of random direction, at equal norm and at equal KL, a donor, the prompt, the
prompt with the vector; the curve of eight strengths; the answers to ten prompts; 64 test items, which are the project's
own pairs (warm and cold, formal and casual).
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    took: dict[str, list[float]] = {"extract": [], "extract --budget-kl 0": [], "eval": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pairs.jsonl").write_text("\n".join(pairs(("warm", "cold"), ("formal", "casual"))))
        warm = ("--pos", DATA / "warm.jsonl", "--neg", DATA / "cold.jsonl")
        formal = ("--pos", DATA / "formal.jsonl", "--neg", DATA / "casual.jsonl")
        seconds("extract", *formal, "-o", folder / "formal.safetensors")
        for number in range(rounds):
            took["extract"].append(seconds("extract", *warm, "--force", "-o", folder / "warm.safetensors"))
            plain = seconds("extract", *warm, "--force", "--budget-kl", "0", "-o", folder / "plain.safetensors")
            took["extract --budget-kl 0"].append(plain)
            took["eval"].append(
                seconds(
                    "eval", folder / "warm.safetensors", "--pairs", folder / "pairs.jsonl", "--allow-overlap",
                    "--donor", folder / "formal.safetensors", "--prompt", "Answer warmly.",
                    "--out", folder / f"report-{number}",
                )
            )  # fmt: skip
            print(", ".join(f"{each} {values[-1]:.1f} s" for each, values in took.items()), flush=True)
    print(f"{machine()}, smollm2, float32, {rounds} rounds")
    for each, values in took.items():
        print(f"steer {each:22} {spread(values, '.1f')} s")
    calibrated = [a - b for a, b in zip(took["extract"], took["extract --budget-kl 0"], strict=True)]
    print(f"the calibration        {spread(calibrated, '.1f')} s")


if __name__ == "__main__":
    main()
