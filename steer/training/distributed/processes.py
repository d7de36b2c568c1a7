"""A bake in several processes, as torchrun and `accelerate launch` start them: one leads, and all of them train.

The leader samples, writes and measures; the others wait for its samples, train on their share of every batch, and are
done. What a launcher says of a process it says in the environment.
"""

from __future__ import annotations

import datetime
import os

from vectors.errors import UsageError

PATIENCE = datetime.timedelta(days=2)  # that others wait: the leader may sample for hours


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def problems(batch: int, context: str) -> list[str]:
    """What several processes can't do, one sentence each."""
    if count() == 1:
        return []
    found = []
    if batch % count():
        found.append(f"a batch of {batch} can't be shared by {count()} processes: use a multiple of {count()}")
    if context == "frozen":
        found.append("--context frozen trains in one process: start it without a launcher")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        found.append("DeepSpeed is not supported: start with plain torchrun; --fsdp cuts the model")
    return found


def meet() -> None:
    """Wait for all processes; the first time they find each other. One alone goes on at once.

    Raises UsageError where they can't.
    """
    if count() == 1:
        return
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]

    try:
        PartialState(timeout=PATIENCE)
        torch.distributed.barrier()
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the {count()} processes do not find each other: {str(error).splitlines()[0]}",
            "start them together: torchrun --nproc-per-node N -m steer bake ...",
        ) from error


def part() -> None:
    """Take leave of the others, all of whom have trained: who ends first would tear the connection apart."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # which accelerate has set, for whoever trains next in this process
    if count() == 1:
        return
    import torch
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(True)
