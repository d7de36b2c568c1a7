"""Writing a fold beside copying the model's folder, in turn: `.venv/bin/python tests/bench/folding.py [--rounds 6]`.

Planning, reading, writing, hashing and the flush to disk are inside; start-up and the proof are not. The copy is
`cp -r` and `sync`. The vector is random; what is folded is an addition at one layer of the bundled model, and an
ablation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from figures import machine, spread

from merges.engine.pool import Pool
from merges.inputs.sources import open_source
from steer.folding.effects import effects_of
from steer.folding.fold import plan
from steer.folding.model_folder import write_model
from steer.folding.pending import pending_from
from vectors.resolve import compose
from vectors.steering import SteeringVector


def main() -> None:
    """Write, copy, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    source = open_source("smollm2")
    vector = SteeringVector({14: torch.randn(576, generator=torch.Generator().manual_seed(0))})
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        for composition in ("2*v", "ablate(v)"):
            effects = effects_of(*compose(composition, {"v": vector}))
            seconds: list[tuple[float, float]] = []
            for number in range(rounds + 1):
                found = []
                for copied in (False, True):
                    shutil.rmtree(out, ignore_errors=True)
                    os.sync()
                    started = time.perf_counter()
                    if copied:
                        subprocess.run(f"cp -r {source.path} {out} && sync {out}/*", shell=True, check=True)
                    else:
                        out.mkdir()
                        with Pool() as pool:
                            pending, _ = plan(pending_from(source, pool), effects, "auto")
                            write_model(pending, source, out)
                    found.append(time.perf_counter() - started)
                if number:  # the first loads the compiled loops
                    seconds.append((found[0], found[1]))
            ratios = spread([fold / copy for fold, copy in seconds])
            print(f"{composition:10} fold {spread([fold for fold, _ in seconds])} s, / copy {ratios}")


if __name__ == "__main__":
    main()
