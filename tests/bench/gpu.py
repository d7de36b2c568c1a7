"""Merging on a GPU beside the compiled loops on all cores, on generated models: the same bytes, and their seconds.

    python tests/bench/gpu.py [--billions 0.5] [--rounds 3] [--folder DIR] [--methods ties,task_arithmetic]

Each round merges with either in turn, both in this process: start-up and torch's are not inside.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from figures import machine, spread
from merging import generate, warm

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Generate, merge, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--billions", type=float, default=0.5)
    parser.add_argument("--methods", default="ties,task_arithmetic,dare_ties")
    parser.add_argument("--folder", type=Path, help="where the models are generated and removed again")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from merges import api
    from merges.recipes.recipe import Part, Recipe

    print(f"{machine()}; {torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-gpu-") as name:
        folder = Path(name)
        print(f"4 models of {generate(folder, arguments.billions) / 1e9:.3f} B parameters, bfloat16")
        for method in arguments.methods.split(","):
            for scope in ("tensor", "global") if method == "ties" else ("tensor",):
                options = {"weight": 0.7} | ({} if method == "task_arithmetic" else {"density": 0.2})
                parts = tuple(Part(str(folder / part), part, options) for part in "abc")
                recipe = Recipe(method, parts, str(folder / "base"), scope=scope)
                seconds: dict[str, list[float]] = {"cpu": [], "cuda": []}
                digests = set()
                for _ in range(arguments.rounds + 1):  # the first compiles
                    for device, own in seconds.items():
                        shutil.rmtree(folder / "out", ignore_errors=True)
                        warm(folder)
                        started = time.perf_counter()
                        record = api.merge(recipe, folder / "out", device=device)
                        own.append(time.perf_counter() - started)
                        digests.add(record["outputs"]["model.safetensors"])
                ratios = [a / b for a, b in zip(seconds["cpu"][1:], seconds["cuda"][1:], strict=True)]
                middle = {device: median(own[1:]) for device, own in seconds.items()}
                print(
                    f"{method:16} {scope:6} cores {middle['cpu']:.2f} s, GPU {middle['cuda']:.2f} s, "
                    f"cores / GPU {spread(ratios)}; the same bytes: {len(digests) == 1}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
