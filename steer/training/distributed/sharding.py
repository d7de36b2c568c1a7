"""Weights cut over the processes that train: torch's fully_shard (FSDP2), as accelerate and the Trainer drive it.

Each process keeps its part of every block's weights, gradients and optimiser state, and gathers a block when it is
computed. Before training each holds the whole model, which is cut in place (where learning rates are tried, a copy of
it is); afterwards the one that leads gathers what was trained into a whole model again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from probes.models import residual
from steer.training.distributed import processes


def problems(sharded: bool, optimiser: str, full: bool, dtype: str, context: str) -> list[str]:
    """What can't be cut, one sentence each."""
    found = []
    if sharded and context == "frozen":
        found.append("--fsdp does not know --context frozen: leave one of them out")
    if sharded and processes.count() == 1 and "LOCAL_RANK" not in os.environ:
        found.append(
            "--fsdp cuts the model over processes, and there is one: torchrun --nproc-per-node N -m steer bake"
        )
    if sharded and optimiser != "adamw":
        found.append(f"--fsdp cuts matrices, of which {optimiser} needs the whole: use --optimiser adamw")
    if sharded and full and dtype != "float32":
        found.append("--fsdp trains all weights in float32 only: add --dtype float32, or train an adapter")
    if not sharded and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        found.append("the launcher asks for FSDP: say --fsdp, and start with plain torchrun")
    return found


def arguments(model: Any, sharded: bool, checkpointing: bool) -> dict[str, Any]:
    """For TrainingArguments: how the model is cut, and whether activations are computed again."""
    if not sharded:
        return {"gradient_checkpointing": checkpointing}
    own = model.get_base_model() if hasattr(model, "get_base_model") else model  # without PEFT's shell
    blocks = sorted({type(block).__name__ for block in residual.blocks(own)})
    return {
        "fsdp": True,
        "fsdp_config": {
            "transformer_layer_cls_to_wrap": blocks, "activation_checkpointing": checkpointing,
            "state_dict_type": "FULL_STATE_DICT",  # one file, read with weights_only: the index of parts is a pickle
        },
    }  # fmt: skip


def whole(trained: Any, fresh: Callable[[], Any]) -> Any:
    """A model that holds what was trained, all of it; on the processes that do not lead the one that was trained.

    `fresh` makes the model as it was before. All processes must call this.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    found = get_model_state_dict(trained, options=options)
    if not processes.leads():
        return trained
    model = fresh()
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {name: parameter for name, parameter in found.items() if name in wanted}
    if missing := wanted - own.keys():
        raise RuntimeError(f"training gave back no {', '.join(sorted(missing)[:3])}")
    model.load_state_dict(own, strict=False)
    return model
