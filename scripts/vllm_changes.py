"""What the newest vLLM has changed about the methods that the plugin wraps.

    python scripts/vllm_changes.py                 fetch the newest wheel, compare, print; exits with 1 after a change
    python scripts/vllm_changes.py --record WHEEL… write the record from the wheels of the supported versions

A wheel is read, never installed or imported. The record holds, for each supported version and each method, its
signature and the SHA-256 of its body without docstring and comments.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from steer.serving.engine.plugin import JOINED_METHODS, SUPPORTED  # noqa: E402

RECORD = ROOT / "tests" / "steer" / "serving" / "engine" / "joined_methods.json"
V1, V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
BLOCKS = {
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
    "gemma2": "Gemma2DecoderLayer",
    "gemma3": "Gemma3DecoderLayer",
    "mixtral": "MixtralDecoderLayer",
    "gpt2": "GPT2Block",
}
# Beside the wrapped methods: those of the model runners that are wrapped for each model, what the passes of the proof
# call and replace, and blocks that are often steered.
METHODS = [
    *JOINED_METHODS,
    *((V1, "GPUModelRunner", name) for name in ("_prepare_inputs", "execute_model", "sample_tokens", "_dummy_run")),
    *((V2, "GPUModelRunner", name) for name in ("prepare_inputs", "execute_model", "sample_tokens", "_dummy_run")),
    ("vllm.model_executor.layers.attention.attention", "Attention", "forward"),
    *((f"vllm.model_executor.models.{file}", owner, "forward") for file, owner in BLOCKS.items()),
]
Found = dict[str, dict[str, str]]  # by method: its signature and the digest of its body


def methods_of(wheel: Path) -> tuple[str, Found]:
    """The version of a wheel and what it has of METHODS; a missing class or method is left out."""
    found: Found = {}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for module, owner, name in METHODS:
            path = module.replace(".", "/")
            file = next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in names), None)
            for function in functions_of(parsed(archive.read(file)), owner, name) if file else ():
                body = function.body[1:] if ast.get_docstring(function) is not None else function.body
                digest = hashlib.sha256("\n".join(map(ast.unparse, body)).encode()).hexdigest()
                found[f"{module}:{owner}.{name}"] = {"signature": f"({ast.unparse(function.args)})", "body": digest}
    return wheel.name.split("-")[1], found


@functools.cache
def parsed(source: bytes) -> ast.Module:
    """The syntax tree of a module, which several methods share."""
    return ast.parse(source)


def functions_of(module: ast.Module, owner: str, name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The method of a class in a module; the last one, if it is defined several times (overloads)."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            found = [
                part
                for part in node.body
                if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)) and part.name == name
            ]
            yield from found[-1:]


def changes_between(before: Found, after: Found) -> list[str]:
    """One line for each method that another version lacks or has changed."""
    lines = []
    for method, known in before.items():
        present = after.get(method)
        if present is None:
            lines.append(f"{method} is gone")
        elif present["signature"] != known["signature"]:
            lines.append(f"{method} has another signature: {known['signature']} before, {present['signature']} now")
        elif present["body"] != known["body"]:
            lines.append(f"{method} has another body")
    return lines


def fetch(folder: Path) -> Path:
    """Fetch the newest wheel of vLLM from the configured package index. Raises CalledProcessError."""
    platform = ["--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *platform, "-d", str(folder), "vllm"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def newest() -> tuple[str, str, list[str]]:
    """The newest version, the newest recorded one, and the changes between them."""
    record: dict[str, Found] = json.loads(RECORD.read_text())
    known = max(record, key=lambda version: tuple(map(int, version.split("."))))
    with tempfile.TemporaryDirectory() as name:
        version, found = methods_of(fetch(Path(name)))
    return version, known, changes_between(record[known], found)


def main() -> None:
    """Compare or record; exits with 1 when something has changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, nargs="+", metavar="WHEEL", help="write the record from these wheels")
    arguments = parser.parse_args()
    if arguments.record:
        record = dict(map(methods_of, arguments.record))
        missing = [f"{version} lacks {len(METHODS) - len(found)}" for version, found in record.items()]
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        print(f"{RECORD}: {', '.join(missing)} of {len(METHODS)} methods")
        return
    version, known, changes = newest()
    supported = version.rpartition(".")[0] in SUPPORTED
    print(f"vLLM {version} is {'supported' if supported else 'not supported yet'}; compared with {known}:")
    print("\n".join(changes) or "nothing that the plugin wraps has changed")
    raise SystemExit(1 if changes else 0)


if __name__ == "__main__":
    main()
