"""The journey on real data, as `make demo` shows it: extract a vector, try it, draw it, serve it.

Run it from the project's folder: .venv/bin/python examples/demo.py
Everything it makes lies in demo/.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from steer.cli import output, run

ROOT = Path(__file__).parent.parent
OUT = Path("demo")  # below ROOT
DATA = Path("examples") / "data"
PROMPTS = ("How was your day?", "Can you help me with my homework?", "Good morning!")


def step(title: str, *arguments: str) -> None:
    """Show a command as one would type it, and run it; a failure ends the demo."""
    print(f"\n== {title}\n$ steer {shlex.join(arguments)}\n", flush=True)
    code = run(list(arguments))
    sys.stdout.flush()
    if code:
        sys.exit(code)


def serve(vector: str) -> None:
    """Start a server on the vector, ask the base and the steered arm the same question at once, and end the server."""
    print("\n== The same question to the base and to an arm, at once, over HTTP")
    if importlib.util.find_spec("vllm") is None:
        print("skipped: vLLM is not installed here (make setup installs it on Linux)")
        return
    import openai

    from steer.serving.launch import served
    from vectors import references
    from vectors.errors import SteerError

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4"]
    shown = ["serve", "smollm2", "--vector", f"warm={vector}", "--arm", "friendly=2*warm", "--port", str(port), "--"]
    print(f"$ steer {shlex.join([*shown, *flags])}\n", flush=True)
    log = (OUT / "vllm.log").absolute()
    log.unlink(missing_ok=True)
    print(f"vLLM's own output goes to {OUT / 'vllm.log'}", flush=True)
    settings = {"vectors": {"warm": str(Path(vector).absolute())}, "arms": {"friendly": "2*warm"}}

    def ask(model: str) -> Any:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        messages: Any = [{"role": "user", "content": PROMPTS[0]}]
        return client.chat.completions.create(model=model, messages=messages, max_tokens=40, temperature=0)

    try:
        path = references.resolve("smollm2").path
        waiting = lambda stage: print(f"waiting: {stage}", flush=True)  # noqa: E731
        with served(path, settings, name="smollm2", port=port, flags=flags, log=log, waiting=waiting) as server:
            models = ("smollm2", "smollm2:friendly")
            with ThreadPoolExecutor() as pool:
                answers = list(pool.map(ask, models))
    except (SteerError, openai.OpenAIError) as error:
        output.fail(getattr(error, "problems", [str(error)]), getattr(error, "hint", f"look into {log}"))
        sys.exit(1)
    print(f"\n> {PROMPTS[0]}\n")
    print(output.side_by_side(models, [answer.choices[0].message.content for answer in answers]))
    receipt = answers[1].model_extra["steer"]
    print(
        f"\nreceipt of {models[1]}: {receipt['expression']} on {receipt['prompt_tokens']} prompt and "
        f"{receipt['response_tokens']} response tokens\n  {receipt['digest']}\nthe server has ended",
        flush=True,
    )


def main() -> None:
    """Run every step."""
    os.chdir(ROOT)
    OUT.mkdir(exist_ok=True)
    vector, picture = str(OUT / "warm.safetensors"), str(OUT / "warm.png")
    pos, neg = str(DATA / "warm.jsonl"), str(DATA / "cold.jsonl")
    step("The bundled model", "models", "show", "smollm2")
    step("A vector from warm and cold answers", "extract", "--pos", pos, "--neg", neg, "--out", vector)
    asked = [part for prompt in PROMPTS for part in ("-p", prompt)]
    step("The same prompts, colder and warmer", "try", vector, *asked, "--strengths", "-2,0,2")
    step("How well each layer separates the two", "vectors", "plot", vector, "--out", picture)
    serve(vector)
    print(
        "\n== Where everything is\n"
        "demo/warm.safetensors   the vector: every layer's direction, what was measured, where it acts\n"
        "demo/warm.png           the separation of the layers, on examples held out\n"
        "\n== What to type next\n"
        "source .venv/bin/activate\n"
        'steer try demo/warm.safetensors -p "Tell me about your weekend." --strengths 0,1,2,3\n'
        "steer extract --pos examples/data/formal.jsonl --neg examples/data/casual.jsonl "
        "--out demo/formal.safetensors\n"
        "steer try '2*warm - formal' --vector warm=demo/warm.safetensors --vector formal=demo/formal.safetensors "
        '-p "Can you help me move?" --strengths 0,1\n'
        "steer serve smollm2 --vector warm=demo/warm.safetensors --arm friendly='2*warm'\n"
        "steer --help"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
