"""`steer serve` as people use it: a process, HTTP, and the OpenAI client."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serve_process import KEY, MESSAGES, STEER, Serving, chat, steer


def test_the_arms_are_models(server: Serving) -> None:
    _, _, models = server.call("GET", "/v1/models")
    assert [card["id"] for card in models["data"]] == ["pico", "pico:friendly", "pico:champion"]


def test_an_arm_is_an_expression_under_a_name_and_a_plain_request_is_stock(server: Serving) -> None:
    status, headers, arm = chat(server, "pico:friendly")
    _, _, expression = chat(server, **steer("1.2*warm-0.4*formal"))
    _, plain_headers, plain = chat(server)
    assert (status, arm["model"], plain["model"]) == (200, "pico:friendly", "pico")
    assert arm["choices"][0]["message"] == expression["choices"][0]["message"] != plain["choices"][0]["message"]
    assert headers["x-steer-arm"] == "friendly"
    assert headers["x-steer-digest"] == arm["steer"]["digest"] == expression["steer"]["digest"]
    assert "steer" not in plain
    assert "x-steer-digest" not in plain_headers


def test_the_receipt_counts_the_tokens_of_each_term(server: Serving) -> None:
    _, _, answer = chat(server, **steer("2*warm@response + formal"))
    prompt = answer["usage"]["prompt_tokens"]
    terms = [(t["term"], t["prompt_tokens"], t["response_tokens"]) for t in answer["steer"]["terms"]]
    assert terms == [("2*warm@response", 0, 4), ("formal", prompt, 4)]
    assert (answer["steer"]["prompt_tokens"], answer["steer"]["response_tokens"]) == (prompt, 4)


def test_several_answers_share_one_receipt(server: Serving) -> None:
    _, _, answer = chat(server, n=3, temperature=1.0, seed=1, logprobs=True, **steer("warm"))
    assert len(answer["choices"]) == answer["steer"]["answers"] == 3
    assert answer["steer"]["response_tokens"] == 12
    assert answer["choices"][2]["logprobs"]["content"]


@pytest.mark.parametrize("several", [1, 2])
def test_a_stream_ends_with_the_receipt_in_its_last_chunk(server: Serving, several: int) -> None:
    _, headers, text = chat(server, "pico:friendly", stream=True, n=several, temperature=1.0)
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["model"] for chunk in chunks} == {"pico:friendly"}
    receipts = [chunk["steer"] for chunk in chunks if "steer" in chunk]
    assert len(receipts) == 1
    assert chunks[-1]["steer"]["response_tokens"] == 4 * several
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert headers["x-steer-digest"] == receipts[0]["digest"]


def test_completions_and_responses_are_steered_too(server: Serving) -> None:
    body = {"model": "pico:friendly", "prompt": ["the warm", "the cold one"], "max_tokens": 4, "ignore_eos": True}
    _, _, answer = server.call("POST", "/v1/completions", body)
    assert (len(answer["choices"]), answer["steer"]["answers"], answer["steer"]["response_tokens"]) == (2, 2, 6)
    body = {"model": "pico:friendly", "input": "the warm", "max_output_tokens": 4}
    _, _, answer = server.call("POST", "/v1/responses", body)
    assert (answer["model"], answer["steer"]["arm"]) == ("pico:friendly", "friendly")
    _, _, text = server.call("POST", "/v1/responses", {**body, "stream": True})
    last = [json.loads(part.split("data: ", 1)[1]) for part in text.split("\n\n") if "data: {" in part][-1]
    assert last["steer"]["arm"] == "friendly"


def test_the_openai_client_sees_arms_and_receipts(server: Serving) -> None:
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY)
    answer = client.chat.completions.create(model="pico:friendly", messages=MESSAGES, max_tokens=3)  # type: ignore[arg-type]
    assert answer.model_extra is not None
    assert answer.model_extra["steer"]["expression"] == "1.2*warm - 0.4*formal"
    streamed = list(client.chat.completions.create(model="pico:friendly", messages=MESSAGES, max_tokens=3, stream=True))  # type: ignore[call-overload]
    assert streamed[-1].model_extra["steer"]["arm"] == "friendly"


@pytest.mark.parametrize(
    ("more", "status", "reason"),
    [
        (steer("2*nobody"), 400, "no vector is called 'nobody'; loaded: formal"),
        (steer("warm +"), 400, "a term expected"),
        (steer("nan*warm"), 400, "wrong at character"),
        (steer(5), 400, "not an expression"),
        (steer("warm[77]"), 400, "warm holds no layer 77"),
        ({"model": "pico:unfriendly"}, 404, "arms: pico:friendly"),
        ({"vllm_xargs": {"stear": "warm"}}, 400, "'vllm_xargs.stear' would be ignored"),
        ({"vllm_xargs": []}, 400, ""),
        ({"vllm_xargs": ""}, 400, ""),
        ({"vllm_xargs": 0}, 400, ""),
        ({"vllm_xargs": False}, 400, ""),
        ({"steer": "warm"}, 400, "'steer' would be ignored"),
        ({"model": "pico:friendly", **steer("warm")}, 400, "give one"),
        ({"vllm_xargs": {"steer_resolved": "warm"}}, 400, "can't be set by a client"),
        ({"model": "other"}, 404, "does not exist"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_steered_is_refused_with_its_reason(
    server: Serving, more: dict[str, Any], status: int, reason: str, stream: bool
) -> None:
    found, _, answer = chat(server, **more, stream=stream)
    assert (found, reason in answer["error"]["message"]) == (status, True), answer
    assert chat(server)[0] == 200


def test_the_server_survives_fuzzed_expressions(server: Serving) -> None:
    """Of which the engine has ten thousand."""
    import http.client
    import random

    chosen = random.Random(4)
    words = "warm formal ablate( clamp( prompt first: 9 1e308 0-3 none 1.5 @response 2*warm ablate(formal) é ☃ nan"
    pieces = [*words.split(), *")*+-@,[] .'\"\x00\n\ud800"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    statuses = {200: 0, 400: 0}
    for _ in range(2_000):
        text = "".join(chosen.choices(pieces, k=chosen.randint(1, 12)))
        body = {"model": "pico", "prompt": "the", "max_tokens": 1, **steer(text)}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        content = json.loads(answer.read())
        statuses[answer.status] += 1  # any other is a failure
        assert ("steer" in content) == (answer.status == 200)
    connection.close()
    assert min(statuses.values()) > 20
    assert chat(server, "pico:friendly")[2]["steer"]["arm"] == "friendly"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions/batch"])
def test_what_vllm_would_run_unsteered_is_refused(server: Serving, path: str) -> None:
    body: dict[str, Any] = {"model": "pico:friendly", "max_tokens": 2}
    body |= {"messages": [MESSAGES]} if "batch" in path else {"prompt": "the", "use_beam_search": True, "n": 2}
    status, _, answer = server.call("POST", path, body)
    assert (status, "can't be steered" in answer["error"]["message"]) == (400, True)
    status, _, answer = server.call("POST", path, {**body, "model": "pico"})
    assert (status, "steer" in answer) == (200, False)


def test_anthropic_s_messages_are_steered_too(server: Serving) -> None:
    body = {"model": "pico:friendly", "messages": MESSAGES, "max_tokens": 4}
    status, headers, answer = server.call("POST", "/v1/messages", body)
    assert (status, answer["model"], answer["steer"]["arm"]) == (200, "pico:friendly", "friendly")
    assert headers["x-steer-digest"] == answer["steer"]["digest"]
    _, _, text = server.call("POST", "/v1/messages", {**body, "stream": True})
    assert json.loads(text.split("data: ")[-1])["steer"]["arm"] == "friendly"


def test_the_routes_follow_the_api_key(server: Serving) -> None:
    assert server.call("GET", "/steer", key=None)[0] == 401
    assert server.call("GET", "/steer/vectors", key="wrong")[0] == 401
    assert server.call("DELETE", "/steer/vectors/warm", key=None)[0] == 401
    assert server.call("POST", "/steer/vectors?name=x", raw=b"", key=None)[0] == 401
    _, _, state = server.call("GET", "/steer")
    assert state["arms"]["friendly"]["expression"] == "1.2*warm - 0.4*formal"
    assert (state["rows"], state["directions"], state["workers"][0]["rows"]) == (256, 4, 256)
    assert (state["gates"], state["sections"]) == (1, [])  # it is started with --steer-gates 1


def test_metrics_stand_beside_those_of_vllm(server: Serving) -> None:
    chat(server, "pico:friendly")
    chat(server, **steer("warm +"))
    text = server.call("GET", "/metrics")[2]
    assert "vllm:num_requests_running" in text
    assert 'steer:requests_total{arm="friendly",outcome="done"}' in text
    assert 'steer:requests_running{arm="friendly"} 0.0' in text
    assert 'steer:refused_total{reason="expression"}' in text


def test_what_is_wrong_is_said_before_vllm_starts(server: Serving, tmp_path: Path) -> None:
    command = [*STEER, "serve", str(server.model)]
    options = ["--vector", "warm=missing.safetensors", "--arm", "a=2*nobody", "--arm", "b=2*("]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "missing.safetensors" in done.stderr
    assert "arm 'a' uses nobody" in done.stderr
    assert "arm 'b'" in done.stderr
    done = subprocess.run([*command, "--port", str(server.port)], capture_output=True, text=True, check=False)
    assert (done.returncode, "can't be listened on" in done.stderr) == (2, True)
