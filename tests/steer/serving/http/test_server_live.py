"""A server while it runs: vectors and arms come and go, names are rebound under requests, and clients misbehave."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_process import KEY, MESSAGES, Serving, chat, children, steer

from vectors.probe import Probe, Readout


def test_vectors_load_and_unload_while_it_serves(server: Serving) -> None:
    content = server.vectors["calm"].read_bytes()
    assert chat(server, **steer("2*calm"))[0] == 400
    status, _, loaded = server.call("POST", "/steer/vectors?name=calm", raw=content)
    assert (status, loaded["digest"].startswith("sha256:")) == (200, True)
    assert chat(server, **steer("2*calm"))[2]["steer"]["terms"][0]["vector_digest"] == loaded["digest"]
    assert "calm" in server.call("GET", "/steer/vectors")[2]["vectors"]
    assert server.call("POST", "/steer/vectors?name=calm", raw=server.vectors["formal"].read_bytes())[0] == 400
    assert server.call("DELETE", "/steer/vectors/calm")[0] == 200
    assert chat(server, **steer("2*calm"))[0] == 400
    assert server.call("DELETE", "/steer/vectors/calm")[0] == 404
    assert server.call("DELETE", "/steer/vectors/warm")[0] == 409, "an arm needs it"
    end = time.monotonic() + 10
    while loaded["digest"] in server.call("GET", "/steer")[2]["workers"][0]["vectors"]:
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_probe_arrives_and_what_its_gates_decide_is_on_the_receipt_and_in_the_metrics(server: Serving) -> None:
    assert "no vector is called 'anger'" in str(chat(server, **steer("2*formal@when:anger>0"))[2])
    probe = Probe({0: Readout(torch.randn(128, generator=torch.Generator().manual_seed(1)), 0.0)})
    status, _, loaded = server.call("POST", "/steer/vectors?name=anger", raw=probe.encode())
    assert (status, loaded["digest"]) == (200, probe.digest)
    listed = server.call("GET", "/steer/vectors")[2]
    assert listed["probes"]["anger"] == {"digest": probe.digest, "layers": [0], "layer": 0}
    plain = chat(server)[2]["choices"]
    for expression, held in (("2*formal@when:anger>1e9", 0), ("2*formal@when:anger>-1e9", 1)):
        status, _, answer = chat(server, **steer(expression))
        (gate,), (term,) = answer["steer"]["gates"], answer["steer"]["terms"]
        assert (gate["held"], gate["read"], gate["digest"]) == (held, 1, probe.digest)
        assert (term["prompt_tokens"], term["response_tokens"]) == (0, 4 * held)
        assert held or answer["choices"][0]["message"] == plain[0]["message"]
    status, _, answer = chat(server, n=2, temperature=1.0, **steer("2*formal@while:anger>-1e9"))
    assert [(gate["held"], gate["read"]) for gate in answer["steer"]["gates"]] == [(4, 4)] * 2
    text = server.call("GET", "/metrics")[2]
    for decision, count in (("open", 9), ("closed", 1)):
        line = next(row for row in text.splitlines() if row.startswith("steer:gate_total") and decision in row)
        assert 'probe="anger"' in line
        assert float(line.split()[-1]) == count
    status, _, refused = chat(server, **steer("2*warm@when:anger>0"))
    assert (status, "what is read must lie below" in refused["error"]["message"]) == (400, True)
    assert server.call("DELETE", "/steer/vectors/anger")[0] == 200  # other tests read what is loaded


def test_a_running_request_keeps_the_vector_that_it_began_with(server: Serving) -> None:
    import threading

    server.call("POST", "/steer/vectors?name=brief", raw=server.vectors["calm"].read_bytes())
    found: list[Any] = []
    run = threading.Thread(target=lambda: found.append(chat(server, max_tokens=200, **steer("2*brief"))))
    run.start()
    while "steer:requests_running" not in (text := server.call("GET", "/metrics")[2]) or not any(
        line.startswith("steer:requests_running") and not line.endswith(" 0.0") for line in text.splitlines()
    ):
        time.sleep(0.02)
    assert server.call("DELETE", "/steer/vectors/brief")[0] == 200
    run.join()
    status, _, answer = found[0]
    assert (status, answer["steer"]["response_tokens"]) == (200, 199)


def test_loading_by_path_stays_in_its_folders(server: Serving) -> None:
    (server.folder / "more" / "inner.safetensors").write_bytes(server.vectors["calm"].read_bytes())
    (server.folder / "more" / "link.safetensors").symlink_to(server.vectors["calm"])
    load = lambda path: server.call("POST", "/steer/vectors", {"name": "by-path", "path": path})  # noqa: E731
    for outside in ("../calm.safetensors", str(server.vectors["calm"]), "link.safetensors", "/etc/passwd", ""):
        status, _, answer = load(outside)
        assert (status, "is not a .safetensors file in the folders" in answer["error"]["message"]) == (400, True)
    assert load("inner.safetensors")[0] == 200
    assert chat(server, **steer("'by-path'"))[0] == 200
    assert server.call("DELETE", "/steer/vectors/by-path")[0] == 200  # other tests read what is loaded


def test_arms_are_added_and_taken_while_it_serves(server: Serving) -> None:
    body = {"name": "cold", "expression": "-1.5*warm"}
    assert chat(server, "pico:cold")[0] == 404
    status, _, added = server.call("POST", "/steer/arms", body)
    assert (status, added["expression"]) == (200, "-1.5*warm")
    assert "pico:cold" in [card["id"] for card in server.call("GET", "/v1/models")[2]["data"]]
    assert server.call("GET", "/steer/arms")[2]["arms"]["cold"] == {k: added[k] for k in ("expression", "digest")}
    _, headers, answer = chat(server, "pico:cold")
    assert headers["x-steer-arm"] == answer["steer"]["arm"] == "cold"
    assert headers["x-steer-digest"] == answer["steer"]["digest"] == added["digest"]
    assert server.call("POST", "/steer/arms", {**body, "expression": "warm"})[0] == 400
    assert server.call("POST", "/steer/arms", {"name": "bad", "expression": "2*nobody"})[0] == 400
    assert server.call("POST", "/steer/arms", body, key=None)[0] == 401
    assert server.call("DELETE", "/steer/arms/cold", key="wrong")[0] == 401
    assert server.call("DELETE", "/steer/arms/cold")[0] == 200
    assert server.call("DELETE", "/steer/arms/cold")[0] == 404
    assert chat(server, "pico:cold")[0] == 404
    text = server.call("GET", "/metrics")[2]
    refused = next(line for line in text.splitlines() if line.startswith('steer:refused_total{reason="arm"}'))
    assert float(refused.split()[-1]) >= 2


@pytest.mark.parametrize("body", [{"model": "pico:friendly"}, {"model": "pico", "vllm_xargs": {"steer": "warm"}}])
def test_other_generating_routes_refuse_to_steer(server: Serving, body: dict[str, Any]) -> None:
    more = {"messages": MESSAGES, "prompt": "the warm", "max_tokens": 2, "token_ids": [5, 6], "sampling_params": {}}
    for path in ("/invocations", "/inference/v1/generate", "/v1/chat/completions/batch", "/v1/completions/render"):
        status, headers, answer = server.call("POST", path, {**more, **body})
        assert (status, "can't be steered" in answer["error"]["message"]) == (400, True), (path, answer)
        assert "x-steer-digest" not in headers
    assert server.call("POST", "/invocations", {**more, "model": "pico"})[0] == 200
    status, _, tokens = server.call("POST", "/tokenize", {"model": "pico:friendly", "prompt": "the warm"})
    assert (status, tokens["count"] > 0) == (200, True)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_list_of_processes_shows_the_api_key(server: Serving) -> None:
    shown = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in {server.process.pid, *children(server.process.pid)}]
    assert len(shown) >= 3
    assert not any(KEY.encode() in line for line in shown)
    assert KEY not in (server.folder / "vllm.log").read_text() + server.said()


def test_header_receipt_and_what_was_applied_agree_while_a_name_is_rebound(server: Serving) -> None:
    """A name changes between two vectors under requests: each answer is that of the vector its receipt names."""
    from concurrent.futures import ThreadPoolExecutor

    contents = {name: server.vectors[name].read_bytes() for name in ("calm", "formal")}
    digests = {server.call("POST", f"/steer/vectors?name=ref-{n}", raw=c)[2]["digest"]: n for n, c in contents.items()}
    ask = lambda name: chat(server, logprobs=True, max_tokens=6, **steer(f"3*'{name}'"))  # noqa: E731
    scores = lambda answer: [t["logprob"] for t in answer["choices"][0]["logprobs"]["content"]]  # noqa: E731
    expected = {name: scores(ask(f"ref-{name}")[2]) for name in contents}
    gap = max(abs(a - b) for a, b in zip(*expected.values(), strict=True))
    assert gap > 0.1
    server.call("POST", "/steer/vectors?name=turning", raw=contents["calm"])
    applied: dict[str, int] = dict.fromkeys(contents, 0)
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(ask, "turning") for _ in range(60)]
        for i in range(40):
            name = ("formal", "calm")[i % 2]
            assert server.call("DELETE", "/steer/vectors/turning")[0] == 200
            assert server.call("POST", "/steer/vectors?name=turning", raw=contents[name])[0] == 200
        answers = [future.result() for future in running]
    for status, headers, answer in answers:
        assert status in (200, 400), answer
        if status == 400:
            assert "no vector is called 'turning'" in answer["error"]["message"]
            continue
        assert headers["x-steer-digest"] == answer["steer"]["digest"]
        name = digests[answer["steer"]["terms"][0]["vector_digest"]]
        applied[name] += 1
        distance = {n: max(abs(a - b) for a, b in zip(scores(answer), e, strict=True)) for n, e in expected.items()}
        assert distance[name] < 1e-3 < distance[next(n for n in contents if n != name)], (name, distance)
    assert min(applied.values()) > 0, applied
    for name in ("turning", "ref-calm", "ref-formal"):
        assert server.call("DELETE", f"/steer/vectors/{name}")[0] == 200


def test_bad_vector_files_are_refused(server: Serving) -> None:
    import pickle

    import torch

    from vectors.steering import SteeringVector

    sent = {
        "pickled": pickle.dumps({"layer.0": 1}),
        "empty": b"",
        "truncated": server.vectors["calm"].read_bytes()[:500],
        "hidden": SteeringVector({0: torch.ones(64)}).encode(),
    }
    for name, content in sent.items():
        status, _, answer = server.call("POST", f"/steer/vectors?name={name}", raw=content)
        assert status == 400, answer
    assert server.call("POST", "/steer/vectors", raw=sent["hidden"])[0] == 400, "it has no name"
    assert chat(server)[0] == 200


def test_a_share_of_the_hostile_trial(server: Serving) -> None:
    """As `make hostile`, with 250 requests, a pico model, and without stock vLLM to compare with."""
    from http_checks import TURNING, Trial
    from http_client import Client

    contents = {name: server.vectors[name].read_bytes() for name in ("warm", "formal", "calm")}

    async def run() -> Trial:
        trial = Trial(Client("127.0.0.1", server.port, KEY), "pico", contents, {"friendly": "1.2*warm - 0.4*formal"}, 1)
        await trial.prepare()
        before = await trial.record()
        trial.expect(before)
        assert await trial.run(250, 16, 300) == 250
        after = await trial.record()
        trial.require_same(before, after)
        await trial.require_idle()
        await trial.end()
        return trial

    trial = asyncio.run(run())
    assert trial.faults == [], trial.table()
    assert set(TURNING) < set(contents)
    assert "Traceback" not in (server.folder / "vllm.log").read_text()


def test_a_body_that_is_too_large_is_refused_and_the_connection_goes_on(server: Serving) -> None:
    """The default for a context of 256 tokens is 1 MiB."""
    import http.client
    import json

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for path in ("/v1/chat/completions", "/invocations"):
        for body in (bytes(64_000_000), iter([bytes(65_536)] * 100), b"[" + b"[]," * 20_000 + b"1]"):
            connection.request("POST", path, body, headers, encode_chunked=not isinstance(body, bytes))
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())["error"]["code"]) == (413, 413)
    text = {"model": "pico", "prompt": "the warm", "max_tokens": 1}
    connection.request("POST", "/v1/completions", json.dumps(text), headers)
    answer = connection.getresponse()
    assert (answer.status, len(json.loads(answer.read())["choices"])) == (200, 1)
    connection.close()
    assert server.call("GET", "/steer")[2]["max_body"] == 1 << 20
    assert 'steer:refused_total{reason="size"}' in server.call("GET", "/metrics")[2]
