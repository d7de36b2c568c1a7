"""Answers read once more by the engine, for judges that are probes: `steer.experiments.running.readouts` says how.

A judge's thread tokenises an answer, and the server's event loop runs one request after the other, so that readings
never take more than one place among the requests of clients. A request computes the prompt and the answer, and writes
one token that nobody sees.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from probes.data.examples import Example, Message
from probes.models.tokens import plain_ids, tokenise
from steer.experiments.exports import messages_of
from steer.experiments.running.readouts import Read, expression
from steer.experiments.specification import Experiment, Judge
from steer.serving.engine import receipts
from steer.serving.engine.admission import Admission
from steer.serving.engine.receipts import HttpRequest
from steer.serving.engine.resolved import EXPRESSION, GIVEN
from vectors.storage.files import canonical_json

WAIT = 120.0  # seconds for one answer; a paused engine reads none


def reader(engine: Any, admission: Admission, experiment: Experiment) -> Read:
    """A function that reads answers with this engine (vLLM's), for a thread beside the running event loop."""
    loop = asyncio.get_running_loop()
    longest = engine.model_config.max_model_len - 1

    def read(judge: Judge, texts: Sequence[tuple[Any, str]]) -> list[float | None]:
        return [one(judge, prompt, text) for prompt, text in texts]

    def one(judge: Judge, prompt: Any, text: str) -> float | None:
        try:
            given = tokens_of(prompt, text, engine.get_tokenizer(), longest)
            if given is None:
                return None
            reading = _score(engine, admission, expression(experiment.name, judge.name), *given)
            return asyncio.run_coroutine_threadsafe(reading, loop).result(WAIT)
        except Exception:  # whatever it is, such as a text without a token or an engine that has died: no score
            return None

    return read


def tokens_of(prompt: Any, text: str, tokenizer: Any, longest: int) -> tuple[list[int], int] | None:
    """(ids of the prompt and the answer, number of those of the answer); None where nothing is left to read.

    `prompt` is what a client sent: messages, which the chat template renders, or the text that a completion goes on.
    What is longer is cut off. Raises SteerError for an answer without a token.
    """
    if not text.strip():
        return None
    if isinstance(prompt, str):
        before = plain_ids([prompt], tokenizer)[0]
        ids = [*before, *tokenizer(text, add_special_tokens=False)["input_ids"]][:longest]
        return (ids, len(ids) - len(before)) if len(ids) > len(before) else None
    messages = messages_of(canonical_json(prompt))
    if messages is None:
        return None
    context = tuple(Message(each["role"], each["content"]) for each in messages)
    tokens = tokenise([Example(text, context)], tokenizer, longest=longest, truncate=True)[0]
    end = tokens.counted[-1] + 1
    return tokens.ids[:end], end - tokens.counted[0]


async def _score(engine: Any, admission: Admission, text: str, ids: Sequence[int], given: int) -> float | None:
    """The mean score of the last `given` tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    resolved = admission.resolve(text)
    http = HttpRequest(None, text, resolved)
    receipts.use(http)
    parameters = SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={EXPRESSION: text, GIVEN: given},
    )  # fmt: skip
    with admission.residency.holding(resolved.vectors.values()):
        async for _ in engine.generate({"prompt_token_ids": list(ids)}, parameters, f"judge-{uuid.uuid4().hex}"):
            pass
    receipt = http.total()
    return None if receipt is None else receipt["gates"][0]["value"]
