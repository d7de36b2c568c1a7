"""The plugin: the hooks in stock vLLM. `VLLM_PLUGINS=steer` turns it on; without that, vLLM is left unchanged.

vLLM loads the plugin in every process. Each hook wraps one method of vLLM and calls it. Before that, all methods are
checked to exist; a version of vLLM that is not supported refuses to start.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from steer.serving.settings import NAME, from_environment

SUPPORTED = ("0.32", "0.33")
JOINED = "__steer_joined__"

# The methods of vLLM that are wrapped, as (module, class, method), and the hook of each: a function here or, behind the
# name of a module beside this one, there. `make vllm-changes` shows what the newest vLLM has changed about them.
JOINED_METHODS = {
    ("vllm.engine.arg_utils", "EngineArgs", "create_engine_config"): "_configure",
    ("vllm.v1.worker.gpu_worker", "Worker", "load_model"): "_load_model",
    ("vllm.v1.core.sched.scheduler", "Scheduler", "add_request"): "scheduler_hooks.add_request",
    ("vllm.v1.core.sched.scheduler", "Scheduler", "schedule"): "scheduler_hooks.schedule",
    ("vllm.v1.core.sched.scheduler", "Scheduler", "_free_request"): "scheduler_hooks.free_request",
    ("vllm.v1.core.sched.scheduler", "Scheduler", "finish_requests"): "scheduler_hooks.finish_requests",
    ("vllm.v1.core.sched.scheduler", "Scheduler", "update_from_output"): "scheduler_hooks.update_from_output",
    ("vllm.v1.core.sched.scheduler", "Scheduler", "get_request_counts"): "scheduler_hooks.get_request_counts",
    ("vllm.v1.request", "Request", "update_block_hashes"): "scheduler_hooks.update_block_hashes",
    ("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs"): "frontend_hooks.process_inputs",
    ("vllm.v1.engine.llm_engine", "LLMEngine", "__init__"): "frontend_hooks.start",
    ("vllm.v1.engine.async_llm", "AsyncLLM", "add_request"): "frontend_hooks.enter",
    ("vllm.v1.engine.output_processor", "OutputProcessor", "add_request"): "frontend_hooks.follow",
    ("vllm.v1.engine.output_processor", "OutputProcessor", "process_outputs"): "frontend_hooks.process_outputs",
    ("vllm.v1.engine.output_processor", "OutputProcessor", "_finish_request"): "frontend_hooks.finish",
    ("vllm.v1.engine.output_processor", "OutputProcessor", "abort_requests"): "frontend_hooks.abort",
    (
        "vllm.v1.engine.output_processor",
        "RequestState",
        "_new_completion_output",
    ): "frontend_hooks.new_completion_output",
}


def is_supported(version: str) -> bool:
    """Whether the plugin knows a version of vLLM.

    A development build (0.32.1.dev3+g1a2b3c4) is refused: it may differ from the release in any method.
    """
    return version.split("+")[0].rpartition(".")[0] in SUPPORTED and "dev" not in version


def register() -> None:
    """The entry point of `vllm.general_plugins`. Raises RuntimeError for an unsupported version of vLLM."""
    if NAME not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return  # installed, but not turned on
    import vllm

    if not is_supported(vllm.__version__):
        known = " or ".join(f"{version}.x" for version in SUPPORTED)
        raise RuntimeError(
            f"steer: vLLM {vllm.__version__} is not supported, since its methods may differ from those that the plugin "
            f"wraps: install {known}, or unset VLLM_PLUGINS"
        )
    from vllm.v1.worker.gpu_worker import Worker

    hooks: list[tuple[type, str, Callable[..., Any]]] = [
        (getattr(importlib.import_module(module), owner), name, _hook(hook))
        for (module, owner, name), hook in JOINED_METHODS.items()
    ]
    missing = [f"{owner.__name__}.{name}" for owner, name, _ in hooks if not callable(getattr(owner, name, None))]
    if missing:
        raise RuntimeError(f"steer: this build of vLLM {vllm.__version__} has no {', '.join(missing)}")
    for owner, name, hook in hooks:
        _join(owner, name, hook)
    for call in (_steer_load, _steer_start_loading, _steer_loaded, _steer_use, _steer_unload, _steer_state):
        setattr(Worker, call.__name__.removeprefix("_"), call)


def _hook(name: str) -> Callable[..., Any]:
    """A hook by its name in JOINED_METHODS."""
    module, _, function = name.rpartition(".")
    holder = importlib.import_module(f"steer.serving.engine.{module}") if module else sys.modules[__name__]
    hook: Callable[..., Any] = getattr(holder, function)
    return hook


def _join(owner: type, name: str, hook: Callable[..., Any]) -> None:
    """Replace a method by `hook(original, self, ...)`; nothing where that is done already."""
    original = getattr(owner, name)
    if hasattr(original, JOINED):
        return

    @functools.wraps(original)
    def joined(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(original, self, *args, **kwargs)

    setattr(joined, JOINED, True)
    setattr(owner, name, joined)


def _configure(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Put the size of the slot table into the configuration, which reaches every process and the compile cache key."""
    from steer import __version__
    from steer.serving.engine import frontend_hooks

    settings = from_environment()  # first, so that problems of the settings are reported before those of the model
    config = original(self, *args, **kwargs)
    if not isinstance(config.additional_config, dict):
        raise ValueError("steer: --additional-config must be a JSON object when the plugin is on")
    problems = unsupported(config)
    if problems:
        raise ValueError(f"steer can't serve with {'; nor with '.join(problems)}. Turn that off, or unset VLLM_PLUGINS")
    if settings.gates and config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError("steer: with pipeline parallelism there are no gates; start with --steer-gates 0")
    markers = frontend_hooks.check(settings, config.model_config).markers
    graph = settings.graph()
    if markers is not None and (markers.thinking[0] or markers.tools[0]):
        graph |= {"markers": [markers.thinking, markers.tools]}
    config.additional_config = {**config.additional_config, NAME: {"version": __version__, **graph}}
    return config


def unsupported(config: Any) -> list[str]:
    """The features in a vLLM configuration that would leave tokens unsteered."""
    parallel, model = config.parallel_config, config.model_config
    return [
        feature
        for feature, present in [
            ("speculative decoding", config.speculative_config is not None),
            ("a model that does not generate", model.runner_type != "generate"),
            ("an encoder-decoder model", model.is_encoder_decoder),
            ("micro-batches (--enable-dbo)", getattr(parallel, "use_ubatching", False)),
            ("prefill context parallelism", getattr(parallel, "prefill_context_parallel_size", 1) > 1),
            # These send other tokens through some blocks than the step has, and slots are found by a token's place.
            ("--kv-sharing-fast-prefill", getattr(config.cache_config, "kv_sharing_fast_prefill", False)),
            (
                "expert parallelism with tensor and data parallelism",
                getattr(parallel, "use_sequence_parallel_moe", False),
            ),
            ("diffusion models", getattr(model, "is_diffusion", False)),
            # A connector may look up keys and values by tokens alone, without regard to steering.
            ("a KV connector (--kv-transfer-config, --kv-offloading-size)", config.kv_transfer_config is not None),
        ]
        if present
    ]


def _load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Prove where the blocks hold the stream, steer them there, and join the runner: before vLLM measures memory."""
    from steer.serving.engine.proving.probing import proved_blocks
    from steer.serving.engine.worker.runners import attach
    from steer.serving.engine.worker.steering_worker import SteeringWorker

    result = original(self, *args, **kwargs)
    settings = (self.vllm_config.additional_config or {}).get(NAME)
    if settings is None:
        raise RuntimeError(
            "steer: the engine was configured without the plugin; set VLLM_PLUGINS=steer in every process"
        )
    # Steps are padded to the sizes of CUDA graphs, which may exceed max_num_batched_tokens.
    largest = max([0, *(self.vllm_config.compilation_config.cudagraph_capture_sizes or [])])
    tokens = max(self.vllm_config.scheduler_config.max_num_batched_tokens, largest)
    hidden = self.vllm_config.model_config.get_hidden_size()
    second = bool(self.use_v2_model_runner)
    decoder = proved_blocks(self.model_runner, self.vllm_config, second=second)
    requests = int(self.vllm_config.scheduler_config.max_num_seqs)
    self.steer = SteeringWorker(decoder, settings, tokens, hidden, requests)
    if self.steer.gates is not None and settings.get("markers"):
        from probes.models.markers import Markers
        from steer.serving.engine.worker.sections import install

        markers = Markers(*settings["markers"])
        install(self.model_runner.get_model(), self.steer.gates, self.steer.token_slots, markers)
    attach(self.model_runner, self.steer, second=second)
    return result


def _steer_load(self: Any, content: bytes) -> str:
    return str(self.steer.load(content))


def _steer_start_loading(self: Any, digest: str, content: bytes) -> None:
    self.steer.start_loading(digest, content)


def _steer_loaded(self: Any, digest: str) -> bool:
    return bool(self.steer.loaded(digest))


def _steer_use(self: Any, digest: str) -> None:
    self.steer.use(digest)


def _steer_unload(self: Any, digest: str) -> None:
    self.steer.unload(digest)


def _steer_state(self: Any) -> dict[str, Any]:
    state: dict[str, Any] = self.steer.state()
    return state
