"""Log-probabilities computed by vLLM, in a process of its own: `python -m steer.folding.vllm_scores`.

The process reads two JSON lines from stdin: {"model": FOLDER, "max_tokens": N}, so that it can load the model while the
caller computes, then [[token id, ...], ...]. It writes one JSON line: for each row, the log-probabilities, in nats, of
all tokens but the first. The steering plugin is off, so that only the weights act.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vectors.errors import ModelError

ENVIRONMENT = {
    "VLLM_PLUGINS": "",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}

Scores = Callable[[Sequence[Sequence[int]]], list[list[float]]]


@contextlib.contextmanager
def loading(model: Path, max_tokens: int) -> Iterator[Scores]:
    """Start vLLM on a model folder in float32; yields a function that waits for it and scores rows of token ids.

    Rows may have up to `max_tokens` tokens. The function can be called once; it raises ModelError with vLLM's own
    reason when vLLM can't load the model. The process ends with the block, whatever happens.
    """
    environment = {**os.environ, **ENVIRONMENT}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "steer.folding.vllm_scores"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )

        def scores(rows: Sequence[Sequence[int]]) -> list[list[float]]:
            out, _ = process.communicate(json.dumps([list(row) for row in rows]) + "\n")
            lines = out.strip().splitlines()
            if process.returncode or not lines:
                log.seek(0)
                printed = log.read().splitlines()
                reason = (
                    [line for line in printed if "Error" in line] or printed or ["the process ended without a message"]
                )[-1]
                raise ModelError(
                    f"vLLM can't run the model that was written: {reason.strip()}",
                    "if it can't run the base model either, verify with transformers alone: --skip-vllm",
                )
            result: list[list[float]] = json.loads(lines[-1])
            return result

        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended already: `scores` raises the reason
                process.stdin.write(json.dumps({"model": str(model), "max_tokens": max_tokens}) + "\n")
                process.stdin.flush()
            yield scores
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def main() -> None:
    """Load the model, read the rows, and write their scores."""
    request = json.loads(sys.stdin.readline())
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr, so that stdout holds the answer alone
    from vllm import LLM, SamplingParams

    engine = LLM(
        request["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=request["max_tokens"] + 1,
        max_num_seqs=8,
        disable_log_stats=True,
        enable_prefix_caching=False,
    )
    rows = json.loads(sys.stdin.readline())
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    outputs = engine.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
    scores = [
        [entry[token].logprob for token, entry in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
        for row, output in zip(rows, outputs, strict=True)
    ]
    answer.write(json.dumps(scores) + "\n")
    answer.flush()
    os._exit(0)  # vLLM's threads would keep the process alive


if __name__ == "__main__":
    main()
