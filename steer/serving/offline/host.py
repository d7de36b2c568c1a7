"""The process in which vLLM runs: `python -m steer.serving.offline.host`. A call a line on stdin, its value on stdout.

Before the value come lines {"done", "total"} that count the finished rows. What libraries print goes to stderr. A row
of a call is {"ids": [...], "given": N, "steer": EXPRESSION or null, "adapter": FOLDER of a LoRA adapter}: the last N
ids are a response that is only scored, and scopes take them as one.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

BYTES = 2**30  # of log-probabilities over the vocabulary that are in flight at once
ENGINE: Any = None
ANSWERS: IO[str] | None = None  # where values and progress go
EVERY = 0.5  # seconds between two lines of progress
ADAPTERS: dict[str, int] = {}  # the id of each LoRA adapter, by its folder

Row = dict[str, Any]


class Progress:
    """The rows of a call that are finished, which `ANSWERS` gets from time to time."""

    def __init__(self, total: int) -> None:
        self.done, self.total, self.reported = 0, total, time.monotonic()

    def add(self) -> None:
        """Count one more."""
        self.done += 1
        if ANSWERS is not None and time.monotonic() - self.reported > EVERY:
            self.reported = time.monotonic()
            send({"done": self.done, "total": self.total})


def send(value: dict[str, Any]) -> None:
    """Write a line to whoever called."""
    assert ANSWERS is not None
    ANSWERS.write(json.dumps(value) + "\n")
    ANSWERS.flush()


def start(**arguments: Any) -> dict[str, Any]:
    """Load the model; `arguments` are those of vLLM's LLM."""
    global ENGINE
    from vllm import LLM
    from vllm.v1.engine.logprobs import LogprobsProcessor

    if not callable(getattr(LogprobsProcessor, "_update_prompt_logprobs", None)):
        raise RuntimeError("this vLLM has no LogprobsProcessor._update_prompt_logprobs")
    LogprobsProcessor._update_prompt_logprobs = _as_tensors
    ENGINE = LLM(**arguments, max_logprobs=-1, disable_log_stats=True, use_tqdm_on_load=False)
    return {"vocabulary": ENGINE.model_config.get_vocab_size()}


def _as_tensors(self: Any, tensors: Any) -> None:
    """Keep the log-probabilities of a prompt as tensors: vLLM makes several Python objects of each number."""
    pieces = self.prompt_logprobs if isinstance(self.prompt_logprobs, _Pieces) else _Pieces()
    pieces.append((tensors[0], tensors[1]))
    self.prompt_logprobs = pieces


class _Pieces(list[Any]):
    """Ids and log-probabilities [tokens, 1 + entries] of consecutive pieces of a prompt; the first entry is its own."""


def bind(name: str, content: str) -> dict[str, Any]:
    """Bind a name to a vector or a probe, given as the base64 text of its file."""
    from steer.serving.engine.frontend_hooks import admission_of
    from steer.serving.http.uploads import decoded

    encoded = base64.b64decode(content)
    admission = admission_of(ENGINE.llm_engine.input_processor)
    source = decoded(admission, encoded, name)
    digest = ENGINE.collective_rpc("steer_load", args=(encoded,))[0]
    admission.bind(name, source, digest)
    return {}


def likelihoods(rows: Sequence[Row]) -> list[list[float]]:
    """The log-likelihood of every given token, in nats, of all rows in one batch."""
    values: list[list[float]] = [[] for _ in rows]
    progress = Progress(len(rows))
    for index, output in _run(rows, prompt_logprobs=0, max_tokens=1):
        progress.add()
        scores = [piece[1][:, 0] for piece in output.prompt_logprobs]
        values[index] = [float(value) for piece in scores for value in piece][-rows[index]["given"] :]
    return values


def divergences(references: Sequence[Row], rows: Sequence[Row]) -> list[list[float]]:
    """KL(reference || row) of every given token, in nats, over the whole vocabulary.

    `row["reference"]` is the index of its reference, whose given tokens are the same. A reference and its rows share a
    batch as far as memory allows.
    """
    values: list[list[float]] = [[] for _ in rows]
    progress = Progress(len(rows))
    for number, reference in enumerate(references):
        chosen = [index for index, row in enumerate(rows) if row["reference"] == number]
        ((_, output),) = _run([reference], prompt_logprobs=-1, max_tokens=1)
        base = _distributions(output, reference["given"])
        room = max(1, BYTES // (12 * base.shape[1] * max(len(row["ids"]) for row in [reference, *rows])))
        for first in range(0, len(chosen), room):
            part = chosen[first : first + room]
            for index, output in _run([rows[i] for i in part], prompt_logprobs=-1, max_tokens=1):
                progress.add()
                other = _distributions(output, reference["given"])
                divergence = (base.exp() * (base - other)).sum(-1).clamp_min(0)
                values[part[index]] = divergence.tolist()
    return values


def _distributions(output: Any, given: int) -> Any:
    """The log-probabilities before each of the last `given` tokens, float64 [given, vocabulary]."""
    import torch

    ids = torch.cat([piece[0] for piece in output.prompt_logprobs])[-given:, 1:].long()
    scores = torch.cat([piece[1] for piece in output.prompt_logprobs])[-given:, 1:]
    ordered = torch.empty_like(scores).scatter_(1, ids, scores)
    return ordered.double().log_softmax(-1)


def generate(rows: Sequence[Row], tokens: int, temperature: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One completion of each row, all in one batch: its ids, the end token included, and its receipt's gates."""
    values: list[dict[str, Any]] = [{} for _ in rows]
    progress = Progress(len(rows))
    for index, output in _run(rows, seeds=seeds, max_tokens=tokens, temperature=temperature):
        progress.add()
        completion = output.outputs[0]
        gates = (getattr(completion, "steer", None) or {}).get("gates", [])
        values[index] = {"ids": list(completion.token_ids), "gates": gates}
    return values


def _run(rows: Sequence[Row], seeds: Sequence[int] = (), **settings: Any) -> Iterator[tuple[int, Any]]:
    """The index and the finished output of each row; all are sent before the first step."""
    engine = ENGINE.llm_engine
    waiting = {str(index) for index in range(len(rows))}
    try:
        _add(rows, seeds, settings)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    waiting.remove(output.request_id)
                    yield int(output.request_id), output
    finally:
        if waiting:
            engine.abort_request(sorted(waiting))


def _add(rows: Sequence[Row], seeds: Sequence[int], settings: dict[str, Any]) -> None:
    """Send the rows to the engine. Raises what vLLM does for a row that it refuses."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for index, row in enumerate(rows):
        extra = {} if row["steer"] is None else {"steer": row["steer"], "steer_given_response": row["given"]}
        parameters = SamplingParams(
            **{"temperature": 0.0, "detokenize": False, **settings},
            extra_args=extra or None, seed=seeds[index] if seeds else None, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        ENGINE.llm_engine.add_request(
            str(index), {"prompt_token_ids": row["ids"]}, parameters, lora_request=_adapter(row.get("adapter"))
        )


def _adapter(folder: str | None) -> Any:
    """vLLM's request for a LoRA adapter, whose id is the same for the same folder."""
    if folder is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(folder, ADAPTERS.setdefault(folder, len(ADAPTERS) + 1), folder)


def main() -> None:
    """Answer calls until stdin ends."""
    global ANSWERS
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    calls: dict[str, Callable[..., Any]] = {
        call.__name__: call for call in (start, bind, likelihoods, divergences, generate)
    }
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": calls[request.pop("call")](**request)}
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        send(answer)
    os._exit(0)  # vLLM's threads would keep the process alive


if __name__ == "__main__":
    main()
