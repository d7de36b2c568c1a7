"""The hooks in vLLM's two model runners: when requests begin and end, where their tokens lie in a step, and the output.

Support for a third runner is one more function here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from steer.serving.engine.resolved import prompt_length
from steer.serving.engine.worker.slots import Unsteerable
from steer.serving.engine.worker.steering_worker import SteeringWorker

logger = logging.getLogger("vllm.steer")


def attach(runner: Any, state: SteeringWorker, *, second: bool) -> None:
    """Make a model runner report every step to `state`; `second` is vLLM's V2 runner. Raises RuntimeError."""
    kind = "V2" if second else "V1"
    needed = ("execute_model", "sample_tokens", "prepare_inputs" if second else "_prepare_inputs")
    missing = [name for name in needed if not callable(getattr(runner, name, None))]
    if missing:
        raise RuntimeError(f"steer: the {kind} model runner {type(runner).__name__} has no {', '.join(missing)}")
    (_attach_v2 if second else _attach_v1)(runner, state)
    execute, sample = runner.execute_model, runner.sample_tokens

    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        state.end(scheduled.finished_req_ids)
        for new in scheduled.scheduled_new_reqs:
            parameters = new.sampling_params
            try:
                state.begin(new.req_id, prompt_length(new), parameters.extra_args if parameters is not None else None)
                ids = getattr(new, "prefill_token_ids", None) or new.prompt_token_ids
                state.place(new.req_id, ids, new.num_computed_tokens)
            except Exception as error:
                # This request alone fails; an exception would end the engine. Of several workers vLLM reads one report,
                # so a fault that only one of them has would be lost, and the request steered in some layers only. What
                # is Unsteerable is so in every worker: each runs the request unsteered until it is ended. With any
                # other fault this process ends, which ends the engine; vLLM would catch an exception and go on.
                if _several_workers(runner) and not isinstance(error, Unsteerable):
                    logger.exception("steer: request %s can't be steered in this worker, which ends", new.req_id)
                    raise SystemExit(1) from error
                state.fail(new.req_id, str(error) or type(error).__name__)
        running = scheduled.scheduled_cached_reqs
        if running.resumed_req_ids:  # V1 has preempted them; in V2 they have entered as new requests
            for name, computed in zip(running.req_ids, running.num_computed_tokens, strict=True):
                if name in running.resumed_req_ids:
                    state.place(name, running.all_token_ids[name], computed)
        output = execute(scheduled, *args, **kwargs)
        state.launched()
        return _report(output, state)

    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        return _report(sample(*args, **kwargs), state)

    runner.execute_model, runner.sample_tokens = execute_model, sample_tokens


def _several_workers(runner: Any) -> bool:
    """Whether the model runs in more than one worker (tensor or pipeline parallelism)."""
    parallel = getattr(runner, "parallel_config", None)
    return int(getattr(parallel, "world_size", 1)) > 1


def _attach_v1(runner: Any, state: SteeringWorker) -> None:
    prepare: Callable[..., Any] = runner._prepare_inputs

    def prepare_inputs(scheduled: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        state.point(batch.req_ids, batch.num_computed_tokens_cpu[: batch.num_reqs], counts)
        return prepare(scheduled, counts, *args, **kwargs)

    runner._prepare_inputs = prepare_inputs


def _attach_v2(runner: Any, state: SteeringWorker) -> None:
    prepare: Callable[..., Any] = runner.prepare_inputs

    def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        state.point(batch.req_ids, batch.num_computed_tokens_np, batch.num_scheduled_tokens)
        return batch

    runner.prepare_inputs = prepare_inputs


def _report(output: Any, state: SteeringWorker) -> Any:
    """Attach the worker's report to the step's ModelRunnerOutput, which an asynchronous output holds inside."""
    from vllm.v1.outputs import ModelRunnerOutput

    inner = getattr(output, "_model_runner_output", None) or getattr(output, "model_runner_output", None) or output
    if isinstance(inner, ModelRunnerOutput) and inner.req_ids and state.report is not None:
        inner.steer = state.report
    return output
