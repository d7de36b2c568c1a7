"""A process in which vLLM engines run, one after the other: a request a line on stdin, an answer a line on stdout.

An engine inside one process starts in seconds, so the tests can afford many. What vLLM prints goes to stderr.
"""

from __future__ import annotations

import gc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
import types
from typing import Any

ENGINE: Any = None
ADDED: list[str] = []  # to the environment, for the present engine


def start(
    settings: str | None, plugin: bool, environment: dict[str, str] | None = None, **arguments: Any
) -> dict[str, Any]:
    """Start an engine in the place of the one that runs; `environment` is for this one alone."""
    global ENGINE
    stop()
    for name in ADDED:
        os.environ.pop(name, None)
    ADDED[:] = ["VLLM_MLA_DISABLE", *(environment or {})]  # the first is set by vLLM itself
    os.environ.update(environment or {})
    if plugin:
        from steer.serving import settings as module

        os.environ.pop(module.CONFIG, None)
        if settings is not None:
            os.environ[module.CONFIG] = settings
    from vllm import LLM
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()  # which takes half a minute for each architecture
    stand_in_for_torchvision()
    freeze()

    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 40,
        "disable_log_stats": True,
        "distributed_executor_backend": "uni",
        "block_size": 32,
        **on_this_device(),
        **arguments,
    }
    ENGINE = LLM(**given)
    return {}


def stand_in_for_torchvision() -> None:
    """What vLLM imports for Qwen3.5 and for vision-language models, and does not call for text."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    for part in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional"):
        module: Any = types.ModuleType(f"torchvision{part}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
        module.__path__, module.__version__, module.__getattr__ = [], "0", anything
        sys.modules[module.__name__] = module


def anything(name: str) -> type:
    """A class of this name, as an attribute of a module that is not there."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def on_this_device() -> dict[str, Any]:
    """What a GPU needs, where there is one: exact attention in float32, and the CUDA graphs of STEER_TEST_GRAPHS.

    On a CPU, the blocks for keys and values are half as many again as all sequences fill: more take time to be cleared.
    """
    import torch

    if not torch.cuda.is_available():
        return {"num_gpu_blocks_override": 512}
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
    given: dict[str, Any] = {
        "attention_backend": "TRITON_ATTN",
        "gpu_memory_utilization": 0.1,  # so that engines can start beside each other
        "kv_cache_memory_bytes": 2**30,
    }
    graphs = os.environ.get("STEER_TEST_GRAPHS")
    if graphs:
        sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
        compilation = {"cudagraph_mode": graphs, "cudagraph_capture_sizes": sizes}
        given |= {"enforce_eager": False, "compilation_config": compilation}
    return given


def stop() -> dict[str, Any]:
    global ENGINE
    if ENGINE is not None:
        ENGINE.llm_engine.engine_core.shutdown()
        ENGINE = None
    if "vllm.distributed" in sys.modules:  # also what an engine that failed to start has left
        gc.collect()
        sys.modules["vllm.distributed"].cleanup_dist_env_and_memory()
        freeze()
    return {}


FREEZE = gc.freeze


def freeze() -> None:
    """Let garbage collections pass over all that is there, which is what was imported.

    vLLM collects nine times from the start of an engine to its end, which took two thirds of that time. It freezes what
    the engine holds itself, and thaws everything before the end: here nothing is thawed, and engines are collected.
    """
    gc.freeze = gc.unfreeze = lambda: None
    FREEZE()


def generate(jobs: list[dict[str, Any]], together: bool = True) -> list[Any]:
    """Each job: `ids`, and optionally `steer`, `tokens`, `n`, `stop`, `extra`, `lora`, `top`, `structured`, `allowed`.

    `top` is how many of the likeliest tokens of the prompt are scored too, `structured` what the answer must be,
    `allowed` the ids that may be sampled.
    """
    outputs: list[Any] = []
    engine = ENGINE.llm_engine
    for group in [jobs] if together else [[job] for job in jobs]:
        answers: dict[str, Any] = {}
        for i, job in enumerate(group):
            try:
                engine.add_request(str(i), prompt(job), parameters(job), lora_request=adapter(job))
            except Exception as error:
                answers[str(i)] = {"error": f"{type(error).__name__}: {error}"}
        drain(answers)
        outputs += [answers[str(i)] for i in range(len(group))]
    return outputs


def measure(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds from the first request's arrival until the last has ended, by the clock and of the processor.

    With them, the processor's seconds of each step, and what admission took of each request.
    """
    time_admission()
    SPENT.clear()
    answers: dict[str, Any] = {}
    steps = []
    engine = ENGINE.llm_engine
    started, used = time.perf_counter(), time.process_time()
    for i, job in enumerate(jobs):
        engine.add_request(str(i), prompt(job), parameters(job))
    while engine.has_unfinished_requests():
        before = time.process_time()
        drain(answers, 1)
        steps.append(time.process_time() - before)
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    tokens = sum(len(found["ids"]) for found in answers.values())
    return {"seconds": seconds, "processor": processor, "steps": steps, "tokens": tokens, "spent": SPENT}


def traffic(jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """All jobs at once: seconds until the last has ended; of each, those to its first token and those between tokens.

    The time between two tokens of a request is the mean over its response.
    """
    engine = ENGINE.llm_engine
    times: dict[str, list[float]] = {str(i): [] for i in range(len(jobs))}
    counts = dict.fromkeys(times, 0)
    started = time.perf_counter()
    for i, job in enumerate(jobs):
        engine.add_request(str(i), prompt(job), parameters(job))
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            times[output.request_id].append(now)
            counts[output.request_id] += len(output.outputs[0].token_ids)
    return {
        "seconds": max(arrived[-1] for arrived in times.values()),
        "first": [arrived[0] for arrived in times.values()],
        "between": [(t[-1] - t[0]) / (counts[name] - 1) for name, t in times.items()],
        "tokens": sum(counts.values()),
    }


def beside(jobs: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds until all jobs have ended, while one client sends others, each when the one before has ended.

    With them, how many of the others ended in this time, and the seconds of each step.
    """
    answers: dict[str, Any] = {}
    steps = []
    engine = ENGINE.llm_engine
    names = [str(i) for i in range(len(jobs))]
    waiting = iter(enumerate(others))
    present = ""
    started = time.perf_counter()
    for name, job in zip(names, jobs, strict=True):
        engine.add_request(name, prompt(job), parameters(job))
    while not answers.keys() >= set(names):
        if others and (not present or present in answers):
            i, job = next(waiting)
            present = f"other{i}"
            engine.add_request(present, prompt(job), parameters(job))
        before = time.perf_counter()
        drain(answers, 1)
        steps.append(time.perf_counter() - before)
    seconds = time.perf_counter() - started
    drain(answers)
    return {"seconds": seconds, "others": len(answers) - len(jobs), "steps": steps}


SPENT: dict[str, list[float]] = {}  # seconds of the processor for each call, in the front end and in the worker


def time_admission() -> None:
    """Once, and only beside the plugin: time its two functions that run for every request."""
    if "STEER_TIMED" in os.environ or "steer" not in os.environ.get("VLLM_PLUGINS", ""):
        return
    os.environ["STEER_TIMED"] = "1"
    from steer.serving.engine.admission import Admission
    from steer.serving.engine.worker.steering_worker import SteeringWorker

    for owner, name in ((Admission, "admit"), (SteeringWorker, "begin")):
        original = getattr(owner, name)

        def timed(*args: Any, original: Any = original, name: str = name) -> Any:
            started = time.thread_time()
            try:
                return original(*args)
            finally:
                SPENT.setdefault(name, []).append(time.thread_time() - started)

        setattr(owner, name, timed)


def drain(answers: dict[str, Any], steps: int = 100_000) -> None:
    """Step until nothing is left, or so many times."""
    engine = ENGINE.llm_engine
    while engine.has_unfinished_requests() and steps:
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = answer(output)
        steps -= 1


def stream(jobs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The outputs of each job, one a step, with the tokens that are new in it, and the receipt where it has one."""
    engine = ENGINE.llm_engine
    events: list[list[dict[str, Any]]] = [[] for _ in jobs]
    for i, job in enumerate(jobs):
        engine.add_request(str(i), prompt(job), parameters({**job, "streamed": True}))
    while engine.has_unfinished_requests():
        for output in engine.step():
            first = output.outputs[0]
            receipt = getattr(first, "steer", None)
            event = {"ids": list(first.token_ids), "finished": output.finished, "receipt": receipt}
            events[int(output.request_id)].append(event)
    return events


def script(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Interleave by hand: add {job, id}, abort {id}, step {count}, unload {digest} behind the engine's back.

    `preempt` sends all running requests back to the queue and empties the prefix cache. `break` {rank} lets this worker
    fail when it next writes a slot. At the end everything runs out.
    """
    answers: dict[str, Any] = {}
    engine = ENGINE.llm_engine
    trace = []
    for step in steps:
        if "add" in step:
            engine.add_request(step["id"], prompt(step["add"]), parameters(step["add"]))
        elif "abort" in step:
            engine.abort_request([step["abort"]])
        elif "unload" in step:
            ENGINE.collective_rpc("steer_unload", args=(step["unload"],))
        elif "preempt" in step:
            ENGINE.reset_prefix_cache(reset_running_requests=True)
        elif "break" in step:
            ENGINE.collective_rpc(broken, args=(step["break"],))
        elif "vectors" in step:
            trace.append(state())
        else:
            drain(answers, step["step"])
    drain(answers)
    return {"answers": answers, "trace": trace}


def broken(worker: Any, rank: int) -> None:
    """Runs in every worker."""

    def fault(*args: Any) -> None:
        raise MemoryError("the device is full")

    if worker.rank == rank:
        worker.steer.table._copy = fault


def prompt(job: dict[str, Any]) -> Any:
    return {"prompt_token_ids": job["ids"]}


def adapter(job: dict[str, Any]) -> Any:
    if "lora" not in job:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("adapter", 1, job["lora"])


def parameters(job: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    extra = dict(job.get("extra") or {})
    if job.get("steer") is not None:
        extra["steer"] = job["steer"]
    scored = {} if job.get("unscored") else {"prompt_logprobs": job.get("top", 0)}
    structured = StructuredOutputsParams(**job["structured"]) if "structured" in job else None
    return SamplingParams(
        temperature=job.get("temperature", 0.0),
        seed=job.get("seed"),
        n=job.get("n", 1),
        max_tokens=job.get("tokens", 8),
        ignore_eos=structured is None,
        structured_outputs=structured,
        logprobs=None if job.get("streamed") else 0,
        stop=job.get("stop"),
        allowed_token_ids=job.get("allowed"),
        extra_args=extra or None,
        output_kind=RequestOutputKind.DELTA if job.get("streamed") else RequestOutputKind.FINAL_ONLY,
        **scored,
    )


def answer(output: Any) -> dict[str, Any]:
    """Token ids and log-probabilities of every token but the first, and what was cached and applied."""
    first = output.outputs[0]
    found = {
        "ids": list(first.token_ids),
        "reason": first.finish_reason,
        "scores": [entry[token].logprob for token, entry in zip(first.token_ids, first.logprobs or [], strict=True)],
        "cached": output.num_cached_tokens,
        "receipt": getattr(first, "steer", None),
        "all": [list(one.token_ids) for one in output.outputs],
        "all_scores": [
            [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs or [], strict=bool(one.logprobs))]
            for one in output.outputs
        ],
        "receipts": [getattr(one, "steer", None) for one in output.outputs],
    }
    if output.prompt_logprobs is not None:
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        found["prompt_scores"] = [entry[token].logprob for token, entry in pairs]
        found["prompt_top"] = [
            {token: value.logprob for token, value in entry.items()} for entry in output.prompt_logprobs[1:]
        ]
    return found


def scheduler() -> Any:
    return ENGINE.llm_engine.engine_core.engine_core.scheduler


def state() -> dict[str, Any]:
    """What the engine core and the worker hold, and how often a request was preempted."""
    capacity = scheduler().steer_capacity
    return {
        "capacity": capacity.state(),
        "worker": ENGINE.collective_rpc("steer_state")[0],
        "preempted": PREEMPTED[0],
        "progress": len(capacity.progress),
    }


def claims() -> dict[str, Any]:
    """Wrong claims about where the started model has its stream, and why each is refused; None where it is not."""
    reasons: dict[str, Any] = ENGINE.collective_rpc(refused_claims)[0]
    return reasons


def refused_claims(worker: Any) -> dict[str, Any]:
    """Runs in the worker: every form but the proved one, layers off by one, and a norm's output for the stream."""
    from steer.serving.engine.proving import forms as claimed
    from steer.serving.engine.proving import probing, proof

    config, model = worker.vllm_config.model_config, worker.model_runner.get_model()
    count, hidden = int(config.get_total_num_hidden_layers()), int(config.get_hidden_size())
    reasons: dict[str, Any] = {}
    with probing.passes(worker.model_runner, worker.vllm_config, second=bool(worker.use_v2_model_runner)) as run:
        blocks = proof.decoder_blocks(model, count, run, hidden)
        right = proof.prove(model, count, hidden, run)[0].form
        attempts = claimed.Passes(model, blocks, run, hidden)
        forms = [claimed.Form(parts) for parts in (None, (0,), (1,), (0, 1))]
        for form in forms:
            if form.parts != right.parts:
                reasons[form.name] = problem(lambda form=form: proof.problem_of(form, attempts))
        later = {layer: blocks.get(layer + 1, blocks[0]) for layer in blocks}
        reasons["off by one"] = problem(lambda: proof.problem_of(right, claimed.Passes(model, later, run, hidden)))
        norms = {layer: first_norm(block) for layer, block in blocks.items()}
        for form in forms:
            claim = f"the norm's output as {form.name}"
            reasons[claim] = problem(
                lambda form=form: proof.problem_of(form, claimed.Passes(model, norms, run, hidden))
            )
    return reasons


def problem(attempt: Any) -> str | None:
    """What is wrong with a claim, also where it can't even be put to the proof."""
    try:
        reason: str | None = attempt()
        return reason
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def first_norm(block: Any) -> Any:
    return next(module for module in block.modules() if "Norm" in type(module).__name__)


PREEMPTED = [0]


def count_preemptions() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        PREEMPTED[0] += 1
        return original(*args, **kwargs)

    Scheduler._preempt_request = counted  # type: ignore[method-assign]


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whoever prints, prints elsewhere
    calls = {f.__name__: f for f in (start, stop, generate, measure, traffic, beside, stream, script, state, claims)}
    counting = False
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if not counting:
                counting = True
                count_preemptions()
            value = {"value": calls[request.pop("call")](**request)}
        except BaseException as error:
            import traceback

            traceback.print_exc()
            value = {"failed": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(value) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
