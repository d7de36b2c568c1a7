"""Merging side by side with mergekit and with `cat` and `cp`, interleaved in one run, on generated models.

    .venv/bin/python tests/bench/merging.py --mergekit PEER/bin/python [--rounds 3] [--billions 0.5] [--folder DIR]
    .venv/bin/python tests/bench/merging.py --methods all                 every elementwise method against cat and cp
    .venv/bin/python tests/bench/merging.py --growth 0.1,0.5,1,3          whether time grows linearly

Four bfloat16 models of that many parameters are generated under the names and shapes of a Llama: a base and three
fine-tunes. Each round runs every contestant once, in turn, so a drift of the machine meets them all; before each the
inputs are read once, so that all are warm, and as much is written and removed as will be written: a virtual machine's
host takes free memory back, and is slow to give it. The floor reads the inputs with `cat` and copies one with `cp`.
Every contestant is a process of its own, whose processor seconds say more than the clock on a busy machine: start-up,
planning, checks, digests and the flush to disk are inside its time. The first of our runs has the inputs' SHA-256 to
compute; later ones remember them, and both are printed. Peak anonymous memory is RssAnon, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from figures import machine, spread

ROOT = Path(__file__).parents[2]
NAMES = ("base", "a", "b", "c")
BLOCK = 1 << 22
PAIRS = ("slerp", "nuslerp", "nearswap")
ELEMENTWISE = (
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "slerp",
    "nuslerp", "multislerp", "karcher", "model_stock", "sce", "nearswap",
)  # fmt: skip


def shapes(billions: float) -> dict[str, tuple[int, ...]]:
    """The parameters of a Llama of about that size: 24 layers, as wide as it takes."""
    layers, vocabulary = 24, 32_000
    hidden = max(round((billions * 1e9 / (layers * 12.5)) ** 0.5 / 64) * 64, 64)
    inner = hidden * 8 // 3 // 64 * 64
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        at = f"model.layers.{i}"
        found |= {f"{at}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        found |= {f"{at}.mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        found |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
        found |= {f"{at}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return found


def generate(folder: Path, billions: float) -> int:
    """Write the four models; returns the number of parameters of one."""
    from vectors.weights import header_bytes

    wanted = shapes(billions)
    hidden = wanted["model.norm.weight"][0]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": 24,
        "intermediate_size": wanted["model.layers.0.mlp.up_proj.weight"][0], "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "vocab_size": 32_000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "silu",
    }  # fmt: skip
    # A few blocks of noise, again and again: drawing all anew would take longer than all the merges.
    draw = np.random.default_rng(0)
    blocks = [draw.standard_normal(BLOCK, np.float32) for _ in range(8)]
    layout = {n: ("BF16", s, 2 * int(np.prod(s))) for n, s in sorted(wanted.items())}
    for number, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        with (folder / name / "model.safetensors").open("wb") as file:
            file.write(header_bytes(layout, {"format": "pt"}))
            for place, (_, (_, shape, _)) in enumerate(layout.items()):
                count = int(np.prod(shape))
                for turn, start in enumerate(range(0, count, BLOCK)):
                    size = min(BLOCK, count - start)
                    values = np.float32(0.02) * blocks[(place + turn) % 8][:size]
                    if number:
                        values += np.float32(0.002) * blocks[(place + turn + number) % 8][-size:]
                    file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return sum(size // 2 for _, _, size in layout.values())


class Run(NamedTuple):
    """Seconds on the wall, peak RssAnon in GB, and processor seconds of all threads and children."""

    seconds: float
    peak: float
    cpu: float


def timed(command: list[str], folder: Path) -> Run:
    """Run one contestant."""
    # With its bytecode kept, as an installed program has it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    peak, alive = [0.0], threading.Event()

    def watch() -> None:
        while not alive.wait(0.02):
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            values = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
            peak[0] = max([peak[0], *(value * 1024 / 1e9 for value in values)])

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate()[0]
    seconds = time.perf_counter() - started
    alive.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output.decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(seconds, peak[0], after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def ours(method: str) -> list[str]:
    """Our command for a method."""
    inputs = ["a", "b"] if method in PAIRS else ["a", "b", "c"]
    base = [] if method in ("slerp", "nearswap") else ["--base", "base"]
    density = (
        ["--density", "0.2"]
        if method in ("ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties")
        else []
    )
    run = "from steer.cli import main; main()"
    return [sys.executable, "-c", run, "merge", *inputs, *base, "--method", method, *density, "-o", "out"]


def peer(program: str, method: str, folder: Path) -> list[str]:
    """mergekit's command for the same."""
    parameters = "weight: 1.0" + (", density: 0.2" if method == "ties" else "")
    models = "".join(f"  - model: {folder / n}\n    parameters: {{{parameters}}}\n" for n in "abc")
    (folder / f"{method}.yaml").write_text(
        f"merge_method: {method}\nbase_model: {folder / 'base'}\nmodels:\n{models}dtype: bfloat16\n"
    )
    run = str(Path(__file__).parent / "mergekit_peer.py")
    return [program, run, str(folder / f"{method}.yaml"), str(folder / "out"), "--no-copy-tokenizer"]


def floor(method: str) -> list[str]:
    """Reading the inputs and writing the output, and nothing else."""
    names = ("a", "b") if method in ("slerp", "nearswap") else ("base", "a", "b") if method in PAIRS else NAMES
    reading = " ".join(f"{name}/model.safetensors" for name in names if name != "a")
    return [
        "bash",
        "-c",
        f"mkdir out && cat {reading} > /dev/null && cp a/model.safetensors out/ && sync out/model.safetensors",
    ]


def warm(folder: Path) -> None:
    """Read all inputs once, and write and remove as much as will be written."""
    shutil.copyfile(folder / "base/model.safetensors", folder / "scratch")
    (folder / "scratch").unlink()
    for name in NAMES:
        with (folder / name / "model.safetensors").open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def rounds(contestants: dict[str, Callable[[], list[str]]], folder: Path, count: int) -> dict[str, list[Run]]:
    """What was measured of every contestant, round by round."""
    found: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(count):
        for name, command in contestants.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()
            warm(folder)
            found[name].append(timed(command(), folder))
    shutil.rmtree(folder / "out", ignore_errors=True)
    return found


def report(methods: list[str], found: dict[str, list[Run]], size: int, first: dict[str, float]) -> None:
    """Seconds, GB/s, memory and the ratios to the floor and to mergekit, pair by pair."""
    for method in methods:
        mine, least = found[f"steer {method}"], found[f"floor {method}"]
        files = {"slerp": 3, "nearswap": 3, "nuslerp": 4}.get(method, 5)
        seconds = [run.seconds for run in mine]
        speed, peak = files * size / median(seconds) / 1e9, max(run.peak for run in mine)
        print(f"{method:18} steer {spread(seconds)} s, {speed:.2f} GB/s read and written, RssAnon {peak:.2f} GB")
        print(f"{'':18} {first[method]:.2f} s where the inputs' digests are computed too")
        print(f"{'':18} processor {spread([run.cpu for run in mine])} s; cat and cp {spread([r.cpu for r in least])} s")
        ratios = spread([a.seconds / b.seconds for a, b in zip(mine, least, strict=True)])
        print(f"{'':18} / floor {ratios}  (cat and cp: {spread([run.seconds for run in least])} s)")
        other = found.get(f"mergekit {method}")
        if other:
            print(
                f"{'':18} mergekit {spread([r.seconds for r in other])} s, RssAnon {max(r.peak for r in other):.2f} GB"
            )
            print(
                f"{'':18} mergekit / steer {spread([b.seconds / a.seconds for a, b in zip(mine, other, strict=True)])}"
            )
            print(f"{'':18} in processor seconds {spread([b.cpu / a.cpu for a, b in zip(mine, other, strict=True)])}")


def main() -> None:
    """Generate, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", help="the Python of an environment of its own, see mergekit_peer.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--billions", type=float, default=0.5)
    parser.add_argument("--methods", default="ties,task_arithmetic", help="with commas between, or all")
    parser.add_argument("--growth", help="sizes in billions, with commas between")
    parser.add_argument("--folder", type=Path, help="where the models are generated and removed again")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    methods = list(ELEMENTWISE) if arguments.methods == "all" else arguments.methods.split(",")
    print(f"{machine()}; Python {platform.python_version()}, NumPy {np.__version__}; {arguments.rounds} rounds")
    for billions in [float(part) for part in arguments.growth.split(",")] if arguments.growth else [arguments.billions]:
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-merging-") as name:
            folder = Path(name)
            count = generate(folder, billions)
            os.sync()
            print(f"\n4 models of {count / 1e9:.3f} B parameters, bfloat16, {2 * count / 1e9:.2f} GB each")
            contestants: dict[str, Callable[[], list[str]]] = {}
            first = {}
            for method in methods:
                shutil.rmtree(folder / "out", ignore_errors=True)
                timed(ours(method), folder)  # compiles the loops, once for a machine
                shutil.rmtree(folder / "out", ignore_errors=True)
                shutil.rmtree(folder / "cache", ignore_errors=True)
                warm(folder)
                first[method] = timed(ours(method), folder).seconds
                contestants[f"floor {method}"] = functools.partial(floor, method)
                contestants[f"steer {method}"] = functools.partial(ours, method)
                if arguments.mergekit and method in ("ties", "task_arithmetic"):
                    contestants[f"mergekit {method}"] = functools.partial(peer, arguments.mergekit, method, folder)
            report(methods, rounds(contestants, folder, arguments.rounds), 2 * count, first)


if __name__ == "__main__":
    main()
