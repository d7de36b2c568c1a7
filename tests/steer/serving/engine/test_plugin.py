"""The plugin joins a vLLM that it knows, and refuses to start with one that it does not."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from probes.models.markers import Markers
from steer.serving.engine import plugin
from steer.serving.settings import Settings


class Owner:
    """Stands for a class of vLLM's."""

    def method(self, value: int) -> int:
        return value


def vllm(monkeypatch: pytest.MonkeyPatch, version: str, *, without: str = "") -> dict[str, type]:
    """Put a vLLM of that version into this process; returns its classes."""
    methods: dict[str, dict[str, list[str]]] = {}
    for module, owner, method in plugin.JOINED_METHODS:
        members = methods.setdefault(module, {}).setdefault(owner, [])
        members += [] if method == "__init__" else [method]
    found = {}
    names = {".".join(path.split(".")[:i]) for path in methods for i in range(1, path.count(".") + 2)}
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm"].__version__ = version  # type: ignore[attr-defined]
    for path, classes in methods.items():
        for name, members in classes.items():
            body = {member: lambda self, *a, **k: None for member in members if f"{name}.{member}" != without}
            found[name] = type(name, (), body)
            setattr(sys.modules[path], name, found[name])
    monkeypatch.setenv("VLLM_PLUGINS", "other,steer")
    return found


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.33.0"])
def test_a_known_version_is_joined_once(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = vllm(monkeypatch, version)
    plugin.register()
    joined = classes["Scheduler"].add_request  # type: ignore[attr-defined]
    assert hasattr(joined, plugin.JOINED)
    plugin.register()
    assert classes["Scheduler"].add_request is joined  # type: ignore[attr-defined]
    assert callable(classes["Worker"].steer_load)  # type: ignore[attr-defined]


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.32.0", "0.32.1.dev7+gabc", "0.320.1", "nonsense", "0.32"])
def test_another_version_refuses_to_start_and_says_what_is_supported(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = vllm(monkeypatch, version)
    with pytest.raises(RuntimeError, match=r"is not supported, .*: install 0\.32\.x or 0\.33\.x, or unset"):
        plugin.register()
    assert not hasattr(classes["Scheduler"].add_request, plugin.JOINED)  # type: ignore[attr-defined]


def test_a_build_that_lacks_what_is_joined_refuses_to_start_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = vllm(monkeypatch, "0.32.0", without="Scheduler.finish_requests")
    with pytest.raises(RuntimeError, match=r"has no Scheduler\.finish_requests"):
        plugin.register()
    assert not hasattr(classes["Scheduler"].add_request, plugin.JOINED)  # type: ignore[attr-defined]


@pytest.mark.parametrize("asked", [None, "", "other", "steering"])
def test_installed_but_not_asked_for_it_touches_nothing(asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = vllm(monkeypatch, "0.34.0")
    monkeypatch.delenv("VLLM_PLUGINS") if asked is None else monkeypatch.setenv("VLLM_PLUGINS", asked)
    plugin.register()
    assert not hasattr(classes["Scheduler"].add_request, plugin.JOINED)  # type: ignore[attr-defined]


def test_a_join_keeps_what_it_wraps() -> None:
    plugin._join(Owner, "method", lambda original, self, value: original(self, value) + 1)
    assert Owner().method(4) == 5
    assert Owner.method.__wrapped__(Owner(), 4) == 4  # type: ignore[attr-defined]


def configuration(**changes: Any) -> Any:
    """vLLM's configuration, as far as it is looked at."""
    parts = {
        "cache_config": SimpleNamespace(kv_sharing_fast_prefill=False),
        "parallel_config": SimpleNamespace(use_ubatching=False, prefill_context_parallel_size=1),
        "model_config": SimpleNamespace(runner_type="generate", is_encoder_decoder=False, is_diffusion=False),
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    for name, value in changes.items():
        owner, _, field = name.partition("__")
        if field:
            setattr(parts[owner], field, value)
        else:
            parts[owner] = value
    return SimpleNamespace(**parts)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"model_config__runner_type": "pooling"}, "does not generate"),
        ({"model_config__is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_config__is_diffusion": True}, "diffusion"),
        ({"parallel_config__use_ubatching": True}, "micro-batches"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__use_sequence_parallel_moe": True}, "expert parallelism with tensor and data parallelism"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ],
)
def test_what_would_leave_tokens_unsteered_is_named(changes: dict[str, Any], what: str) -> None:
    assert plugin.unsupported(configuration()) == []
    (found,) = plugin.unsupported(configuration(**changes))
    assert what in found


def test_the_table_s_size_and_the_version_are_in_what_vllm_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    from steer.serving.engine import frontend_hooks

    monkeypatch.delenv("STEER_CONFIG", raising=False)
    monkeypatch.setattr(frontend_hooks, "check", lambda settings, model: SimpleNamespace(markers=None))
    found = configuration(additional_config={"theirs": 1})
    plugin._configure(lambda self: found, None)
    assert found.additional_config["theirs"] == 1
    assert found.additional_config["steer"] == {
        "version": __import__("steer").__version__,
        "rows": 256,
        "directions": 4,
    }
    begun = ((9,),), ((10, 11),)
    monkeypatch.setattr(frontend_hooks, "check", lambda *_: SimpleNamespace(markers=Markers(thinking=begun)))
    found = configuration(additional_config={})
    plugin._configure(lambda self: found, None)
    assert found.additional_config["steer"]["markers"] == [begun, ((), ())]
    with pytest.raises(ValueError, match="must be a JSON object"):
        plugin._configure(lambda self: configuration(additional_config=object()), None)


def test_gates_do_not_start_on_a_model_that_is_cut_into_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    from steer.serving.engine import frontend_hooks

    monkeypatch.setattr(plugin, "from_environment", lambda: Settings(gates=1))
    monkeypatch.setattr(frontend_hooks, "check", lambda settings, model: SimpleNamespace(markers=None))
    found = configuration(additional_config={}, parallel_config__pipeline_parallel_size=1)
    plugin._configure(lambda self: found, None)
    assert (found.additional_config["steer"]["gates"], found.additional_config["steer"]["gate_layers"]) == (1, None)
    with pytest.raises(ValueError, match="pipeline parallelism there are no gates; start with --steer-gates 0"):
        plugin._configure(
            lambda self: configuration(additional_config={}, parallel_config__pipeline_parallel_size=2), None
        )


def test_an_engine_that_was_configured_elsewhere_does_not_start_unsteered() -> None:
    worker = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    with pytest.raises(RuntimeError, match="configured without the plugin"):
        plugin._load_model(lambda self: None, worker)
