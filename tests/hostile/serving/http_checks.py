"""What is sent to a server under trial, and what must be true of every answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

from http_client import Answer, Client
from http_traffic import (
    EXPRESSIONS,
    NEAR,
    OTHER_ROUTES,
    PROMPTS,
    any_json,
    completion,
    damaged,
    fuzzed_expression,
    malformed,
    no_request,
    too_large,
)

from steer.serving.engine.resolved import ResolvedRequest
from vectors.expression import parse
from vectors.storage.files import digest_bytes

TURNING = ("formal", "calm")  # what the name `turning` is bound to, in turns
BUSY = ("steer:rows_held", "steer:requests_waiting_for_rows", "steer:requests_running")
CLOSE = 0.01  # most difference of log-probabilities, in float32, between a request alone and in a batch

WEIGHTS = {
    "plain": 12, "plain stream": 4, "arm": 8, "expression": 12, "steered stream": 8, "chat": 4, "responses": 3,
    "messages": 3, "several answers": 3, "turning": 8, "rebind": 4, "arms come and go": 3, "fuzzed expression": 8,
    "malformed": 6, "misspelt": 4, "other route": 4, "upload": 3, "hang up": 6, "no request": 2, "overflow": 2,
    "large": 1,
}  # fmt: skip


class Trial:
    """The trial of one server: what is expected of it, and what was seen."""

    def __init__(self, client: Client, model: str, vectors: dict[str, bytes], arms: dict[str, str], seed: int) -> None:
        self.client, self.model, self.vectors, self.arms, self.seed = client, model, vectors, arms, seed
        self.digests = {name: digest_bytes(file) for name, file in vectors.items()}
        self.expected: dict[tuple[str, str], list[float]] = {}  # by prompt and expression ("" for plain)
        self.texts: dict[tuple[str, str], str] = {}
        self.counts: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []
        self.furthest = 0.0  # largest difference of log-probabilities of the same request
        self.turning = asyncio.Lock()

    async def prepare(self) -> None:
        """Load the vectors, by their names, and bind the name that will turn."""
        for name, file in (*self.vectors.items(), ("turning", self.vectors[TURNING[0]])):
            answer = await self.client.send("POST", f"/steer/vectors?name={name}", raw=file, kind="a/b")
            self._status("rebind", answer, 200)

    async def end(self) -> None:
        """Remove the vectors that no arm needs."""
        for name in (await self.client.send("GET", "/steer/vectors")).value["vectors"]:
            self._status("rebind", await self.client.send("DELETE", f"/steer/vectors/{name}"), 200, 409)

    def require_same(self, before: dict[Any, Answer], after: dict[Any, Answer]) -> None:
        """Every answer is the same as before, bit for bit."""
        changed = [key for key in before if content(before[key]) != content(after[key])]
        self.faults += [f"differs from before the load: {key}" for key in changed]

    async def require_idle(self) -> dict[str, float]:
        """No slot is held and nothing runs or waits, within a minute; returns the gauges and counters of steer."""
        values: dict[str, float] = {}
        for _ in range(60):
            # A receipt carries the state of the slots, so a steered request brings the gauges up to date.
            await self.client.send("POST", "/v1/completions", completion(self.model, "The", "warm"))
            text = (await self.client.send("GET", "/metrics")).body.decode()
            lines = [line for line in text.splitlines() if line.startswith("steer:") and "_created" not in line]
            values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
            busy = {name: value for name, value in values.items() if name.startswith(BUSY) and value}
            if not busy:
                return values
            await asyncio.sleep(1)
        self.faults += [f"{name} is {value} at the end" for name, value in busy.items()]
        return values

    async def record(self) -> dict[tuple[str, str], Answer]:
        """The answers of every prompt, plain and under every expression, one at a time."""
        answers = {}
        for prompt in PROMPTS:
            for expression in ("", *EXPRESSIONS, *self.arms.values(), *(f"3*'{name}'" for name in TURNING)):
                answer = await self.client.send(
                    "POST", "/v1/completions", completion(self.model, prompt, expression or None)
                )
                assert answer.status == 200, answer
                answers[prompt, expression] = answer
        return answers

    def expect(self, answers: dict[tuple[str, str], Answer]) -> None:
        """Expect these answers from now on."""
        for key, answer in answers.items():
            self.expected[key] = _scores(answer.value)
            self.texts[key] = answer.value["choices"][0]["text"]

    async def run(self, count: int, at_once: int, seconds: float) -> int:
        """Send `count` requests, so many at once, as far as the time allows; returns how many were sent."""
        end, sent = time.monotonic() + seconds, 0
        kinds = random.Random(self.seed).choices(list(WEIGHTS), list(WEIGHTS.values()), k=count)
        remaining = iter(enumerate(kinds))

        async def worker() -> None:
            nonlocal sent
            for number, kind in remaining:
                if time.monotonic() > end:
                    return
                sent += 1
                try:
                    await self._one(kind, random.Random(f"{self.seed} {number}"))
                except TimeoutError:
                    self._fault(kind, "no answer in time")
                except OSError as error:
                    self._fault(kind, f"connection failed: {error}")

        await asyncio.gather(*(worker() for _ in range(at_once)))
        return sent

    async def _one(self, kind: str, draw: random.Random) -> None:
        model, prompt, expression = self.model, draw.choice(PROMPTS), draw.choice(EXPRESSIONS)
        arm, send = draw.choice(list(self.arms)), self.client.send
        path = "/v1/completions"
        if kind in ("plain", "plain stream"):
            answer = await send("POST", path, completion(model, prompt, stream=kind != "plain"))
            self._plain(kind, answer, prompt)
        elif kind in ("arm", "expression", "steered stream"):
            named = kind == "arm" or draw.random() < 0.3
            stream = kind == "steered stream"
            body = completion(
                f"{model}:{arm}" if named else model, prompt, None if named else expression, stream=stream
            )
            self._steered(kind, await send("POST", path, body), self.arms[arm] if named else expression, prompt)
        elif kind == "several answers":
            body = completion(model, [prompt, draw.choice(PROMPTS)], expression, n=2, temperature=0.7)
            self._steered(kind, await send("POST", path, body), expression, None, answers=4)
        elif kind in ("chat", "responses", "messages"):
            body = {"model": f"{model}:{arm}", "stream": draw.random() < 0.5}
            messages = [{"role": "user", "content": prompt}]
            body |= (
                {"input": prompt, "max_output_tokens": 4}
                if kind == "responses"
                else {"messages": messages, "max_tokens": 4}
            )
            route = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}[kind]
            self._steered(kind, await send("POST", route, body), self.arms[arm], None)
        elif kind == "turning":
            self._turning(await send("POST", path, completion(model, prompt, "3*turning")), prompt)
        elif kind == "rebind":
            async with self.turning:
                first = await send("DELETE", "/steer/vectors/turning")
                second = await send(
                    "POST",
                    "/steer/vectors?name=turning",
                    raw=self.vectors[draw.choice(TURNING)],
                    kind="application/octet-stream",
                )
            self._status(kind, first, 200)
            self._status(kind, second, 200)
        elif kind == "arms come and go":
            name = f"arm-{draw.randrange(10)}"
            self._status(kind, await send("POST", "/steer/arms", {"name": name, "expression": expression}), 200, 400)
            answer = await send("POST", path, completion(f"{model}:{name}", prompt))
            self._status(kind, answer, 200, 404)
            self._status(kind, await send("DELETE", f"/steer/arms/{name}"), 200, 404)
            self._agrees(kind, answer)
        elif kind == "fuzzed expression":
            text = fuzzed_expression(draw)
            answer = await send("POST", path, completion(model, prompt, text))
            self._status(kind, answer, 200, 400)
            self._agrees(kind, answer, text)
        elif kind == "malformed":
            answer = await send("POST", draw.choice((path, "/v1/chat/completions", "/v1/responses", "/v1/messages")),
                                raw=malformed(draw, model))  # fmt: skip
            self._status(kind, answer, 200, 400, 404, 413, 422)
            self._agrees(kind, answer)
        elif kind == "misspelt":
            body = completion(model, prompt)
            wrong, where = {draw.choice(NEAR): "warm"}, draw.choice(("vllm_xargs", "extra_body", ""))
            self._status(kind, await send("POST", path, {**body, **({where: wrong} if where else wrong)}), 400)
        elif kind == "other route":
            body = (
                completion(f"{model}:{arm}", prompt) if draw.random() < 0.5 else completion(model, prompt, expression)
            )
            self._status(kind, await send("POST", draw.choice(OTHER_ROUTES), body), 400)
        elif kind == "upload":
            await self._upload(draw)
        elif kind == "large":
            where = draw.choice((path, "/v1/chat/completions", "/invocations", "/tokenize"))
            self._status(kind, await send("POST", where, raw=too_large(draw, model)), 413)
        elif kind == "hang up":
            how = draw.choice(
                [("request", draw.random()), ("wait", draw.random() / 2), ("answer", draw.randrange(2000))]
            )
            body = completion(model, prompt, expression, stream=draw.random() < 0.5, max_tokens=12)
            await send("POST", path, body, hang_up=how)
            self._count(kind, "left")
        elif kind == "no request":
            answer = await self.client.send_bytes(no_request(draw), ("wait", 0.2) if draw.random() < 0.2 else None)
            self._status(kind, answer, 0, 400, 404, 405, 411, 414, 422, 431)
        else:
            body = completion(
                model, prompt, draw.choice(["3e37*warm", "1e30*warm", "-1e9*calm + 1e20*formal@response"])
            )
            answer = await send("POST", path, body)
            # Such a request has an answer or an error of its own; the others must not notice.
            self._status(kind, answer, 200, 400, 500)
            self._agrees(kind, answer)

    async def _upload(self, draw: random.Random) -> None:
        name, send = f"up-{draw.randrange(20)}", self.client.send
        content = self.vectors[draw.choice(list(self.vectors))]
        form = draw.random()
        if form < 0.3:
            answer = await send("POST", f"/steer/vectors?name={name}", raw=content, kind="application/octet-stream")
        elif form < 0.8:
            answer = await send("POST", f"/steer/vectors?name={name}", raw=damaged(draw, content), kind="a/b")
        else:
            body = draw.choice(
                [any_json(draw), {"name": name, "path": draw.choice(["../x", "/etc/passwd", "a" * 5000, "\0"])}]
            )
            answer = await send("POST", "/steer/vectors", body)
        self._status("upload", answer, 200, 400)
        if b"/tmp" in answer.body or b"Traceback" in answer.body:
            self._fault("upload", f"the answer shows paths of the server: {answer.body[:200]!r}")
        if answer.status == 200:
            self._status("upload", await send("DELETE", f"/steer/vectors/{name}"), 200, 404)

    def _plain(self, kind: str, answer: Answer, prompt: str) -> None:
        if not self._status(kind, answer, 200):
            return
        if "x-steer-digest" in answer.headers or b'"steer"' in answer.body:
            self._fault(kind, "a plain answer carries a receipt")
        self._compare(kind, answer, prompt, "")

    def _steered(self, kind: str, answer: Answer, expression: str, prompt: str | None, answers: int = 1) -> None:
        if not self._status(kind, answer, 200):
            return
        receipt = self._agrees(kind, answer, expression)
        if receipt is None:
            self._fault(kind, f"no receipt: {answer.body[-300:]!r}")
            return
        if receipt["answers"] != answers:
            self._fault(kind, f"{receipt['answers']} answers in the receipt of {answers}")
        composition = parse(expression)
        resolved = ResolvedRequest(str(composition), {name: self.digests[name] for name in composition.names})
        if receipt["digest"] != resolved.key:
            self._fault(kind, f"the receipt's digest is not that of {expression}")
        if prompt is not None:
            self._compare(kind, answer, prompt, expression)

    def _turning(self, answer: Answer, prompt: str) -> None:
        if answer.status == 400 and b"no vector is called 'turning'" in answer.body:
            self._count("turning", "400")
            return
        if not self._status("turning", answer, 200):
            return
        receipt = self._agrees("turning", answer)
        assert receipt is not None
        named = {self.digests[name]: name for name in TURNING}[receipt["terms"][0]["vector_digest"]]
        self._compare("turning", answer, prompt, f"3*'{named}'")
        other = self.expected[prompt, f"3*'{TURNING[1 - TURNING.index(named)]}'"]
        if max(abs(a - b) for a, b in zip(_scores(answer.value), other, strict=True)) < CLOSE:
            self._fault("turning", "the answer is that of the other vector")

    def _agrees(self, kind: str, answer: Answer, expression: str | None = None) -> dict[str, Any] | None:
        """The receipt of a 200 whose header, receipt and vectors agree; None where there is no receipt."""
        if answer.status != 200:
            return None
        value = answer.value
        events = value if isinstance(value, list) else [value]
        receipts = [event["steer"] for event in events if isinstance(event, dict) and event.get("steer")]
        header = answer.headers.get("x-steer-digest")
        failed = any(isinstance(event, dict) and "error" in event and event["error"] for event in events)
        if len(receipts) != (header is not None) and not failed:
            self._fault(kind, f"{len(receipts)} receipts, and the header is {header}: {answer.body[-300:]!r}")
        if not receipts:
            return None
        receipt: dict[str, Any] = receipts[0]
        vectors = {term["vector"]: term["vector_digest"] for term in receipt["terms"]}
        if not header == receipt["digest"] == ResolvedRequest(receipt["expression"], vectors).key:
            self._fault(kind, f"header {header}, receipt {receipt['digest']}, vectors {vectors}")
        if expression is not None and receipt["expression"] != str(parse(expression)):
            self._fault(kind, f"{expression!r} was applied as {receipt['expression']!r}")
        return receipt

    def _compare(self, kind: str, answer: Answer, prompt: str, expression: str) -> None:
        scores, expected = _scores(answer.value), self.expected[prompt, expression]
        far = max((abs(a - b) for a, b in zip(scores, expected, strict=False)), default=0.0)
        self.furthest = max(self.furthest, far)
        self._count(kind, "bit for bit" if scores == expected else "close")
        if len(scores) != len(expected) or not far < CLOSE:
            self._fault(kind, f"{prompt!r} under {expression!r}: log-probabilities differ by {far}")
        elif _text(answer.value) != self.texts[prompt, expression]:
            self._fault(kind, f"{prompt!r} under {expression!r}: the text is {_text(answer.value)!r}")

    def _status(self, kind: str, answer: Answer, *allowed: int) -> bool:
        self._count(kind, str(answer.status))
        if answer.status not in allowed:
            self._fault(kind, f"status {answer.status}: {answer.body[:300]!r}")
        return answer.status == 200

    def _count(self, kind: str, what: str) -> None:
        self.counts[kind, what] += 1

    def _fault(self, kind: str, what: str) -> None:
        self.counts[kind, "FAULT"] += 1
        self.faults.append(f"{kind}: {what}")

    def table(self) -> str:
        """How often each kind had each outcome."""
        outcomes = sorted({what for _, what in self.counts})
        kinds = [kind for kind in WEIGHTS if any(k == kind for k, _ in self.counts)]
        rows = [
            ["", *outcomes],
            *([kind, *(str(self.counts[kind, what] or "") for what in outcomes)] for kind in kinds),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def content(answer: Answer) -> Any:
    """What must stay the same of an answer: its choices, and its receipt but for the cached tokens."""
    value = answer.value
    receipt = {k: v for k, v in (value.get("steer") or {}).items() if k != "cached_tokens"}
    return value["choices"], receipt


def _scores(value: Any) -> list[float]:
    """The log-probabilities of a completion, or of the events of a stream."""
    events = value if isinstance(value, list) else [value]
    found = [choice.get("logprobs") for event in events for choice in event.get("choices", [])]
    return [score for entry in found if entry for score in entry["token_logprobs"]]


def _text(value: Any) -> str:
    events = value if isinstance(value, list) else [value]
    return "".join(choice.get("text") or "" for event in events for choice in event.get("choices", []))
