"""vLLM engines for tests, in a process of their own, and the hooked transformers model to compare them with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pico
import torch
from safetensors.torch import save_file

from probes.steered import steered
from vectors.probe import Probe, Readout
from vectors.steering import SteeringVector

HOST = Path(__file__).parent / "engine_host.py"
RUNNERS = ("v1", "v2")  # vLLM's model runners
NO_V2 = "vLLM's V2 runner needs a GPU, or Triton, whose interpreter runs it on a CPU: make triton"
RANK, ALPHA = 8, 16  # of adapters
SIZE = {"hidden_size": 128, "head_dim": 32}  # heads as large as vLLM's CPU attention wants them
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound to a core, it waits for whatever else runs there
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def environment_of(runner: str) -> dict[str, str] | None:
    """The environment in which vLLM takes this model runner; None where it can't run.

    V2 is written in Triton. Without a GPU, Triton's interpreter runs its kernels. The Triton of `make triton` lies in a
    folder of its own, so that no other process finds it.
    """
    chosen = {"VLLM_USE_V2_MODEL_RUNNER": str(RUNNERS.index(runner))}
    if runner == "v1" or torch.cuda.is_available():
        return chosen
    triton = os.environ.get("STEER_TRITON") or next(Path(sys.prefix).glob("triton-*"), None)
    if triton is None:
        return None
    paths = [str(HOST.with_name("triton_on_cpu")), str(triton), os.environ.get("PYTHONPATH", "")]
    return chosen | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


class Failed(Exception):
    """What the engine's process raised."""


class Engines:
    """The process; `call` sends one request and returns its answer."""

    def __init__(self, plugin: bool, log: Path, **environment: str | None) -> None:
        """Start the process; a variable of the environment that is None is not set."""
        self.log, self.plugin, self.environment = log, plugin, environment
        self.running: tuple[Path, Path | None, dict[str, Any]] | None = None  # model, settings, arguments
        self.process = self._process()

    def _process(self) -> subprocess.Popen[str]:
        plugins = {"VLLM_PLUGINS": "steer"} if self.plugin else {"VLLM_PLUGINS": ""}
        whole = {**os.environ, **ENVIRONMENT, **plugins, **self.environment}
        with self.log.open("a") as stderr:
            return subprocess.Popen(
                # -P: the tests' own folder holds a folder `steer`, which must not stand before the package.
                [sys.executable, "-P", str(HOST)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={name: value for name, value in whole.items() if value is not None},
                text=True,
            )

    def call(self, name: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the engine's process died; its log ends:\n{self.log.read_text()[-4000:]}"
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer["value"]

    def start(self, model: Path, settings: Path | None = None, **arguments: Any) -> dict[str, Any]:
        path = str(settings) if settings else None
        self.running = None
        if self.process.poll() is not None:  # an engine before has ended it
            self.process = self._process()
        result: dict[str, Any] = self.call("start", settings=path, plugin=self.plugin, model=str(model), **arguments)
        self.running = model, settings, arguments
        return result

    def generate(self, jobs: Sequence[Mapping[str, Any]], *, together: bool = True) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.call("generate", jobs=list(jobs), together=together)
        return result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def save_model(folder: Path, name: str, **changes: Any) -> Path:
    """A pico model that vLLM can serve."""
    return pico.save(folder / name, name, **{**SIZE, **changes})


def random_vectors(
    folder: Path, hidden: int = 128, layers: int = pico.LAYERS, norm: float = 3.0, *, everywhere: bool = False
) -> dict[str, Path]:
    """Vectors of that length: `warm` acts at all layers, `formal` at layer 1, `calm` at layers 2 and 3. Each records a
    mean projection of 1.5.

    With `everywhere` these and `dry` act at all layers.
    """
    generator = torch.Generator().manual_seed(5)
    everything = list(range(layers))
    acting = {"warm": everything, "formal": [1], "calm": [2, 3]}
    if everywhere:
        acting = dict.fromkeys((*acting, "dry"), everything)
    paths = {}
    for name, apply in acting.items():
        directions = {i: torch.randn(hidden, generator=generator) for i in range(layers)}
        directions = {i: norm * direction / direction.norm() for i, direction in directions.items()}
        paths[name] = folder / f"{name}.safetensors"
        measured = {str(i): {"projection": 1.5} for i in directions}
        SteeringVector(directions, {"apply": apply, "measured": measured}).save(paths[name])
    return paths


PROBES = {"anger": 1, "joy": 0}  # the layers that probes read


def random_probes(folder: Path, hidden: int = 128, layers: Mapping[str, int] = PROBES) -> dict[str, Path]:
    """Probes that read these layers, whose scores are above 0 about half the time."""
    generator, paths = torch.Generator().manual_seed(3), {}
    for name, layer in layers.items():
        paths[name] = folder / f"{name}.safetensors"
        Probe({layer: Readout(torch.randn(hidden, generator=generator), 0.0)}).save(paths[name])
    return paths


def save_adapter(model: Any, folder: Path) -> None:
    """Write a LoRA adapter of every attention and MLP matrix, and add its product to the model's weights."""
    generator, tensors = torch.Generator().manual_seed(9), {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            a = 0.1 * torch.randn(RANK, module.in_features, generator=generator)
            b = 0.1 * torch.randn(module.out_features, RANK, generator=generator)
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            with torch.no_grad():
                module.weight += ALPHA / RANK * (b @ a)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def write_settings(folder: Path, vectors: Mapping[str, Path], **settings: Any) -> Path:
    """A settings file; JSON is YAML."""
    file = folder / "steer.yaml"
    file.write_text(json.dumps({"vectors": {name: str(path) for name, path in vectors.items()}, **settings}))
    return file


def reference(
    model: Any, ids: Sequence[int], response: Sequence[int], composition: str | None, vectors: Mapping[str, Path]
) -> list[float]:
    """Log-probabilities of every token but the first, of prompt and response, by the hooked transformers model."""
    whole = torch.tensor([[*ids, *response]])
    with torch.no_grad():
        if composition is None:
            logits = model(input_ids=whole, use_cache=False).logits
        else:
            bound = {name: SteeringVector.load(path) for name, path in vectors.items()}
            with steered(model, composition, vectors=bound, prompt_length=len(ids)):
                logits = model(input_ids=whole, use_cache=False).logits
    scores = logits[0, :-1].double().log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0]
    return [float(score) for score in scores]


def difference(answer: Mapping[str, Any], expected: Sequence[float]) -> float:
    """The largest difference of log-probabilities, over prompt and response."""
    found = [*answer["prompt_scores"], *answer["scores"]]
    assert len(found) == len(expected)
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))
