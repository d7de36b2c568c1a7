"""A forward pass of smollm2 alone and beside busy processes, with threads that spin while they wait and that sleep.

python tests/bench/waiting.py --busy 2
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

ROUNDS = 3


def measure() -> None:
    """Print the seconds of some forward passes of 4 x 128 tokens on 2 threads."""
    import torch

    from probes.models.loading import load

    torch.set_num_threads(2)
    model = load("smollm2", "cpu", "float32").model
    ids = torch.randint(10, 1000, (4, 128), generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.inference_mode():
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            model(ids)
            seconds.append(time.perf_counter() - start)
    print("  ".join(f"{each:.2f}" for each in seconds[1:]), flush=True)


def main() -> None:
    """Measure each policy alone and beside the busy processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--busy", type=int, default=2, help="The number of other busy processes.")
    parser.add_argument("--measure", action="store_true")
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
        return
    for busy in (0, arguments.busy):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            for policy in (None, "PASSIVE"):
                environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
                environment |= {} if policy is None else {"OMP_WAIT_POLICY": policy}
                print(f"{busy} busy processes, OMP_WAIT_POLICY {policy or 'not set'}: ", end="", flush=True)
                subprocess.run([sys.executable, __file__, "--measure"], env=environment, check=True)
        finally:
            for other in others:
                other.kill()


if __name__ == "__main__":
    main()
