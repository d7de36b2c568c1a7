"""Every reader of a document takes any mutation of a valid one, or refuses it by an error of ours.

Documents are JSON, YAML and the metadata of artifacts, with right checksums; a mutation puts any value in a place,
removes it, or adds one beside it. `tests/hostile` does the same with bytes, thousands of times.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pico
import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merges.outputs.companions import companions
from merges.outputs.difference import diff
from merges.outputs.verification import read_record
from merges.recipes.document import draft
from merges.recipes.plan import plan
from merges.recipes.recipe import Part, Recipe
from probes.data.reading import read, read_prompts
from steer.evaluation.probing.examples import parameters_of
from steer.experiments import document as experiments
from steer.experiments import feedback
from steer.experiments.specification import Arm, Experiment, Metric
from steer.serving import settings
from vectors.artifact import encode
from vectors.errors import SteerError
from vectors.probe import Probe, Readout, is_probe
from vectors.steering import SteeringVector
from vectors.storage.files import canonical_json, digest_bytes
from vectors.storage.runs import read_json, report_of
from vectors.task import TaskVector

Reader = Callable[[], Any]


class Document(NamedTuple):
    """A valid document, what writes a mutated one, and what reads it."""

    value: Any
    write: Callable[[Any], None]
    readers: tuple[Reader, ...]


EXAMPLES = int(os.environ.get("STEER_MUTATIONS", 20))  # of each document
EXPERIMENT = {
    "name": "tone", "salt": "s", "unit": {"header": "X-Session"}, "coverage": "50%", "ramp": ["1%", 0.05],
    "arms": {"control": {"weight": 0.5}, "warm": {"system": "Be warm.", "weight": "50%"}}, "store_texts": True,
    "metric": {"name": "thumbs", "smallest_effect": 0.1}, "secondary": [{"name": "polite", "kind": "number", "low": 0}],
    "judges": [{"name": "polite", "url": "http://x/v1", "model": "m", "instruction": "?", "sample_rate": 0.1}],
    "guardrails": {"error_rate": 0.1}, "namespace": {"name": "chat", "range": [0, 0.5]}, "on_breach": "warn",
}  # fmt: skip
FEEDBACK = {
    "response_id": "r", "metric": "thumbs", "value": True, "comment": "good", "idempotency_key": "k",
    "prompt": [{"role": "user", "content": "x"}], "demonstration": "better",
}  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from([10**400, -1, 2**63, 1e308, "\0", "\ud800", "../x", "*", "a" * 300, "[", "nan", "1e999", "-"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything inside of a value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in children for place in ((*path, key), *places(child, (*path, key)))]


@st.composite
def mutations(draw: st.DrawFn, value: Any) -> Any:
    """A value with one or two places changed; seldom another value altogether."""
    mutated = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        known = places(mutated)
        if not known:
            return draw(VALUES)
        *above, key = draw(st.sampled_from(known))
        parent = functools.reduce(operator.getitem, above, mutated)
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "wrap", "empty"]))
        if change == "remove":
            del parent[key]
        elif change == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=4))] = draw(VALUES)
        elif change == "wrap":
            parent[key] = draw(st.sampled_from([[parent[key]], {"x": parent[key]}, [[parent[key]] * 2]]))
        else:
            parent[key] = type(parent[key])() if change == "empty" and parent[key] is not None else draw(VALUES)
    return mutated


def shown(*arguments: str) -> None:
    """A command prints what it read, or an error of ours."""
    from steer.cli import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(list(arguments))
    assert code in (0, 1, 2), err.getvalue()
    assert "defect of steer" not in out.getvalue() + err.getvalue(), err.getvalue()


def _metadata(path: Path) -> Any:
    with safe_open(path, "pt") as opened:
        return json.loads(opened.metadata()["steer"])


def _steering(folder: Path) -> Document:
    base = {
        "digest": "sha256:" + "a" * 64,
        "architecture": "LlamaForCausalLM",
        "hidden_size": 8,
        "layers": 6,
        "name": "m",
    }
    metadata = {
        "base": base, "method": {"name": "diffmean", "parameters": {"seed": 0}}, "apply": [2], "licence": "mit",
        "measured": {"1": {"auroc": 0.9}, "2": {"auroc": 0.8, "cohens_d": None}},
        "recommended": {"layers": [2], "strength": 1.5, "reason": "the middle"},
        "parents": [{"digest": "sha256:" + "b" * 64, "strength": 0.5}],
        "data": {"digests": {"positive": "x"}, "examples": {"positive": 3}, "example_digests": ["0" * 16]},
        "chosen_on": {"example_digests": ["1" * 16], "prompt_digests": []},
    }  # fmt: skip
    path = folder / "v.safetensors"
    vector = SteeringVector({1: torch.arange(8.0), 2: torch.ones(8)}, metadata)
    vector.save(path)
    tensors = load_file(path)

    def write(value: Any) -> None:
        with contextlib.suppress(SteerError, TypeError, ValueError):  # what no writer of ours would write
            path.write_bytes(encode(tensors, value))

    return Document(
        _metadata(path), write, (lambda: SteeringVector.load(path), lambda: shown("vectors", "show", str(path)))
    )


def _probe(folder: Path) -> Document:
    metadata = {
        "base": {"digest": "sha256:" + "a" * 64, "name": "m"}, "site": "resid_post", "licence": "mit",
        "method": {"name": "lda", "parameters": {"tokens": "last", "pool": "mean"}},
        "measured": {"1": {"auroc": 0.9}, "2": {"brier": None}}, "recommended": {"layer": 2, "reason": "the best"},
        "thresholds": {"2": 1.5}, "gate": {"layer": 2}, "data": {"example_digests": ["0" * 16]},
    }  # fmt: skip
    path = folder / "p.safetensors"
    Probe({1: Readout(torch.ones(8), 0.5), 2: Readout(torch.arange(8.0), -1.0)}, metadata).save(path)
    tensors = load_file(path)

    def write(value: Any) -> None:
        with contextlib.suppress(SteerError, TypeError, ValueError):  # what no writer of ours would write
            path.write_bytes(encode(tensors, value))

    def read_all() -> None:
        read = Probe.load(path)
        _ = (read.layer, read.threshold, read.site, read.digest, parameters_of(read, None, None), read.base.get("x"))

    test = ("probe", "test", str(path), "--pairs", "absent.jsonl")
    return Document(_metadata(path), write, (read_all, lambda: is_probe(path), lambda: shown(*test)))


def _task(folder: Path) -> Document:
    path = folder / "t.safetensors"
    diff("base", "tuned", path, storage_="sparse:0.1")
    value = _metadata(path)
    tensors = load_file(path)
    lines = [
        f"{name} { ({torch.int64: 'I64'}.get(tensor.dtype, 'F32')) } {list(tensor.shape)} "
        f"{digest_bytes(tensor.numpy().tobytes())}"
        for name, tensor in sorted(tensors.items())
    ]

    def write(value: Any) -> None:
        if isinstance(value, dict):
            with contextlib.suppress(ValueError, TypeError):
                rest = canonical_json({key: entry for key, entry in value.items() if key != "checksum"})
                value["checksum"] = digest_bytes("\n".join([rest, *lines]).encode())
        with contextlib.suppress(UnicodeEncodeError):
            save_file(tensors, path, {"steer": json.dumps(value)})

    merged = Recipe("task_arithmetic", (Part(str(path), "t", {}),), "base")
    return Document(
        value, write,
        (
            lambda: TaskVector.open(path).verify(), lambda: plan(merged, threads=1),
            lambda: shown("vectors", "show", str(path)),
        ),
    )  # fmt: skip


def _json(path: Path, value: Any, *readers: Reader) -> Document:
    return Document(value, lambda mutated: path.write_text(json.dumps(mutated)) and None, readers)


RECIPE = {
    "method": "ties", "base": "base",
    "models": [
        {"model": "tuned", "name": "a", "weight": 1.5, "density": [0.1, 0.4]},
        {"model": "base", "name": "b", "weight": [{"filter": "*.mlp.*", "value": 0}, {"value": -0.5}]},
    ],
    "parameters": {"lambda": 1.0, "elect": "after"}, "scope": "tensor", "seed": 3, "dtype": "bfloat16", "as": "model",
    "tokenizer": {"source": "union", "pad_to_multiple_of": 8, "tokens": {pico.EOS: {"source": "base", "force": True}}},
    "chat_template": "chatml", "allow_config": ["rope_theta"], "required": ["weight"],
}  # fmt: skip
MERGEKIT = {
    "merge_method": "linear", "base_model": "base", "dtype": "bfloat16", "tokenizer_source": "union",
    "slices": [
        {
            "sources": [
                {"model": "base", "layer_range": [0, 1], "parameters": {"weight": [0.1, 0.9]}},
                {"model": {"model": {"path": "tuned"}}, "layer_range": [0, 1], "parameters": {"weight": 0.5}},
            ],
            "parameters": {"weight": [{"filter": "mlp", "value": 0.3}, {"value": 0.5}], "normalize": True},
        },
    ],
    "parameters": {"weight": 1.0},
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "m/n", "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "bias": "none",
    "rank_pattern": {"q_proj": 2}, "alpha_pattern": {}, "modules_to_save": None, "layer_replication": None,
    "init_lora_weights": True, "target_parameters": None, "trainable_token_indices": None,
}  # fmt: skip
EXAMPLE_LINES = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}]},
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": "x", "label": True},
    {"prompt": "Hi", "chosen": [{"role": "assistant", "content": "x"}], "rejected": "y"},
    {"template": "Be {persona}.", "positive": ["a"], "negative": ["b"], "suffixes": ["I", "We"]},
    {"instruction": "Add", "input": "1", "output": "2"}, {"text": "a", "label": 1}, "plain",
]  # fmt: skip


def feedback_row(body: Any) -> Any:
    """The row of the log that feedback becomes, where it is not refused."""
    metric = Metric("thumbs")
    if feedback.problems_of(body, {"thumbs": metric}):
        return None
    arms = (Arm("control", 1.0),)
    experiment = Experiment("tone", arms, metric, "salt")
    return feedback.row_of(body, experiment, conversation=None, version=None, mark="")


def _documents(folder: Path) -> dict[str, Document]:
    """All documents, with what belongs to them in the current folder."""
    received: list[Any] = []
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    for name, seed in (("base", 0), ("tuned", 1), ("other", 2)):
        model = pico.build("llama", seed=seed, dtype=torch.bfloat16, **(small | {"num_key_value_heads": 1}))
        model.save_pretrained(name, max_shard_size="4KB" if name == "other" else "5GB")
        pico.tokenizer().save_pretrained(name)
    target = "base_model.model.model.layers.0.self_attn.q_proj"
    Path("lora").mkdir()
    save_file(
        {f"{target}.lora_A.weight": torch.ones(2, 16), f"{target}.lora_B.weight": torch.ones(16, 2)},
        "lora/adapter_model.safetensors",
    )
    shown("merge", "base", "tuned", "--method", "linear", "-o", "merged")
    vector = SteeringVector({1: torch.ones(8)}, {"apply": [1]})
    vector.save("warm.safetensors")

    def merges(*models: str, base: str | None = None) -> Reader:
        method = "linear" if base is None else "task_arithmetic"
        recipe = Recipe(method, tuple(Part(model, model, {}) for model in models), base)
        return lambda: plan(recipe, threads=1)

    served = {
        "vectors": {"warm": "warm.safetensors"}, "arms": {"friendly": "1.2*warm"}, "rows": 256, "directions": 4,
        "phases": 8, "max_body": 5000, "folders": ["."], "any_base": False, "allow_strength": False,
    }  # fmt: skip
    other, tuned = Path("other"), merges("other", "base")

    def lines(value: Any) -> None:
        (folder / "x.jsonl").write_text("\n".join(map(json.dumps, value if isinstance(value, list) else [value])))

    data = folder / "x.jsonl"
    recipe_file, mergekit_file = Path("r.yaml"), Path("m.yaml")
    return {
        "steering vector": _steering(folder),
        "probe": _probe(folder),
        "task vector": _task(folder),
        "recipe": _json(recipe_file, RECIPE, lambda: plan(draft(recipe_file), threads=1)),
        "mergekit": _json(mergekit_file, MERGEKIT, lambda: plan(draft(mergekit_file), threads=1)),
        "record": _json(
            Path("merged/run.json"), json.loads(Path("merged/run.json").read_text()),
            lambda: read_record(Path("merged")), lambda: report_of(read_json(Path("merged"))[1]),
            lambda: plan(draft(Path("merged/run.json")), threads=1), lambda: shown("merge", "--verify", "merged"),
        ),
        "adapter_config.json": _json(Path("lora/adapter_config.json"), ADAPTER, merges("lora", base="base")),
        "settings": _json(Path("s.yaml"), served, lambda: settings.read(Path("s.yaml"))),
        "experiment": _json(Path("tone.yaml"), EXPERIMENT, lambda: experiments.read(Path("tone.yaml")),
                            lambda: experiments.address("tone.yaml")),
        "feedback": Document(FEEDBACK, received.append, (lambda: feedback_row(received[-1]),)),
        "modules.json": _json(
            other / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "t"}, {"path": "1_Pooling"}],
            lambda: companions(other),
        ),
        "examples": Document(
            EXAMPLE_LINES, lines,
            (lambda: read(data, Path("other.jsonl")), lambda: read(pairs=data), lambda: read_prompts(data)),
        ),
        **{
            name: _json(other / name, json.loads((other / name).read_text()), tuned)
            for name in ("config.json", "model.safetensors.index.json", "tokenizer_config.json", "tokenizer.json")
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        (folder / "other.jsonl").write_text('"another"')
        yield _documents(folder)


NAMES = (
    "steering vector", "probe", "task vector", "recipe", "mergekit", "record", "adapter_config.json", "settings",
    "experiment", "feedback",
    "modules.json", "examples", "config.json", "model.safetensors.index.json", "tokenizer_config.json",
    "tokenizer.json",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_document_is_read_or_refused_by_an_error_of_ours(documents: dict[str, Document], name: str) -> None:
    document = documents[name]
    document.write(document.value)
    for reader in document.readers[:1]:
        with contextlib.suppress(SteerError) if name == "examples" else contextlib.nullcontext():
            reader()  # as it is, it can be read

    @hypothesis.settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(mutations(document.value))
    def check(value: Any) -> None:
        document.write(value)
        for reader in document.readers:
            with contextlib.suppress(SteerError):
                reader()

    check()
    document.write(document.value)
