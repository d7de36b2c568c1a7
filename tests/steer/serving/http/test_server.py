"""`steer serve` as people use it: a process, HTTP, and the OpenAI client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_process import ENVIRONMENT, random_vectors, save_model

KEY = "secret"
# -P: whatever folder the tests run in, its own folder `steer` must not stand before the package.
# A shell's background job, as CI may be, begins with SIGINT ignored.
LISTEN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
STEER = (sys.executable, "-P", "-c", f"{LISTEN}; from steer.cli import main; main()")
MESSAGES = [{"role": "user", "content": "the warm and the cold"}]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Serving:
    """`steer serve` on a pico model."""

    def __init__(self, folder: Path, *flags: str, key: str | None = None) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "key.txt").write_text(key or "")
        self.folder, self.port = folder, free_port()
        self.model = save_model(folder, "llama")
        self.vectors = random_vectors(folder)
        (folder / "more").mkdir(exist_ok=True)
        environment = {k: v for k, v in ENVIRONMENT.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        self.err = (folder / "err.txt").open("w")
        command = [
            *(*STEER, "serve", str(self.model)),
            *("--vector", f"warm={self.vectors['warm']}"),  # formal.safetensors lies in the current folder
            *(("--api-key-file", str(folder / "key.txt")) if key else ()),
            *("--arm", "friendly=1.2*warm - 0.4*formal", "--port", str(self.port)),
            *("--vector-folder", str(folder / "more"), "--log", str(folder / "vllm.log"), "--"),
            *(
                "--enforce-eager",
                "--max-model-len",
                "256",
                "--max-num-seqs",
                "8",
                "--served-model-name",
                "pico",
                *flags,
            ),
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.err,
            env={**os.environ, **ENVIRONMENT, **environment},
            cwd=folder,
        )

    def wait(self) -> None:
        end = time.monotonic() + 240
        while "serving at" not in self.said():
            assert self.process.poll() is None, self.said() + (self.folder / "vllm.log").read_text()[-3000:]
            assert time.monotonic() < end, self.said()
            time.sleep(0.3)

    def said(self) -> str:
        return (self.folder / "err.txt").read_text()

    def call(
        self, method: str, path: str, body: Any = None, *, key: str | None = KEY, raw: bytes | None = None
    ) -> tuple[int, dict[str, str], Any]:
        data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
        headers = {"Content-Type": "application/octet-stream" if raw is not None else "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                content = answer.read()
                plain = answer.headers.get_content_type() != "application/json"
                return answer.status, dict(answer.headers), content.decode() if plain else json.loads(content)
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), json.loads(error.read())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
        self.err.close()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("server"), key=KEY)
    serving.wait()
    yield serving
    serving.close()


def chat(server: Serving, model: str = "pico", **more: Any) -> tuple[int, dict[str, str], Any]:
    body = {"model": model, "messages": MESSAGES, "max_tokens": 5, "temperature": 0, "ignore_eos": True, **more}
    return server.call("POST", "/v1/chat/completions", body)


def steer(expression: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"steer": expression}}


def test_the_arms_are_models(server: Serving) -> None:
    _, _, models = server.call("GET", "/v1/models")
    assert [card["id"] for card in models["data"]] == ["pico", "pico:friendly"]


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
        (steer("2*nobody"), 400, "no vector is called 'nobody'; loaded: formal, warm"),
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


def test_the_server_survives_ten_thousand_fuzzed_expressions(server: Serving) -> None:
    import http.client
    import random

    chosen = random.Random(4)
    words = "warm formal ablate( clamp( prompt first: 9 1e308 0-3 none 1.5 @response 2*warm ablate(formal) é ☃ nan"
    pieces = [*words.split(), *")*+-@,[] .'\"\x00\n\ud800"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    statuses = {200: 0, 400: 0}
    for _ in range(10_000):
        text = "".join(chosen.choices(pieces, k=chosen.randint(1, 12)))
        body = {"model": "pico", "prompt": "the", "max_tokens": 1, **steer(text)}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        content = json.loads(answer.read())
        statuses[answer.status] += 1  # any other is a failure
        assert ("steer" in content) == (answer.status == 200)
    connection.close()
    assert min(statuses.values()) > 50
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


def test_the_routes_follow_the_api_key(server: Serving) -> None:
    assert server.call("GET", "/steer", key=None)[0] == 401
    assert server.call("GET", "/steer/vectors", key="wrong")[0] == 401
    assert server.call("DELETE", "/steer/vectors/warm", key=None)[0] == 401
    assert server.call("POST", "/steer/vectors?name=x", raw=b"", key=None)[0] == 401
    _, _, state = server.call("GET", "/steer")
    assert state["arms"]["friendly"]["expression"] == "1.2*warm - 0.4*formal"
    assert (state["rows"], state["directions"], state["workers"][0]["rows"]) == (256, 4, 256)


def test_metrics_stand_beside_those_of_vllm(server: Serving) -> None:
    chat(server, "pico:friendly")
    chat(server, **steer("warm +"))
    text = server.call("GET", "/metrics")[2]
    assert "vllm:num_requests_running" in text
    assert 'steer:requests_total{arm="friendly",outcome="done"}' in text
    assert 'steer:requests_running{arm="friendly"} 0.0' in text
    assert 'steer:refused_total{reason="expression"}' in text


def children(process: int) -> set[int]:
    """The processes that descend from one."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, found[::2]), map(int, found[1::2]), strict=True))
    chain = lambda pid: pid in parents and (parents[pid] == process or chain(parents[pid]))  # noqa: E731
    return {pid for pid in parents if chain(pid)}


def gone(processes: set[int]) -> bool:
    end = time.monotonic() + 20
    while any(
        Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in processes
    ):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_what_it_prints_and_how_it_ends(server: Serving, tmp_path: Path) -> None:
    """Ctrl-C ends it with nothing left; so does a dead engine, which is an error. Uses servers of its own."""
    for ending in ("interrupt", "engine"):
        serving = Serving(tmp_path / ending)
        serving.wait()
        below = children(serving.process.pid)
        assert len(below) >= 2
        if ending == "interrupt":
            serving.process.send_signal(signal.SIGINT)
            assert serving.process.wait(60) == 0
            assert serving.said().endswith("ended\n")
        else:
            engine = next(pid for pid in below if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
            os.kill(engine, signal.SIGKILL)
            assert serving.process.wait(60) == 1
            assert "error: the server has ended" in serving.said()
            assert "hint: the whole log is" in serving.said()
        assert gone(below)
        assert "Traceback" not in serving.said()
        assert str(tmp_path / ending / "vllm.log") in serving.said()
        serving.close()


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
