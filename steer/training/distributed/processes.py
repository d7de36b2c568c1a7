"""A bake in several processes, as torchrun and `accelerate launch` start them.

Rank 0, the main process, samples, writes and evaluates. The others wait for its samples, train on their share of every
batch, and end. A launcher passes rank and world size in the environment.
"""

from __future__ import annotations

import datetime
import os

from vectors.errors import UsageError

TIMEOUT = datetime.timedelta(days=2)  # the other ranks wait while rank 0 samples, which may take hours


def count() -> int:
    """The world size: how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process has rank 0, which alone writes files and reports."""
    return int(os.environ.get("RANK", "0")) == 0


def problems_of(batch: int, context: str) -> list[str]:
    """Settings that do not work with several processes, one sentence per problem."""
    if count() == 1:
        return []
    problems = []
    if batch % count():
        problems.append(f"a batch of {batch} can't be shared by {count()} processes: use a multiple of {count()}")
    if context == "frozen":
        problems.append("--context frozen trains in one process: start it without a launcher")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        problems.append("DeepSpeed is not supported: start with plain torchrun; --fsdp shards the model")
    return problems


def barrier() -> None:
    """Wait until all processes are here; the first call makes the process group. A single process does not wait.

    Raises UsageError when the processes can't connect.
    """
    if count() == 1:
        return
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]

    try:
        PartialState(timeout=TIMEOUT)
        torch.distributed.barrier()
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the {count()} processes can't connect to each other: {str(error).splitlines()[0]}",
            "start them together: torchrun --nproc-per-node N -m steer bake ...",
        ) from error


def close() -> None:
    """Leave the process group once all processes have trained: one that ended early would break the connection."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # set by accelerate; the next training in this process would read it
    if count() == 1:
        return
    import torch
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(True)
