"""A vLLM engine in a process of its own, for one evaluation: its requests are steered each in its own way."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from steer.serving.lora import lora_arguments
from vectors.errors import ModelError, UsageError
from vectors.expression import Composition
from vectors.steering import SteeringVector
from vectors.storage.files import write_atomically
from vectors.storage.locks import remove_leftovers, temporary_folder_and_lock

ENVIRONMENT = {
    "VLLM_PLUGINS": "steer",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}
# What a server would refuse a client, an evaluation must measure: random directions, and strengths far too great.
SETTINGS = {"any_base": True, "allow_strength": True, "rows": 256, "directions": 16, "phases": 16}


class Request(NamedTuple):
    """A text for the engine: its ids, of which the last `given` are only scored, what steers it, and a LoRA adapter."""

    ids: Sequence[int]
    given: int = 0
    composition: Composition | None = None
    vectors: Mapping[str, SteeringVector] = {}
    adapter: Path | None = None


class OfflineEngine:
    """The process, over many calls; vectors are sent once, under names made of their digests."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self.process, self.log = process, log
        self.bound: set[str] = set()
        self.vocabulary = 0
        self.progress: Callable[[int, int], None] = lambda done, total: None  # of the rows of a call

    def likelihoods(self, requests: Sequence[Request]) -> list[list[float]]:
        """The log-likelihood of every given token of each request, in nats. Raises ModelError."""
        values: list[list[float]] = self._call("likelihoods", rows=[self._row(request) for request in requests])
        return values

    def divergences(self, references: Sequence[Request], requests: Sequence[tuple[int, Request]]) -> list[list[float]]:
        """KL(reference || request) of every given token, in nats; a request comes with its reference's index.

        Exact, from all log-probabilities of every position of the text. Raises ModelError.
        """
        rows = [{**self._row(request), "reference": number} for number, request in requests]
        values: list[list[float]] = self._call(
            "divergences", references=[self._row(request) for request in references], rows=rows
        )
        return values

    def generate(
        self, requests: Sequence[Request], tokens: int, *, temperature: float = 0.0, seeds: Sequence[int] = ()
    ) -> list[list[int]]:
        """The ids of a completion of each request, of at most `tokens`. Raises ModelError."""
        rows = [self._row(request) for request in requests]
        ids: list[list[int]] = self._call(
            "generate", rows=rows, tokens=tokens, temperature=temperature, seeds=list(seeds)
        )
        return ids

    def _row(self, request: Request) -> dict[str, Any]:
        row: dict[str, Any] = {"ids": list(request.ids), "given": request.given, "steer": None}
        if request.adapter is not None:
            row["adapter"] = str(request.adapter)
        if request.composition is None or not request.composition.terms:
            return row
        names = {}
        for name in request.composition.names:
            vector = request.vectors[name]
            names[name] = "v" + vector.digest.removeprefix("sha256:")[:24]
            if names[name] not in self.bound:
                self._call("bind", name=names[name], content=base64.b64encode(vector.encode()).decode())
                self.bound.add(names[name])
        terms = tuple(replace(term, name=names[term.name]) for term in request.composition.terms)
        return {**row, "steer": str(Composition(terms))}

    def _call(self, function: str, **arguments: Any) -> Any:
        """The value of a call in the process. Raises ModelError with vLLM's reason."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"call": function, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            while line.startswith('{"done"'):
                counts = json.loads(line)
                self.progress(counts["done"], counts["total"])
                line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": self._last_error()}
        if "failed" in answer:
            raise ModelError(f"vLLM can't measure the model: {answer['failed']}", "use --engine transformers")
        return answer["value"]

    def _last_error(self) -> str:
        self.log.seek(0)
        printed = self.log.read().splitlines()
        return ([line for line in printed if "Error" in line] or printed or ["its process ended without a message"])[-1]


@contextlib.contextmanager
def offline_engine(
    model: Path, *, max_tokens: int, dtype: str = "auto", adapters: Sequence[Path] = ()
) -> Iterator[OfflineEngine]:
    """A context with a vLLM engine on a model folder, which ends with it, whatever happens.

    `max_tokens` is the longest text, `adapters` are the LoRA adapters of its requests.
    `dtype` auto is float32 on a CPU, as everywhere here, and the model's own on a
    GPU. Raises UsageError where vLLM is not installed, ModelError for a model that it can't load.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UsageError("--engine vllm needs vLLM, which is not installed", "pip install 'steer-workbench[vllm]'")
    import torch

    on_cpu = not torch.cuda.is_available()
    chosen = "float32" if dtype == "auto" and on_cpu else dtype
    temporary = Path(tempfile.gettempdir()).absolute()
    remove_leftovers(temporary)
    with temporary_folder_and_lock(temporary / "steer-eval") as (folder, _), tempfile.TemporaryFile("w+") as printed:
        write_atomically(folder / "steer.json", json.dumps(SETTINGS).encode())
        environment = {**os.environ, **ENVIRONMENT, "STEER_CONFIG": str(folder / "steer.json")}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "steer.serving.offline.host"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, text=True, env=environment,
        )  # fmt: skip
        engine = OfflineEngine(process, printed)
        try:
            engine.vocabulary = engine._call(
                "start", model=str(model), dtype=chosen, max_model_len=max_tokens + 1, enforce_eager=on_cpu,
                max_num_seqs=64, **lora_arguments(adapters),
            )["vocabulary"]  # fmt: skip
            yield engine
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]
