"""What is mutated: a file of each kind in a folder with whatever belongs to it, and what reads it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

LONGEST = 150_000  # characters that a refusal may print
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Defect(Exception):
    """A reader failed in a way that it must not."""


class Subject(NamedTuple):
    """A file to mutate by its path in the folder, the form of its content, and the reader of the folder."""

    file: str
    form: str
    reader: Callable[[Path], Any]


class Refused(Exception):
    """The reader refused the file with an error of ours."""


def cli(*arguments: str) -> None:
    """Run a command. Raises Refused for an error of ours, Defect for another or for output that must not be."""
    from steer.cli import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(list(arguments))
    printed = out.getvalue() + err.getvalue()
    if "this is a defect of steer" in printed or code not in (0, 1, 2):
        raise Defect(f"{code} {printed[-600:]}")
    if _CONTROL.search(printed):
        raise Defect(f"it printed a control character: {_CONTROL.search(printed)}")
    if len(printed) > LONGEST and code:
        raise Defect(f"it printed {len(printed)} characters: {printed[:200]}")
    if code:
        raise Refused(printed)


def _shown(file: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        cli("vectors", "show", str(folder / file))
        with contextlib.suppress(Refused):
            cli("vectors", "show", str(folder / file), "--json")
        with contextlib.suppress(Refused):
            cli("vectors", "convert", str(folder / file), str(folder / "converted.gguf"))
        cli("vectors", "compare", str(folder / file), str(folder / file))

    return read


def _probe(folder: Path) -> None:
    from vectors.probe import Probe

    probe = _ours(lambda: Probe.load(folder / "p.safetensors"))
    _ours(lambda: (probe.layer, probe.threshold, probe.site, probe.digest))
    (folder / "q.jsonl").write_text("{")
    with contextlib.suppress(Refused):
        cli("probe", "gate", str(folder / "p.safetensors"), "--neg", str(folder / "q.jsonl"))


def _task(folder: Path) -> None:
    from vectors.task import TaskVector

    cli("vectors", "show", str(folder / "task.safetensors"))
    vector = _ours(lambda: TaskVector.open(folder / "task.safetensors"))
    _ours(vector.verify)
    for name in vector.parameters:
        _ours(lambda name=name: vector.delta(name))
    cli("merge", "--recipe", str(folder / "recipe.yaml"), "--dry-run")


def _merged(folder: Path) -> None:
    os.chdir(folder)
    cli("merge", "--recipe", str(folder / "recipe.yaml"), "--dry-run")


def _recorded(folder: Path) -> None:
    from merges.outputs.verification import read_record
    from vectors.storage.runs import read_json, report_of

    with contextlib.suppress(Refused):
        _merged_by(folder / "run.json")
    _ours(lambda: report_of(read_json(folder)[1]))
    _ours(lambda: read_record(folder))
    cli("merge", "--verify", str(folder))


def _merged_by(recipe: Path) -> None:
    os.chdir(recipe.parent)
    cli("merge", "--recipe", str(recipe), "--dry-run")


def _examples(file: str) -> Callable[[Path], None]:
    def read_all(folder: Path) -> None:
        from probes.data.reading import read, read_prompts

        refused = []
        for call in (
            lambda: read_prompts(folder / file),
            lambda: read(folder / file, folder / f"other{Path(file).suffix}"),
            lambda: read(pairs=folder / file),
        ):
            try:
                _ours(call)
            except Refused as error:
                refused.append(error)
        if len(refused) == 3:
            raise refused[-1]

    return read_all


def _expression(folder: Path) -> None:
    """The language, and what a server and a bake say of what it means."""
    import torch

    from steer.serving.engine.admission import Admission
    from steer.serving.settings import Settings
    from vectors.expression import parse
    from vectors.steering import SteeringVector

    text = (folder / "expression.txt").read_text("utf-8", "surrogateescape")
    composition = _ours(lambda: parse(text))
    if parse(str(composition)) != composition:
        raise Defect(f"{text[:100]!r} is not what its canonical text says: {str(composition)[:100]!r}")
    vectors = {name: SteeringVector({1: torch.ones(8)}) for name in ("warm", "formal")}
    _ours(lambda: Admission(Settings(vectors), 8, 2, None).resolve(text))


def _settings(folder: Path) -> None:
    from steer.serving.settings import read

    _ours(lambda: read(folder / "settings.yaml"))


def _ours(call: Callable[[], Any]) -> Any:
    from vectors.errors import SteerError

    try:
        return call()
    except SteerError as error:
        raise Refused(str(error)) from error


def build(folder: Path) -> dict[str, Subject]:
    """Write a folder for each subject under `folder`; returns the subjects by name."""
    import pico
    import torch
    from safetensors.torch import save_file

    from merges.outputs.difference import diff
    from vectors import formats
    from vectors.probe import Probe, Readout
    from vectors.steering import SteeringVector

    base = {
        "digest": "sha256:" + "a" * 64, "architecture": "LlamaForCausalLM", "hidden_size": 8, "layers": 6,
        "name": "m/n",
    }  # fmt: skip
    figures = {"auroc": 0.9, "auroc_low": 0.8, "auroc_high": 0.95, "cohens_d": 1.5, "auroc_shuffled": 0.5}
    metadata = {
        "base": base, "method": {"name": "diffmean", "parameters": {"seed": 0}}, "apply": [2],
        "measured": {"1": figures, "2": figures}, "licence": "mit",
        "recommended": {"layers": [2], "strength": 1.5, "reason": "the middle"},
        "parents": [{"digest": "sha256:" + "b" * 64, "strength": 0.5}], "data": {"examples": {"positive": 3}},
    }  # fmt: skip
    vector = SteeringVector({1: torch.arange(8.0), 2: torch.ones(8)}, metadata)
    subjects: dict[str, Subject] = {}

    def vector_subject(name: str, file: str, form: str, write: Callable[[Path], Any]) -> None:
        (folder / name).mkdir()
        write(folder / name / file)
        subjects[name] = Subject(file, form, _shown(file))

    stack = torch.arange(56.0).reshape(7, 8)
    entry = {"steering_vector": torch.ones(8), "steering_coefficient": 1.0, "action": "add", "bias": None}
    vector_subject("native", "v.safetensors", "safetensors", vector.save)
    vector_subject("bare", "v.safetensors", "safetensors", lambda p: save_file({"layer.1": torch.ones(8)}, p))
    vector_subject("gguf", "v.gguf", "gguf", lambda p: formats.write(vector, p, "gguf"))
    vector_subject("caa", "v.pt", "zip", lambda p: torch.save({1: torch.ones(8), 2: torch.zeros(8)}, p))
    vector_subject("stack", "v.pt", "zip", lambda p: torch.save(stack, p))
    vector_subject("lm_eval", "v.pt", "zip", lambda p: torch.save({"layers.1": entry}, p))
    vector_subject(
        "legacy", "v.pt", "bytes",
        lambda p: torch.save({1: torch.ones(8)}, p, _use_new_zipfile_serialization=False),
    )  # fmt: skip

    (folder / "probe").mkdir()
    probe_metadata = {key: metadata[key] for key in ("base", "method", "licence", "measured")}
    probe_metadata |= {"recommended": {"layer": 2, "reason": "x"}, "thresholds": {"2": 0.5}, "site": "resid_post"}
    readouts = {1: Readout(torch.ones(8), 0.5), 2: Readout(torch.arange(8.0), 0.0)}
    Probe(readouts, probe_metadata).save(folder / "probe" / "p.safetensors")
    subjects["probe"] = Subject("p.safetensors", "safetensors", _in_folder(_probe))

    models = folder / "models"
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    for name, seed in (("base", 0), ("tuned", 1)):
        model = pico.build("llama", seed=seed, dtype=torch.bfloat16, **(small | {"num_key_value_heads": 1}))
        model.save_pretrained(models / name, max_shard_size="20KB")
        pico.tokenizer().save_pretrained(models / name)
    for storage in ("exact", "sparse:0.1", "lowrank:2"):
        name = "task-" + storage.partition(":")[0]
        (folder / name).mkdir()
        diff(str(models / "base"), str(models / "tuned"), folder / name / "task.safetensors", storage_=storage)
        (folder / name / "recipe.yaml").write_text(
            f"method: task_arithmetic\nbase: {models / 'base'}\nmodels: [{{model: task.safetensors, weight: 0.5}}]\n"
        )
        subjects[name] = Subject("task.safetensors", "safetensors", _in_folder(_task))
    shards = folder / "task-index"
    shards.mkdir()
    diff(str(models / "base"), str(models / "tuned"), shards / "task.safetensors", shard=20_000)
    shutil.copy(folder / "task-exact" / "recipe.yaml", shards)
    subjects["task-index"] = Subject("task.safetensors.index.json", "json", _in_folder(_task))

    adapter = folder / "adapter-config"
    adapter.mkdir()
    target = "model.layers.0.self_attn.q_proj"
    (adapter / "lora").mkdir()
    save_file(
        {
            f"base_model.model.{target}.lora_A.weight": torch.ones(2, 16),
            f"base_model.model.{target}.lora_B.weight": torch.ones(16, 2),
        },
        adapter / "lora" / "adapter_model.safetensors",
    )
    settings = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "m/n", "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "bias": "none",
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layer_replication": None,
    }  # fmt: skip
    (adapter / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "recipe.yaml").write_text(
        f"method: task_arithmetic\nbase: {models / 'base'}\nmodels: [{{model: ./lora, weight: 0.5}}]\n"
    )
    shutil.copytree(adapter, folder / "adapter-weights")
    subjects["adapter-config"] = Subject("lora/adapter_config.json", "json", _merged)
    subjects["adapter-weights"] = Subject("lora/adapter_model.safetensors", "safetensors", _merged)

    for name, file, form in (
        ("model-config", "config.json", "json"), ("model-index", "model.safetensors.index.json", "json"),
        ("model-tokenizer", "tokenizer.json", "json"), ("model-tokenizer-config", "tokenizer_config.json", "json"),
        ("model-generation-config", "generation_config.json", "json"),
        ("model-shard", sorted(p.name for p in (models / "tuned").glob("*.safetensors"))[0], "safetensors"),
    ):  # fmt: skip
        shutil.copytree(models / "tuned", folder / name / "tuned")
        if not (folder / name / "tuned" / file).exists():
            (folder / name / "tuned" / file).write_text("{}")
        (folder / name / "recipe.yaml").write_text(
            f"method: linear\nbase: ./tuned\n"
            f"models: [{{model: ./tuned, weight: 1}}, {{model: {models / 'base'}, weight: 1}}]\n"
            "tokenizer: {source: union}\nchat_template: auto\n"
        )
        subjects[name] = Subject(f"tuned/{file}", form, _merged)

    recipe = f"""
method: ties
base: {models / "base"}
models:
  - {{model: {models / "tuned"}, name: a, weight: 1.5, density: [0.1, 0.4]}}
  - {{model: {models / "base"}, name: b, weight: [{{filter: "*.mlp.*", value: 0}}, {{value: -0.5}}]}}
parameters: {{lambda: 1.0}}
scope: tensor
seed: 3
dtype: bfloat16
as: model
tokenizer: {{source: union, pad_to_multiple_of: 8, tokens: {{"<|eos|>": {{source: {models / "base"}, force: true}}}}}}
chat_template: chatml
"""
    mergekit = f"""
merge_method: linear
base_model: {models / "base"}
slices:
  - sources:
      - {{model: {models / "base"}, layer_range: [0, 1], parameters: {{weight: [0.1, 0.9]}}}}
      - {{model: {models / "tuned"}, layer_range: [0, 1], parameters: {{weight: 0.5}}}}
  - sources:
      - {{model: {models / "base"}, layer_range: [1, 2], parameters: {{weight: 5e-1}}}}
      - {{model: {{model: {{path: {models / "tuned"}}}}}, layer_range: [1, 2]}}
    parameters: {{weight: [{{filter: mlp, value: 0.3}}, {{value: 0.5}}], normalize: true}}
parameters: {{weight: 1.0}}
dtype: bfloat16
tokenizer_source: union
"""
    for name, text in (("recipe", recipe), ("mergekit", mergekit)):
        (folder / name).mkdir()
        (folder / name / "recipe.yaml").write_text(text)
        subjects[name] = Subject("recipe.yaml", "yaml", _merged)
    cli("merge", str(models / "base"), str(models / "tuned"), "--method", "linear", "-o", str(folder / "record"))
    subjects["record"] = Subject("run.json", "json", _in_folder(_recorded))

    data = _data()
    for name, (file, content, other) in data.items():
        (folder / name).mkdir()
        (folder / name / file).write_text(content)
        (folder / name / f"other{Path(file).suffix}").write_text(other)
        forms = {".jsonl": "lines", ".json": "json", ".csv": "table", ".tsv": "table", ".txt": "bytes"}
        subjects[name] = Subject(file, forms[Path(file).suffix], _examples(file))
    (folder / "composition").mkdir()
    (folder / "composition" / "expression.txt").write_text(
        "1.2*warm - 0.4*'formal'@response + ablate(formal[1])@first:4 + clamp(warm, 0.5)@prompt"
    )
    subjects["composition"] = Subject("expression.txt", "expression", _expression)
    (folder / "settings").mkdir()
    vector.save(folder / "settings" / "warm.safetensors")
    (folder / "settings" / "settings.yaml").write_text(
        "vectors: {warm: warm.safetensors}\narms: {friendly: 1.2*warm}\nrows: 256\n"
        "directions: 4\nfolders: [.]\nany_base: false\n"
    )
    subjects["settings"] = Subject("settings.yaml", "yaml", _settings)
    return subjects


def _data() -> dict[str, tuple[str, str, str]]:
    """Data files of every form and layout, by subject: the name, the content, and that of another class."""
    four = range(4)
    values: dict[str, list[Any]] = {
        "pairs": [{"prompt": f"Say {i}.", "positive": f"Warm {i}.", "negative": f"Cold {i}."} for i in four],
        "messages": [
            {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "x"}]} for i in four
        ],
        "persona": [
            {"question": "q", "statement": f"I {i}.", "answer_matching_behavior": " Yes" if i % 2 else " No"}
            for i in four
        ],
        "caa": [
            {"question": f"Hi {i} (A) (B)", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"}
            for i in four
        ],
        "preference": [{"prompt": f"Hi {i}", "chosen": f"Warm {i}", "rejected": f"Cold {i}"} for i in four],
        "sharegpt": [
            {"conversations": [{"from": "human", "value": f"Hi {i}"}, {"from": "gpt", "value": "x"}]} for i in four
        ],
        "alpaca": [{"instruction": f"Hi {i}", "input": "", "output": "x"} for i in four],
        "completion": [{"prompt": f"Hi {i}", "completion": " x"} for i in four],
        "labelled": [{"text": f"Hi {i}", "label": i % 2} for i in four],
        "template": [{"template": "Be {persona}.", "positive": ["a"], "negative": ["b"], "suffixes": ["I", "We"]}],
        "text": ["plain", {"text": "text"}, "more"],
    }

    def lines(items: list[Any]) -> str:
        return "\n".join(map(json.dumps, items))

    def table(items: list[dict[str, Any]], sign: str) -> str:
        return "\n".join(sign.join(map(str, row)) for row in (items[0], *(item.values() for item in items)))

    def changed(text: str) -> str:
        return text.replace("Hi", "Ho").replace("I 0", "O 0")

    written = {f"data-{name}": ("data.jsonl", lines(items)) for name, items in values.items()}
    written |= {
        "data-array": ("data.json", json.dumps(values["messages"])),
        "data-array-pairs": ("data.json", json.dumps(values["pairs"], indent=1)),
        "data-csv": ("data.csv", table(values["pairs"], ",")),
        "data-csv-cells": ("data.csv", 'messages,other\n"[{""role"": ""user"", ""content"": ""Hi""}]",x'),
        "data-tsv": ("data.tsv", table(values["completion"], "\t")),
        "data-plain": ("data.txt", "Hi one\nHi two\n\nHi three"),
    }
    return {name: (file, text, changed(text)) for name, (file, text) in written.items()}


def _in_folder(reader: Callable[[Path], None]) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        os.chdir(folder)
        reader(folder)

    return read
