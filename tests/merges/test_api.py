"""Merging folders: exact, deterministic, atomic, resumable and verifiable."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import folders
import numpy as np
import pytest
import reference
import torch
from folders import recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merges import api
from merges.api import diff
from merges.outputs import shards
from merges.outputs.verification import read_record
from merges.recipes.document import parse, read
from merges.recipes.expression import from_expression
from merges.recipes.plan import plan
from merges.recipes.recipe import Part, Recipe
from vectors.errors import ArtifactError, ModelError
from vectors.expression import parse as expression
from vectors.task import TaskVector


def expected_ties(density: float, scope: str) -> dict[str, np.ndarray]:
    """Per-tensor or global TIES of a, b and c by the reference, as float64."""
    base, models = folders.read(Path("base")), [folders.read(Path(n)) for n in "abc"]
    names = sorted(base)
    d = {n: np.stack([(m[n].float() - base[n].float()).numpy() for m in models]).astype(float) for n in names}
    if scope == "global":
        flat = np.concatenate([d[n].reshape(3, -1) for n in names], 1)
        merged = reference.ties(flat, np.ones(3), np.full(3, density))
        cuts = np.cumsum([base[n].numel() for n in names])[:-1]
        parts = {n: p.reshape(base[n].shape) for n, p in zip(names, np.split(merged, cuts), strict=True)}
    else:
        parts = {n: reference.ties(d[n], np.ones(3), np.full(3, density)) for n in names}
    return {n: base[n].double().numpy() + parts[n] for n in names}


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("density", [0.2, 0.03, 1.0])
def test_ties_on_disk_is_the_reference_rounded_once(here: Path, scope: str, density: float) -> None:
    api.merge(recipe("a", "b", "c", options={"density": density}, scope=scope), "out")
    found = folders.read(here / "out")
    for name, wanted in expected_ties(density, scope).items():
        np.testing.assert_array_equal(
            folders.bits(found[name]), folders.bits(torch.from_numpy(wanted).to(torch.bfloat16))
        )


def test_order_threads_and_shards_change_nothing(here: Path) -> None:
    for method, options in [
        ("ties", {}),
        ("dare_ties", {"density": 0.5}),
        ("karcher", {}),
        ("task_arithmetic", {}),
        ("model_stock", {}),
    ]:
        weighted = ["a=1", "b=0.5", "c=2"] if method not in ("karcher", "model_stock") else ["a", "b", "c"]
        first = api.merge(recipe(*weighted, method=method, options=options), f"{method}-1", threads=1)
        shuffled = recipe(*reversed(weighted), method=method, options=options)
        second = api.merge(shuffled, f"{method}-2", threads=4)
        assert first["outputs"] == second["outputs"]
        api.merge(recipe(*weighted, method=method, options=options), f"{method}-3", threads=3, shard=900)
        assert len(list((here / f"{method}-3").glob("*.safetensors"))) > 3
        assert folders.same(here / f"{method}-1", here / f"{method}-3")


def test_a_random_method_depends_on_its_seed_alone(here: Path) -> None:
    bytes_ = []
    for i, seed in enumerate((0, 0, 1)):
        api.merge(recipe("a", "b", method="dare_linear", seed=seed), f"out{i}")
        bytes_.append((here / f"out{i}" / "model.safetensors").read_bytes())
    assert bytes_[0] == bytes_[1] != bytes_[2]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 99),
    dtypes=st.tuples(*[st.sampled_from(["F32", "BF16", "F16"])] * 2),
    shards=st.integers(1, 4),
    scale=st.sampled_from([1e-6, 0.05, 30.0]),
)
def test_an_exact_vector_restores_every_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, dtypes: tuple[str, str], shards: int, scale: float
) -> None:
    folder = tmp_path_factory.mktemp("exact")
    base = folders.weights(seed, dtypes[0])
    after = {n: t.float().to(folders.DTYPES[dtypes[1]]) for n, t in folders.tuned(base, seed + 1, scale).items()}
    draw = random.Random(seed)
    for name in sorted(after):  # what rounding would lose: tiny beside large, signed zeros, denormals
        flat, below = after[name].view(-1), base[name].view(-1)
        for value in (0.0, -0.0, 1e-7, -1e-30):
            place = draw.randrange(flat.numel())
            flat[place] = value
            below[place] = draw.choice([0.0, -0.0, 1.0, 300.0, 1e-7])
    folders.write(folder / "base", base)
    folders.write(folder / "tuned", after, shards=shards)
    vector = diff(str(folder / "base"), str(folder / "tuned"), folder / "v.safetensors", shard=draw.choice([None, 700]))
    vector.verify()
    api.merge(
        Recipe("task_arithmetic", (Part(str(folder / "v.safetensors"), "v"),), str(folder / "base")), folder / "again"
    )
    assert folders.same(folder / "tuned", folder / "again")


def test_what_the_fine_tuning_left_alone_is_not_stored(here: Path) -> None:
    base = folders.weights(0)
    changed = base | {"lm_head.weight": folders.tuned(base, 9)["lm_head.weight"]}
    folders.write(here / "d", changed)
    vector = diff("base", "d", "v.safetensors")
    assert set(vector.parameters) == {"lm_head.weight"}
    assert vector.unchanged == set(base) - {"lm_head.weight"}
    api.merge(recipe("v.safetensors", method="task_arithmetic"), "out")
    assert folders.same(here / "d", here / "out")


@pytest.mark.parametrize("storage", ["bf16", "lowrank:3", "sparse:0.25"])
def test_other_storages_state_their_error(here: Path, storage: str) -> None:
    exact, vector = diff("base", "a", "v.safetensors"), diff("base", "a", "w.safetensors", storage_=storage)
    vector.verify()
    lost = total = greatest = 0.0
    for name in exact.parameters:
        off = exact.delta(name).astype(float) - vector.delta(name)
        lost, total, greatest = (
            lost + (off**2).sum(),
            total + (exact.delta(name).astype(float) ** 2).sum(),
            max(greatest, np.abs(off).max()),
        )
        if storage == "lowrank:3" and off.ndim == 2:  # Eckart and Young: the tail of the singular values
            tail = np.linalg.svd(exact.delta(name).astype(float), compute_uv=False)[3:]
            assert np.linalg.norm(off) == pytest.approx(np.linalg.norm(tail), rel=1e-5)
    error = vector.metadata["storage"]["error"]
    assert error["relative"] == pytest.approx(np.sqrt(lost / total), rel=1e-6)
    assert error["greatest"] == pytest.approx(greatest, rel=1e-6)
    api.merge(recipe("w.safetensors", method="task_arithmetic", dtype="float32"), "out")
    base, found = folders.read(here / "base"), folders.read(here / "out")
    for name in vector.parameters:
        np.testing.assert_allclose(
            found[name].numpy(), base[name].float().numpy() + vector.delta(name), rtol=1e-6, atol=1e-7
        )


def test_a_vector_says_the_same_as_the_model_it_came_from(here: Path) -> None:
    for name in "ab":
        diff("base", name, f"{name}.safetensors")
    api.merge(recipe("a", "b", options={"density": 0.3}), "models")
    api.merge(recipe("a.safetensors", "b.safetensors", options={"density": 0.3}, base=None), "vectors")
    assert folders.same(here / "models", here / "vectors")


def test_the_same_vector_has_the_same_bytes(here: Path) -> None:
    diff("base", "a", "v.safetensors", threads=1)
    diff("base", "a", "w.safetensors", threads=3)
    assert (here / "v.safetensors").read_bytes() == (here / "w.safetensors").read_bytes()


def test_removing_any_of_five_contributions_gives_the_merge_that_never_had_it(here: Path) -> None:
    base = folders.weights(0)
    for seed in range(5):
        folders.write(here / f"m{seed}", folders.tuned(base, 20 + seed))
        diff("base", f"m{seed}", f"v{seed}.safetensors")
    composed = from_expression(
        expression("v0 + 0.6*v1 - 0.5*v2 + v3 - 2*v4"), {f"v{i}": f"v{i}.safetensors" for i in range(5)}, "base"
    )
    api.merge(composed, "all")
    numbers = (1, 0.6, -0.5, 1, -2)
    for i, weight in enumerate(numbers):
        rest = {f"v{j}": w for j, w in enumerate(numbers) if j != i}
        parts = tuple(Part(f"{name}.safetensors", name, {"weight": float(w)}) for name, w in rest.items())
        never = Recipe("task_arithmetic", parts, "base")
        api.merge(never, f"never{i}")
        undone = parse(read_record(here / "all")["recipe"]).without(f"v{i}")
        api.merge(undone, f"undone{i}")
        assert (here / f"undone{i}" / "model.safetensors").read_bytes() == (
            here / f"never{i}" / "model.safetensors"
        ).read_bytes()
        # Subtracting instead would not have been exact.
        whole, delta = folders.read(here / "all"), TaskVector.open(here / f"v{i}.safetensors")
        name = "model.embed_tokens.weight"
        subtracted = (whole[name].float() - weight * torch.from_numpy(delta.delta(name))).to(torch.bfloat16)
        assert not torch.equal(subtracted, folders.read(here / f"undone{i}")[name])


def test_a_merged_vector_is_the_merge_itself(here: Path) -> None:
    api.merge(recipe("a", "b", as_="vector"), "v.safetensors")
    api.merge(recipe("v.safetensors", method="task_arithmetic"), "applied")
    api.merge(recipe("a", "b"), "direct")
    assert folders.same(here / "applied", here / "direct")


def test_each_file_of_a_merged_vector_is_recorded_with_its_own_digest(here: Path) -> None:
    record = api.merge(recipe("a", "b", as_="vector"), "v.safetensors", shard=1000)
    assert len(record["outputs"]) > 2
    for name, digest in record["outputs"].items():
        assert digest == "sha256:" + hashlib.sha256((here / name).read_bytes()).hexdigest()


def test_zero_weights_give_the_base_to_the_bit(here: Path) -> None:
    api.merge(recipe("a", "b=0", method="task_arithmetic", options={"lambda": 0}), "out")
    assert folders.same(here / "base", here / "out")


def test_a_killed_merge_goes_on_where_it_was(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe("a", "b", "c")
    api.merge(made, "whole", shard=900)
    written: list[str] = []
    original = shards.write

    def dying(path: Path, content: Any, show: Any) -> str:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        return original(path, content, show)

    monkeypatch.setattr(shards, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        api.merge(made, "out", shard=900)
    assert not (here / "out").exists()
    (partial,) = here.glob(".out.*.partial")
    damaged = partial / written[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")  # the journal alone is not believed
    again: list[str] = []

    def counting(path: Path, content: Any, show: Any) -> str:
        again.append(path.name)
        return original(path, content, show)

    monkeypatch.setattr(shards, "write", counting)
    api.merge(made, "out", shard=900)
    total = len(list((here / "whole").glob("*.safetensors")))
    assert written[0] in again
    assert len(again) == total - 2
    assert not list(here.glob(".out.*"))
    assert folders.same(here / "whole", here / "out")


def test_verify_finds_a_changed_output_a_changed_input_and_a_lost_file(here: Path) -> None:
    api.merge(recipe("a", "b"), "out")
    api.verify("out")
    (here / "out" / "tokenizer_config.json").unlink()
    weights_file = here / "out" / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        api.verify("out")
    assert any("tokenizer_config.json is missing" in p for p in caught.value.problems)
    assert any("model.safetensors is not what was written" in p for p in caught.value.problems)
    api.merge(recipe("a", "b"), "out2")
    save_file(folders.tuned(folders.weights(0), 77), here / "a" / "model.safetensors")
    with pytest.raises(ArtifactError, match="the input a has changed: its digest is"):
        api.verify("out2")


def test_gradients_and_filters_reach_the_right_tensors(here: Path) -> None:
    graded = Recipe(
        "task_arithmetic",
        (
            Part("a", "a", {"weight": [0, 1]}),
            Part("b", "b", {"weight": [{"filter": "*.mlp.*", "value": 2}, {"value": 0}]}),
        ),
        "base",
        dtype="float32",
    )
    api.merge(graded, "out")
    base, a, b, out = (folders.read(here / n) for n in ("base", "a", "b", "out"))
    for name, found in out.items():
        layer = int(name.split(".")[2]) / 2 if ".layers." in name else 0.0
        d = [(m[name].float() - base[name].float()).double() for m in (a, b)]
        wanted = base[name].double() + layer * d[0] + (2.0 if ".mlp." in name else 0.0) * d[1]
        assert torch.equal(found, wanted.float())


def test_a_tied_head_is_handled_once(here: Path) -> None:
    base = folders.weights(0)
    tied = {"config": {"tie_word_embeddings": True}}
    for name, seed in (("tb", None), ("ta", 1)):
        made = base if seed is None else folders.tuned(base, seed)
        if name == "ta":
            made["lm_head.weight"] = made["model.embed_tokens.weight"].clone()
        else:
            made = {n: t for n, t in made.items() if n != "lm_head.weight"}
        folders.write(here / name, made, **tied)  # type: ignore[arg-type]
    api.merge(recipe("ta", method="task_arithmetic", base="tb"), "out")
    assert "lm_head.weight" not in folders.read(here / "out")


def test_integers_are_copied_and_must_agree(here: Path) -> None:
    base = folders.weights(0)
    ids = {"model.position_ids": torch.arange(5)}
    folders.write(here / "ib", base | ids)
    folders.write(here / "ia", folders.tuned(base, 1) | ids)
    folders.write(here / "ic", folders.tuned(base, 1) | {"model.position_ids": torch.arange(5) + 1})
    api.merge(recipe("ia", base="ib"), "out")
    assert torch.equal(folders.read(here / "out")["model.position_ids"], torch.arange(5))
    with pytest.raises(ModelError, match=r"model.position_ids can't be merged"):
        api.merge(recipe("ic", base="ib"), "out2")
    assert not (here / "out2").exists()


def test_memory_is_bounded_by_the_flag_and_does_not_grow_with_the_model(here: Path) -> None:
    made = plan(recipe("a", "b"), threads=8)
    assert plan(recipe("a", "b"), threads=8, memory=made.memory - 1).pool.threads < 8
    with pytest.raises(ModelError, match=r"ties needs .* MiB, more than the 0 MiB allowed"):
        plan(recipe("a", "b"), memory=1000)


def test_a_recipe_survives_yaml_and_its_record(here: Path) -> None:
    (here / "r.yaml").write_text(
        "method: ties\nbase: base\nmodels:\n  - {model: a, weight: 1, density: [0.1, 0.4]}\n  - {model: b, name: bee}\n"
        "parameters: {lambda: 0.5}\nscope: tensor\nseed: 3\n"
    )
    made = read(here / "r.yaml")
    assert [p.name for p in made.parts] == ["a", "bee"]
    assert parse(made.value()) == made
    api.merge(made, "out")
    again = read(here / "out" / "run.json")
    api.merge(again, "out2")
    assert folders.same(here / "out", here / "out2")
    assert replace(again, parts=made.parts) == made


def test_tensors_of_no_one_and_strange_names_are_merged_by_every_method(here: Path) -> None:
    from merges import methods

    odd = {
        "model.scalar": torch.tensor(0.5), "model.one": torch.ones(1), "model.empty": torch.zeros(0, 8),
        "model.\u00e9\u6f22 \U0001f600.weight": torch.arange(9.0).reshape(3, 3),
    }  # fmt: skip
    base = folders.weights(0, "F32", layers=1) | odd
    folders.write(here / "ob", base)
    for seed in (1, 2):
        folders.write(here / f"o{seed}", folders.tuned(base, seed), shards=seed)
    for name, method in methods.available().items():
        if method.statistics:
            continue
        parts = ("o1",) if method.inputs[1] == 1 else ("o1", "o2")
        api.merge(recipe(*parts, method=name, base="ob"), f"out-{name}", threads=1)
        found = folders.read(here / f"out-{name}")
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in base.items()}
        api.merge(recipe(*parts, method=name, base="ob", as_="vector"), f"{name}.safetensors", threads=1)
    for storage in ("exact", "bf16", "lowrank:2", "sparse:0.3"):
        diff("ob", "o2", f"d-{storage[:4]}.safetensors", storage_=storage, threads=1).verify()
        api.merge(recipe(f"d-{storage[:4]}.safetensors", method="task_arithmetic", base="ob"), f"app-{storage[:4]}")
    assert folders.same(here / "app-exac", here / "o2")


def test_the_configuration_has_the_dtype_of_the_weights(here: Path) -> None:
    settings = {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "vocab_size": 20}}
    folders.write(here / "wide", folders.weights(0, "F32"), config=settings)
    for asked, wanted in (("auto", "float32"), ("float16", "float16")):
        api.merge(recipe("wide", method="linear", base=None, dtype=asked), f"out-{asked}")
        config = json.loads((here / f"out-{asked}" / "config.json").read_text())
        assert config["dtype"] == config["text_config"]["torch_dtype"] == wanted
        assert {t.dtype for t in folders.read(here / f"out-{asked}").values()} == {getattr(torch, wanted)}


def test_a_chat_template_is_kept_asked_for_or_agreed_on(here: Path) -> None:
    (here / "base" / "chat_template.jinja").unlink(missing_ok=True)
    told = json.loads((here / "base" / "tokenizer_config.json").read_text())
    told.pop("chat_template", None)
    (here / "base" / "tokenizer_config.json").write_text(json.dumps(told))
    template = "out{}/chat_template.jinja"
    api.merge(recipe("a", "b"), "out0")
    assert not (here / template.format(0)).exists()
    (here / "a" / "chat_template.jinja").write_text("{{ one }}")
    api.merge(recipe("a", "b"), "out1")
    assert (here / template.format(1)).read_text() == "{{ one }}"
    for name in "bc":
        (here / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ two }}"}))
    api.merge(recipe("a", "b", "c"), "out2")  # no agreement
    assert not (here / template.format(2)).exists()
    api.merge(recipe("a", "b", "c", chat_template="auto"), "out3")
    assert (here / template.format(3)).read_text() == "{{ two }}"
    api.merge(recipe("a", chat_template="{{ mine }}"), "out4")
    assert (here / template.format(4)).read_text() == "{{ mine }}"
    api.verify("out4")


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_an_input_with_density_zero_adds_nothing(here: Path, scope: str) -> None:
    parts = (Part("a", "a", {"density": 0.3}), Part("b", "b", {"density": 0.0}))
    api.merge(Recipe("ties", parts, "base", scope=scope), "out")
    api.merge(Recipe("ties", parts[:1], "base", scope=scope), "alone")
    assert folders.same(here / "out", here / "alone")
