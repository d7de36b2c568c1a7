"""What works on each architecture, measured on its pico model, and the table of docs/serve.md that says so.

The references are written here, from what transformers reports and from hooks on the modules that take the stream, so
that a wrong block or a wrong output can't agree with itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import tables
import torch
from torch import Tensor, nn

from probes.capture.activations import activations, packable
from probes.models import loading, residual
from probes.models.tokens import Tokens
from probes.steered import CACHES, steered
from steer.folding import fold as folding
from steer.folding import proof
from steer.training import result, student
from steer.training.requests import Lora
from vectors import architectures
from vectors.errors import SteerError
from vectors.steering import SteeringVector

CLOSE = 1e-4  # of float32 values, relative to the largest
PARITY = Path(__file__).parent / "serving" / "engine" / "parity.json"
# One model of each architecture; those with a short window are others of the same.
ALL = tuple(
    name
    for name in (*pico.NAMES, *pico.MORE, *pico.WRAPPERS, *pico.UNKNOWN, *pico.SERVED, *pico.STREAMS)
    if not name.endswith("-window") and name != "nemotron-h"  # names of its adapters are not those of its checkpoint
)
IDS = torch.tensor(pico.sequences(1, 9, 9, seed=5))
HEADER = "| architecture | model | extract | try | serve | fold | train |\n|---|---|---|---|---|---|---|"


def text_type(name: str) -> str:
    """The model type of the text decoder."""
    found: str = settings_of(name).get_text_config(decoder=True).model_type
    return found


def changes(name: str, times: int = 1) -> dict[str, int]:
    """The settings of a pico model: those that are served need a wider stream, an inserted block a feed-forward."""
    wide = {"hidden_size": 128} if name in pico.SERVED else {}
    return wide if times == 1 else {**wide, "intermediate_size": times * wide.get("hidden_size", pico.HIDDEN)}


def settings_of(name: str) -> Any:
    """The configuration of the pico model."""
    return pico.config(name, **changes(name))


NAMES = tuple(name for name in ALL if text_type(name) in architectures.ARCHITECTURES)


def kind_of(name: str) -> str:
    """The model type of the text decoder, and of the whole around it."""
    text, whole = text_type(name), settings_of(name).model_type
    return f"`{text}`" if text == whole else f"`{whole}` around `{text}`"


@functools.cache
def model_of(name: str) -> Any:
    """The pico model, built once; nothing here changes it."""
    return pico.build(name, **changes(name))


def direction(size: int, seed: int = 1) -> Tensor:
    """A random direction [hidden] of length 3."""
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return 3 * drawn / drawn.norm()


def takers(model: Any) -> list[nn.Module]:
    """The modules that take the outputs of the blocks, in order: the blocks from the second on, and the final norm."""
    stack = residual.decoder(model)
    lists = [m for m in stack.children() if isinstance(m, nn.ModuleList) and len(m) == pico.LAYERS]
    norms = [m for n, m in stack.named_children() if n in ("norm", "ln_f", "final_layer_norm", "final_layernorm")]
    norms += [m for n, m in stack.named_children() if n in ("embedding_norm", "norm_f")]
    assert len(lists) == 1, [type(m).__name__ for m in stack.children()]
    assert norms, [n for n, _ in stack.named_children()]
    return [*lists[0][1:], norms[-1]]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= CLOSE * max(1.0, float(b.abs().max())))


@contextlib.contextmanager
def at_takers(model: Any, change: Any) -> Iterator[None]:
    """Within: the first input of each taker goes through `change(layer, states)`, which may return None."""

    def hook(layer: int) -> Any:
        def call(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            inside = args[0] if args else kwargs["hidden_states"]
            changed = change(layer, inside)
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        return call

    with contextlib.ExitStack() as handles:
        for layer, module in enumerate(takers(model)):
            handles.callback(module.register_forward_pre_hook(hook(layer), with_kwargs=True).remove)
        yield


def extract(name: str) -> str:
    """How examples are measured: packed or padded; "no: ..." where they are not. Raises AssertionError if wrongly."""
    model = model_of(name)
    try:
        residual.blocks(model)
    except SteerError as error:
        return f"no: {error.problems[0].rpartition(': ')[2]}"
    examples = [Tokens(ids, list(range(1, len(ids)))) for ids in ([7, 30, 99, 12, 5], [7, 30, 99, 12, 8, 9, 200])]
    means = torch.zeros(pico.LAYERS, len(examples), residual.hidden_size(model))
    for row, example in enumerate(examples):
        taken: dict[int, Tensor] = {}
        with torch.no_grad(), at_takers(model, lambda layer, states: taken.__setitem__(layer, states)):  # noqa: B023
            states = model(input_ids=torch.tensor([example.ids]), output_hidden_states=True, use_cache=False)
        for layer in range(pico.LAYERS):
            means[layer, row] = taken[layer][0, 1:].mean(0)
        # Mamba's begin behind the first block, not with the embeddings.
        first = 0 if torch.equal(states.hidden_states[0], taken[0]) else 1
        for layer, reported in enumerate(states.hidden_states[first:-1]):
            assert close(reported, taken[layer]), f"{name}: hidden state {layer + 1}"
    pooled = activations(model, examples, list(range(pico.LAYERS)))
    with contextlib.closing(pooled.spill):
        for layer in range(pico.LAYERS):
            assert close(pooled.spill.read(layer), means[layer]), f"{name}: layer {layer}"
    if residual.architecture(model) is None:
        return "padded, proved at load"
    return "packed" if packable(model, 7) else "padded"


def attempt(name: str) -> str:
    """Whether steering through hooks is exact: "exact", or why it is refused."""
    model = model_of(name)
    move, last = direction(residual.hidden_size(model)), pico.LAYERS - 1
    vector = SteeringVector({1: move, last: 2 * move})
    try:
        residual.blocks(model)
    except SteerError as error:
        return f"no: {error.problems[0].rpartition(': ')[2]}"

    def run(ids: Tensor, **options: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids, **options)

    def by_hand(layer: int, states: Tensor) -> Tensor | None:
        if layer == 1:
            return states + move
        unit = move / move.norm()
        return states - (states @ unit)[..., None] * unit if layer == last else None

    with at_takers(model, by_hand):
        expected = run(IDS, use_cache=False).logits
    composition = f"warm[1] + ablate(warm[{last}])"
    with steered(model, composition, vectors={"warm": vector}, any_base=True):
        computed = run(IDS, use_cache=False).logits
    assert close(computed, expected), f"{name}: {float((computed - expected).abs().max())}"
    assert not close(computed, run(IDS, use_cache=False).logits), f"{name}: nothing was steered"

    def in_steps() -> Tensor:
        output = run(IDS[:, :6], use_cache=True)
        cache = {key: output[key] for key in CACHES if key in output}
        return torch.cat([run(token[None, None], **cache, use_cache=True).logits for token in IDS[0, 6:]])

    with at_takers(model, lambda layer, states: states + move if layer == 1 and states.shape[1] == 1 else None):
        expected = in_steps()
    with steered(model, "warm[1]@response", vectors={"warm": vector}, any_base=True):
        computed = in_steps()
    assert close(computed, expected), f"{name}: with a cache"
    return "exact"


def fold(name: str, folder: Path) -> str:
    """What of a composition can be folded into the weights: additions, ablations, both; or why not."""
    source = pico.save(folder / "model", name, **changes(name, times=3 if name in NAMES else 1))
    size = settings_of(name).get_text_config(decoder=True).hidden_size
    vectors = {"warm": SteeringVector({1: direction(size)}), "calm": SteeringVector({2: direction(size, 2)})}
    parts = {"additions": "warm[1]", "ablations": "ablate(calm)"}
    try:  # both at once, which takes half the time
        via = folded(source, " + ".join(parts.values()), vectors, folder / "both")
        return f"additions ({via}); ablations"
    except proof.ProofError:
        raise
    except SteerError:
        pass
    done, refused = [], {}
    for part, composition in parts.items():
        try:
            via = folded(source, composition, vectors, folder / part)
        except proof.ProofError:
            raise
        except SteerError as error:
            refused[part] = error.problems[-1].removeprefix("no --via layer: ").rpartition("can't be folded: ")[2]
            continue
        done.append(f"{part} ({via})" if via else part)
    if len(set(refused.values())) == 1 and not done:
        return f"no: {next(iter(refused.values()))}"
    return "; ".join([*done, *(f"no {part}: {reason}" for part, reason in refused.items())])


def folded(source: Path, composition: str, vectors: dict[str, SteeringVector], output: Path) -> str:
    """Fold a composition, which proves it on what is written; returns the way of its additions. Raises SteerError."""
    request = folding.FoldSettings(
        composition, str(source), output, vectors, prompts=["the warm and"], vllm=False, any_base=True
    )
    with pytest.MonkeyPatch.context() as shorter:
        shorter.setattr(proof, "TOKENS", 3)  # of each response that the proof compares
        shorter.setattr(proof, "ANSWER_TOKENS", 1)  # of those that the report shows
        report = folding.fold(request)
    assert report["proof"]["verdict"] == "equal", source
    via: str = report["via"].get("addition", "").removeprefix("via ").partition(",")[0]
    return via


def train(name: str, folder: Path) -> str:
    """Whether a step of distillation into an adapter is in the weights that are written; or why it is refused."""
    source = pico.save(folder / "model", name, **changes(name))
    base = folding.open_source(str(source))
    model = loading.load(str(source), "cpu", "float32").model
    plain = logits(model)
    try:
        with steered(model, {1: direction(residual.hidden_size(model))}):
            teacher = logits(model).log_softmax(-1)
        adapted = student.adapted(model, Lora(rank=4, alpha=8, first=1), seed=0)
    except SteerError as error:
        peft = "has none of the modules" in error.problems[0]
        return "no: PEFT takes none of its modules" if peft else f"no: {error.problems[0].rpartition(': ')[2]}"
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=3e-2)
    for _ in range(2):
        optimiser.zero_grad()
        loss = nn.functional.kl_div(
            logits(adapted, True).log_softmax(-1), teacher, reduction="batchmean", log_target=True
        )
        loss.backward()
        optimiser.step()
    assert all(parameter.grad is not None for parameter in trainable), f"{name}: an adapter that nothing trains"
    saved = result.save_trained(adapted, folder, base, full=False)
    (folder / "out").mkdir()
    result.write("model", saved, base, folder / "out", threads=1)
    written = logits(loading.load(str(folder / "out"), "cpu", "float32").model)
    expected = logits(adapted)
    assert close(written, expected), f"{name}: {float((written - expected).abs().max())}"
    assert not close(written, plain), f"{name}: nothing was trained"
    experts = any(p.ndim == 3 for b in residual.blocks(adapted.get_base_model()) for n, p in b.named_parameters()
                  if "expert" in n)  # fmt: skip
    return "yes, adapters beside the experts" if experts else "yes"


def logits(model: Any, gradients: bool = False) -> Tensor:
    with torch.set_grad_enabled(gradients):
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def serve(name: str) -> str:
    """What the parity tests of the engine wrote about the architecture, on vLLM's V1 and V2 runner.

    "differs" is where steered vLLM, and stock vLLM too, are not within the tolerance of transformers.
    """
    measured = json.loads(PARITY.read_text(encoding="utf-8")) if PARITY.is_file() else {}
    entry = measured.get(name)
    if entry is None:
        return "not measured"
    if "v2" not in entry:
        return f"{_served(entry)}; V2 not measured"
    first, second = _served(entry), _served({"dtype": entry.get("dtype"), **entry["v2"]})
    if first == second:
        return f"{first} on V1 and V2" if first.startswith("exact") else first
    return f"V1: {first}; V2: {second}"


def _served(entry: dict[str, Any]) -> str:
    if entry["serve"] == "exact":
        return "exact" if entry["dtype"] == "float32" else f"exact in {entry['dtype']}"
    reason = str(entry["reason"]).partition(": RuntimeError")[0]
    return reason if entry["serve"] == "differs" else f"no: {reason}"


def row(name: str, folder: Path) -> str:
    """The row of the table. What is measured wrong raises AssertionError."""
    cells = [extract(name), attempt(name), serve(name), fold(name, folder / "fold"), train(name, folder / "train")]
    return f"| {kind_of(name)} | {name} | {' | '.join(cells)} |"


def rows_in(document: str) -> dict[str, list[str]]:
    """The cells of the rows of the table in a document, by the name of the pico model."""
    inside = document.partition(tables.BEGIN)[2].partition(tables.END)[0]
    lines = [line.strip("| ").split(" | ") for line in inside.strip().splitlines()[2:]]
    return {cells[1]: cells for cells in lines}


def with_table(document: str, folder: Path) -> str:
    """The document with the table, measured now."""
    rows = [row(name, folder / name) for name in sorted(ALL, key=kind_of)]
    return tables.between_marks(document, "\n".join([HEADER, *rows]))


def with_serving(document: str) -> str:
    """The document with the column of serving as it was measured last; nothing else is measured."""
    rows = [[*cells[:4], serve(name), *cells[5:]] for name, cells in rows_in(document).items()]
    return tables.between_marks(document, "\n".join([HEADER, *(f"| {' | '.join(cells)} |" for cells in rows)]))
