"""The journey on real data, as `make demo` shows it: extract a vector, look at its layers, steer with it, draw it.

Run it from the project's folder: .venv/bin/python examples/demo.py
Everything it makes lies in demo/.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from steer.cli import run

ROOT = Path(__file__).parent.parent
OUT = Path("demo")  # below ROOT
DATA = Path("examples") / "data"
PROMPTS = ("How was your day?", "Can you help me with my homework?", "Good morning!")


def step(title: str, *arguments: str) -> None:
    """Show a command as one would type it, and run it; a failure ends the demo."""
    print(f"\n== {title}\n$ steer {shlex.join(arguments)}\n", flush=True)
    code = run(list(arguments))
    sys.stdout.flush()
    if code:
        sys.exit(code)


def main() -> None:
    """Run every step."""
    os.chdir(ROOT)
    OUT.mkdir(exist_ok=True)
    vector, picture = str(OUT / "warm.safetensors"), str(OUT / "warm.png")
    pos, neg = str(DATA / "warm.jsonl"), str(DATA / "cold.jsonl")
    step("The bundled model", "models", "show", "smollm2")
    step("A vector from warm and cold answers", "extract", "--pos", pos, "--neg", neg, "--out", vector)
    asked = [part for prompt in PROMPTS for part in ("-p", prompt)]
    step("The same prompts, colder and warmer", "try", vector, *asked, "--strengths", "-2,0,2")
    step("How well each layer separates the two", "vectors", "plot", vector, "--out", picture)
    print(
        "\n== Where everything is\n"
        "demo/warm.safetensors   the vector: every layer's direction, what was measured, where it acts\n"
        "demo/warm.png           the separation of the layers, on examples held out\n"
        "\n== What to type next\n"
        "source .venv/bin/activate\n"
        'steer try demo/warm.safetensors -p "Tell me about your weekend." --strengths 0,1,2,3\n'
        "steer extract --pos examples/data/formal.jsonl --neg examples/data/casual.jsonl "
        "--out demo/formal.safetensors\n"
        "steer try '2*warm - formal' --vector warm=demo/warm.safetensors --vector formal=demo/formal.safetensors "
        '-p "Can you help me move?" --strengths 0,1\n'
        "steer --help"
    )


if __name__ == "__main__":
    main()
