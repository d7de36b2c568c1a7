"""Log-probabilities by vLLM, in a process of its own: `python -m steer.folding.vllm_scores`, JSON in, JSON out.

In: {"model": FOLDER, "rows": [[token, ...], ...]}. Out, on the last line of stdout: the log-probability of every token
of each row but the first. The plugin is off: what is proved is the weights alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vectors.errors import ModelError

ENVIRONMENT = {
    "VLLM_PLUGINS": "",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}


def scores(model: Path, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """What vLLM computes for the weights in a folder, in float32. Raises ModelError when it can't load them."""
    environment = {**os.environ, **ENVIRONMENT}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "steer.folding.vllm_scores"],
        input=json.dumps({"model": str(model), "rows": [list(row) for row in rows]}),
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        told = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or [""]
        raise ModelError(
            f"vLLM can't run what was written: {told[-1].strip()}",
            "if it can't run the model itself either, prove with transformers alone: --skip-vllm",
        )
    found: list[list[float]] = json.loads(lines[-1])
    return found


def main() -> None:
    """Read the request, load, score, print."""
    request = json.load(sys.stdin)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whoever prints, prints elsewhere
    from vllm import LLM, SamplingParams

    rows = request["rows"]
    engine = LLM(
        request["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=max(map(len, rows)) + 1,
        max_num_seqs=8,
        disable_log_stats=True,
        enable_prefix_caching=False,
    )
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    outputs = engine.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
    found = [
        [entry[token].logprob for token, entry in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
        for row, output in zip(rows, outputs, strict=True)
    ]
    channel.write(json.dumps(found) + "\n")
    channel.flush()
    os._exit(0)  # vLLM's threads would keep the process


if __name__ == "__main__":
    main()
