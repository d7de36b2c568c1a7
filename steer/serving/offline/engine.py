"""A vLLM engine in a process of its own, for one evaluation: its requests are steered each in its own way."""

from __future__ import annotations

import base64
import contextlib
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
from vectors.errors import ModelError
from vectors.expression import Composition
from vectors.probe import Probe
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


class Request(NamedTuple):
    """A text for the engine: its ids, of which the last `given` are only scored, what steers it, and a LoRA adapter.

    `probes` are what the conditions of the composition read, by name.
    """

    ids: Sequence[int]
    given: int = 0
    composition: Composition | None = None
    vectors: Mapping[str, SteeringVector] = {}
    adapter: Path | None = None
    probes: Mapping[str, Probe | SteeringVector] = {}


class Written(NamedTuple):
    """The ids of a completion, and what the receipt says of each condition: `condition`, `value`, `held`, `read`."""

    ids: list[int]
    gates: list[dict[str, Any]]


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
    ) -> list[Written]:
        """A completion of each request, of at most `tokens`. Raises ModelError."""
        rows = [self._row(request) for request in requests]
        found = self._call("generate", rows=rows, tokens=tokens, temperature=temperature, seeds=list(seeds))
        return [
            Written(each["ids"], [_as_written(gate, request) for gate in each["gates"]])
            for each, request in zip(found, requests, strict=True)
        ]

    def _row(self, request: Request) -> dict[str, Any]:
        row: dict[str, Any] = {"ids": list(request.ids), "given": request.given, "steer": None}
        if request.adapter is not None:
            row["adapter"] = str(request.adapter)
        if request.composition is None or not request.composition.terms:
            return row
        terms = []
        if missing := [each for each in request.composition.probes if each not in request.probes]:
            raise ModelError(f"vLLM has no probe {', '.join(missing)} to read here", "use --engine transformers")
        for term in request.composition.terms:
            conditions = tuple(
                each if each.is_section else replace(each, name=self._name(request.probes[each.name]))
                for each in term.conditions
            )
            terms.append(replace(term, name=self._name(request.vectors[term.name]), conditions=conditions))
        return {**row, "steer": str(Composition(tuple(terms)))}

    def _name(self, source: SteeringVector | Probe) -> str:
        """The name of a vector or probe in the process, which has it from now on."""
        name = name_of(source)
        if name not in self.bound:
            self._call("bind", name=name, content=base64.b64encode(source.encode()).decode())
            self.bound.add(name)
        return name

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


def name_of(source: SteeringVector | Probe) -> str:
    """The name of a vector or probe in the process."""
    return "v" + source.digest.removeprefix("sha256:")[:24]


def _as_written(gate: dict[str, Any], request: Request) -> dict[str, Any]:
    """What a receipt says of a condition, with the condition as the request has it."""
    assert request.composition is not None
    for condition in request.composition.conditions:
        named = condition if condition.is_section else replace(condition, name=name_of(request.probes[condition.name]))
        if str(named) == gate["condition"]:
            return {"condition": str(condition), **{key: gate.get(key) for key in ("value", "held", "read")}}
    raise ModelError(f"vLLM's receipt has the condition {gate['condition']}, which was not sent", "report this")


@contextlib.contextmanager
def offline_engine(
    model: Path, settings: Mapping[str, Any], *, max_tokens: int, dtype: str = "auto", adapters: Sequence[Path] = ()
) -> Iterator[OfflineEngine]:
    """A context with a vLLM engine on a model folder, which ends with it, whatever happens.

    `settings` are those of the plugin (`needs.settings_for`), `max_tokens` is the longest text, `adapters` are the LoRA
    adapters of its requests. `dtype` auto is float32 on a CPU, as everywhere here, and the model's own on a GPU. Raises
    ModelError for a model that it can't load.
    """
    import torch

    on_cpu = not torch.cuda.is_available()
    chosen = "float32" if dtype == "auto" and on_cpu else dtype
    temporary = Path(tempfile.gettempdir()).absolute()
    remove_leftovers(temporary)
    with temporary_folder_and_lock(temporary / "steer-eval") as (folder, _), tempfile.TemporaryFile("w+") as printed:
        write_atomically(folder / "steer.json", json.dumps(dict(settings)).encode())
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
