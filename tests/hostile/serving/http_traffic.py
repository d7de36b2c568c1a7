"""Requests of all kinds, drawn at random: what a client may send, and what it may not."""

from __future__ import annotations

import json
import random
import string
from typing import Any

PROMPTS = (
    "The capital of France is", "Water boils at a temperature of", "Once upon a time there was",
    "The three primary colors are", "In the morning I like to drink", "The opposite of hot is",
)  # fmt: skip
# Expressions over the vectors of the trial, whose answers are recorded one at a time before the load.
EXPRESSIONS = (
    "warm", "2*warm - formal", "1.5*warm@response", "ablate(warm)", "formal@first:3 + warm@after:3", "clamp(calm, 1)",
)  # fmt: skip
KEYS = ("vllm_xargs", "model", "messages", "prompt", "use_beam_search", "stream", "n", "logprobs", "max_tokens")
NEAR = ("stear", "steering", "Steer", "STEER", "steer_vector", "ster", "steers")
OTHER_ROUTES = (
    "/invocations", "/inference/v1/generate", "/v1/chat/completions/batch", "/v1/completions/render", "/v1/systemone",
    "/generative_scoring", "/v1/chat/completions/render", "/v1/messages/render", "/v1/responses/render",
)  # fmt: skip


def completion(model: str, prompt: str | list[str], expression: str | None = None, **more: Any) -> dict[str, Any]:
    """A greedy completion with log-probabilities."""
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 2, "ignore_eos": True}
    if expression is not None:
        body["vllm_xargs"] = {"steer": expression}
    return {**body, **more}


def fuzzed_expression(draw: random.Random) -> str:
    """A text that is an expression, nearly one, or none: from pieces of the grammar, and from any characters."""
    pieces = [
        *("warm", "formal", "calm", "nobody", "'a-b'", "2", "0.5", "-", "+", "*", "(", ")", "[", "]", ",", "@", ":"),
        *("ablate", "clamp", "@prompt", "@response", "@first:2", "@after:1", "[10-12]", "[99]", "1e30", "1e-30", "0"),
        *("nan", "inf", " ", "\t", "\n", "1e999", "@first:0", "@first:99999999999999999999", "ablate(warm)"),
    ]
    form = draw.random()
    if form < 0.4:
        terms = [
            f"{draw.choice(['', '-'])}{draw.choice(['', '0*', '2*', '0.3*'])}{draw.choice(['warm', 'formal', 'calm'])}"
            f"{draw.choice(['', '[10-12]'])}{draw.choice(['', '@prompt', '@response', '@first:3', '@after:2'])}"
            for _ in range(draw.randint(1, 8))
        ]
        return " + ".join(terms).replace("+ -", "- ")
    if form < 0.8:
        return "".join(draw.choice(pieces) for _ in range(draw.randint(0, 14)))
    if form < 0.9:
        return "".join(chr(draw.choice([draw.randint(0, 127), draw.randint(0, 0xFFFF)])) for _ in range(20))
    return " + ".join(f"{draw.random():.3f}*warm@first:{i}" for i in range(draw.randint(1, 200)))


def any_json(draw: random.Random, depth: int = 3) -> Any:
    """Any JSON value."""
    leaf = draw.choice([None, True, False, 0, -1, 1.5, 10**20, "", "steer", "warm", "smollm2", "\ud800", "x" * 5000])
    if depth == 0 or draw.random() < 0.5:
        return leaf
    if draw.random() < 0.5:
        return [any_json(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    return {draw.choice([*NEAR, "steer", "steer_resolved", "a", ""]): any_json(draw, depth - 1) for _ in range(2)}


def malformed(draw: random.Random, model: str) -> bytes:
    """A body with a wrong value in one field, or that is no JSON at all."""
    body = completion(model, "The", draw.choice([None, "warm"]))
    form = draw.random()
    if form < 0.6:
        body[draw.choice(KEYS)] = any_json(draw)
        return json.dumps(body).encode()
    if form < 0.7:
        return json.dumps(any_json(draw)).encode()
    if form < 0.8:
        return b"[" * draw.choice([10, 5000, 100_000])
    text = bytearray(json.dumps(body).encode())
    for _ in range(draw.randint(1, 5)):
        text[draw.randrange(len(text))] = draw.randrange(256)
    return bytes(text[: draw.randint(0, len(text))] if draw.random() < 0.3 else text)


def too_large(draw: random.Random, model: str) -> bytes:
    """A body with more text, or more lists, than a server takes by default for a context of up to 20,000 tokens."""
    if draw.random() < 0.5:
        return json.dumps(completion(model, "x" * (1 << 20))).encode()
    return b'{"model": "x", "messages": [' + b"[]," * 10_001 + b"1]}"


def no_request(draw: random.Random) -> bytes:
    """Bytes that are no HTTP request, or a strange one."""
    return draw.choice(
        [
            b"\x00" * 50, b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
            "".join(draw.choice(string.printable) for _ in range(200)).encode(),
        ]
    )  # fmt: skip


def damaged(draw: random.Random, content: bytes) -> bytes:
    """A vector's file with bytes changed, cut, added, or another file altogether."""
    changed = bytearray(content)
    form = draw.randrange(5)
    if form == 0:
        return bytes(changed[: draw.randrange(len(changed))])
    if form == 1:
        return bytes(changed) + b"\x00" * draw.choice([1, 1000])
    if form == 2:
        return draw.choice([b"", b"\x80\x04.", b"PK\x03\x04" + bytes(100), b"\xff" * 200, b"[" * 1000])
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(min(len(changed), draw.choice([16, 2000, len(changed)])))] = draw.randrange(256)
    return bytes(changed)
