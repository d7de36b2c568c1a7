"""Weights sharded over the processes: torch's fully_shard (FSDP2), as accelerate and the Trainer drive it.

Each process keeps its shard of every block's weights, gradients and optimiser state, and gathers a block when it is
computed. Before training each process holds the whole model, which is sharded in place (a sweep of learning rates
shards copies); afterwards rank 0 gathers the trained weights into a whole model again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from probes.models import residual
from steer.training.distributed import processes


def problems_of(sharded: bool, optimiser: str, full: bool, dtype: str, context: str) -> list[str]:
    """Settings that do not work with FSDP, one sentence per problem."""
    problems = []
    if sharded and context == "frozen":
        problems.append("--fsdp can't be combined with --context frozen: leave one of them out")
    if sharded and processes.count() == 1 and "LOCAL_RANK" not in os.environ:
        problems.append(
            "--fsdp shards the model over processes, and there is one: torchrun --nproc-per-node N -m steer bake"
        )
    if sharded and optimiser != "adamw":
        problems.append(f"--fsdp shards matrices, which {optimiser} needs whole: use --optimiser adamw")
    if sharded and full and dtype != "float32":
        problems.append("--fsdp trains all weights in float32 only: add --dtype float32, or train an adapter")
    if not sharded and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        problems.append("the launcher asks for FSDP: give --fsdp, and start with plain torchrun")
    return problems


def trainer_arguments(model: Any, sharded: bool, checkpointing: bool) -> dict[str, Any]:
    """For TrainingArguments: how the model is sharded, and whether activations are recomputed (checkpointing)."""
    if not sharded:
        return {"gradient_checkpointing": checkpointing}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # without PEFT's wrapper
    blocks = sorted({type(block).__name__ for block in residual.blocks(base)})
    return {
        "fsdp": True,
        "fsdp_config": {
            "transformer_layer_cls_to_wrap": blocks, "activation_checkpointing": checkpointing,
            "state_dict_type": "FULL_STATE_DICT",  # one file, read with weights_only: the index of parts is a pickle
        },
    }  # fmt: skip


def gathered(trained: Any, make_model: Callable[[], Any]) -> Any:
    """On rank 0 a whole model with the trained weights; on the others the sharded model itself.

    `make_model` makes the student as it was before training. All processes must call this.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(trained, options=options)
    if not processes.is_main():
        return trained
    model = make_model()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: parameter for name, parameter in state.items() if name in trainable}
    if missing := trainable - weights.keys():
        raise RuntimeError(f"the trained weights lack {', '.join(sorted(missing)[:3])}")
    model.load_state_dict(weights, strict=False)
    return model
