"""A vector that acts only on angry prompts, tried as a user would: the OpenAI client, one batch, the bundled model.

    .venv/bin/python tests/hostile/serving/gates_trial.py [--folder FOLDER] [--compiled] [--dtype bfloat16]

A vector "calm" and a probe for anger are made from `examples/data`. Then 24 angry and 24 neutral prompts, which neither
has seen, go to `steer serve` at once, as an arm with a condition, and to stock vLLM. The decisions on the receipts must
be those of the hooked transformers model; prompts on which the gate stays closed must get stock vLLM's text token for
token, and the metrics must count the decisions. Exits with 1 and says what differs. `--folder` keeps the files, and
uses those that it has. The hooks run in float32; in another dtype the servers' values may differ by its rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
DATA = ROOT / "examples" / "data"
STEER = (sys.executable, "-P", "-c", "from steer.cli import main; main()")
STOCK = (sys.executable, "-P", "-m", "steer.serving.vllm_command")  # which the CPU build needs; without the plugin
EXPRESSION = "1.4*calm@when:anger>0"


def made(folder: Path) -> tuple[Path, Path]:
    """The vector and the probe, made where they are missing."""
    vector, probe = folder / "calm.safetensors", folder / "anger.safetensors"
    angry, tense, plain = (str(DATA / f"{name}.jsonl") for name in ("angry", "tense", "plain"))
    if not vector.exists():
        subprocess.run([*STEER, "extract", "--pos", angry, "--neg", tense, "-o", str(vector)], check=True)
    if not probe.exists():
        training = ["--pos", angry, "--neg", plain, "--tokens", "prompt", "-o", str(probe)]
        subprocess.run([*STEER, "probe", "train", *training], check=True)
    return vector, probe


@contextlib.contextmanager
def running(command: Sequence[str], port: int, log: Path, **environment: str) -> Iterator[str]:
    """A server that answers, ended afterwards; its address."""
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            list(command), stdout=output, stderr=output, env={**os.environ, **environment}, start_new_session=True
        )
        try:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                    break
                if process.poll() is not None:
                    sys.exit(f"{command[-1]} has ended; see {log}")
                time.sleep(1)
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(address: str, model: str, prompts: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """The answers of the OpenAI client, all asked for at once."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600)

    def ask(prompt: str) -> dict[str, Any]:
        found = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": prompt}], max_tokens=tokens, temperature=0
        )
        body: dict[str, Any] = found.model_dump()
        return body

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


def decisions(prompts: Sequence[str], vector: Path, probe: Path) -> list[tuple[float, bool]]:
    """The probe's value at the last token of each prompt and the decision, through the hooks."""
    import torch

    import steer
    from probes.steered import steered
    from vectors.resolve import load

    opened = steer.load_model("smollm2")
    sources = {"calm": load(vector), "anger": load(probe)}
    found = []
    for prompt in prompts:
        message = [{"role": "user", "content": prompt}]
        ids = opened.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad(), steered(opened.model, EXPRESSION, vectors=sources, prompt_length=len(ids)) as read:
            opened.model(input_ids=torch.tensor([[*ids, ids[-1]]]))  # any token as the response
        (decided,) = read.of_row(0)
        found.append((decided.value, bool(decided.held)))
    return found


def main() -> int:
    """Run the trial; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile, which takes minutes")
    arguments = parser.parse_args()
    from vectors import references

    with tempfile.TemporaryDirectory() as name:
        folder = (arguments.folder or Path(name)).absolute()
        folder.mkdir(exist_ok=True)
        vector, probe = made(folder)
        angry, plain = (
            [json.loads(line) for line in (DATA / f"{kind}-prompts.jsonl").read_text().splitlines()]
            for kind in ("angry", "plain")
        )
        prompts = [prompt for pair in zip(angry, plain, strict=True) for prompt in pair]
        flags = [
            "--max-model-len",
            "512",
            "--dtype",
            arguments.dtype,
            *([] if arguments.compiled else ["--enforce-eager"]),
        ]
        path, port = str(references.resolve("smollm2").path), free_port()
        served = ["serve", path, "--served-model-name", "smollm2", "--port", str(port), *flags]
        with running([*STOCK, *served], port, folder / "stock.log", VLLM_PLUGINS="", VLLM_CPU_KVCACHE_SPACE="2") as at:
            stock = answers(at, "smollm2", prompts, arguments.tokens)
        bindings = ["--vector", f"calm={vector}", "--vector", f"anger={probe}", "--arm", f"calmer={EXPRESSION}"]
        command = [*STEER, "serve", "smollm2", *bindings, "--port", str(port), "--log", str(folder / "vllm.log")]
        with running([*command, "--", *flags], port, folder / "steer.log", VLLM_CPU_KVCACHE_SPACE="2") as at:
            steered = answers(at, "smollm2:calmer", prompts, arguments.tokens)
            with urllib.request.urlopen(f"{at}/metrics") as page:
                metrics = page.read().decode()
        expected = decisions(prompts, vector, probe)
    allowed = 1e-3 if arguments.dtype == "float32" else 0.25
    return report(prompts, angry, stock, steered, expected, metrics, allowed)


def report(
    prompts: Sequence[str],
    angry: Sequence[str],
    stock: Sequence[dict[str, Any]],
    steered: Sequence[dict[str, Any]],
    expected: Sequence[tuple[float, bool]],
    metrics: str,
    allowed: float,
) -> int:
    """Print the answers and what is wrong; the exit code."""
    problems = []
    counts = {True: 0, False: 0}
    for prompt, plain, answer, (value, held) in zip(prompts, stock, steered, expected, strict=True):
        (gate,), (term,) = answer["steer"]["gates"], answer["steer"]["terms"]
        texts = [body["choices"][0]["message"]["content"] for body in (plain, answer)]
        counts[held] += 1
        if bool(gate["held"]) != held or abs(gate["value"] - value) > allowed:
            problems.append(f"{prompt!r}: {gate['value']:.4f} on the receipt, {value:.4f} through the hooks")
        tokens = answer["usage"]["completion_tokens"] - 1
        if term["response_tokens"] != (tokens if held else 0):
            problems.append(f"{prompt!r}: acted on {term['response_tokens']} tokens of {tokens}")
        if not held and texts[0] != texts[1]:
            problems.append(f"{prompt!r}: the gate is closed, and the text differs from stock vLLM's: {texts}")
        print(f"{'open  ' if held else 'closed'} {value:+7.3f}  {prompt}")
        if held and texts[0] != texts[1]:
            print(f"    stock: {texts[0][:100]!r}\n    calm:  {texts[1][:100]!r}")
    right = sum(held == (prompt in angry) for prompt, (_, held) in zip(prompts, expected, strict=True))
    for decision, held in (("open", True), ("closed", False)):
        match = re.search(rf'steer:gate_total{{[^}}]*decision="{decision}"[^}}]*}} ([\d.]+)', metrics)
        if float(match[1] if match else 0) != counts[held]:
            problems.append(f"the metrics count {match and match[1]} decisions {decision}, not {counts[held]}")
    changed = sum(
        held and a["choices"][0]["message"]["content"] != b["choices"][0]["message"]["content"]
        for a, b, (_, held) in zip(stock, steered, expected, strict=True)
    )
    print(f"open for {counts[True]} prompts, of which {changed} get another text; right for {right} of {len(prompts)}")
    print("\n".join([f"{len(problems)} faults", *problems]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
