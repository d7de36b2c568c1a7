"""From a recipe to jobs: headers are opened and checked, and all problems reported, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from merges import methods
from merges.engine.jobs import AHEAD, Job
from merges.engine.method import MergeMethod
from merges.engine.pool import Pool
from merges.engine.tensor_task import CHUNK, GROUP, TensorTask
from merges.inputs.checkpoints import quantiser
from merges.inputs.sources import Source, open_all
from merges.recipes import vocabulary
from merges.recipes.agreement import tokenizers
from merges.recipes.agreement.inputs import compare, stand_in
from merges.recipes.assembly import Builder
from merges.recipes.layout import LARGEST, cut, size
from merges.recipes.recipe import Recipe
from merges.recipes.validation import require_valid
from vectors.errors import ModelError, SteerError, UsageError, collecting, raise_together
from vectors.events import Event, OnEvent, ignore
from vectors.storage.files import canonical_json, digest_json
from vectors.weights import SIZES

MEMORY = 2 << 30  # bytes beyond mapped files
INTERPRETER = 96 << 20  # bytes: Python, NumPy and the compiled loops, with a margin
TORCH = 1 << 30  # bytes of host memory: torch with a GPU
CHECKING = "checking the inputs"
VERSION = 2  # of the arithmetic: increased when the same recipe gives different bytes


@dataclass(eq=False)
class Plan:
    """A checked recipe with its opened inputs and the jobs that compute the result, known from headers alone."""

    recipe: Recipe
    sources: tuple[Source, ...]  # in the order of the recipe's parts
    base: Source | None
    main: Source | None  # the model whose configuration and tokenizer the result takes
    jobs: list[Job]
    shards: list[list[Job]]
    pool: Pool
    memory: int  # peak memory beyond mapped files, in bytes
    vocabulary: vocabulary.Union | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """The size of the result on disk, without headers."""
        return sum(size(job) for job in self.jobs)

    @property
    def digest(self) -> str:
        """The digest of everything that determines the bytes of the result.

        That is the recipe, the identities of the inputs, their tokenizers, the layout in shards and the version of the
        arithmetic.
        """
        return digest_json([self.former_digest, *([] if self.recipe.as_ == "vector" else self._tokenizers)])

    @cached_property
    def _tokenizers(self) -> list[str]:
        """The digests of the tokenizers and chat templates of all models."""
        models = [*([self.main] if self.main else []), *(s for s in self.sources if s.kind == "model")]
        return [tokenizers.digest(model.path) for model in models]

    @property
    def former_digest(self) -> str:
        """The digest without the tokenizers, as records of earlier versions have it."""
        identities = {part.model: source.identity for part, source in zip(self.recipe.parts, self.sources, strict=True)}
        if self.base is not None:
            identities |= {self.base.reference: self.base.identity}
        value = self.recipe.renamed(identities).value() | {"base": self.base.identity if self.base else None}
        # Files of statistics are left out: a path does not identify them, and the record holds their digests.
        statistic_names = [statistic.name for statistic in methods.find(self.recipe.method).statistics]
        value["models"] = [{k: v for k, v in entry.items() if k not in statistic_names} for entry in value["models"]]
        layout = [[job.name for job in shard] for shard in self.shards]
        return digest_json([VERSION, value, layout])


def plan(
    recipe: Recipe, *, memory: int = MEMORY, threads: int | None = None, shard: int = LARGEST, device: str = "cpu",
    on_event: OnEvent = ignore,
) -> Plan:  # fmt: skip
    """Check a recipe against the headers of all its inputs, and plan the merge.

    `memory` is the most bytes it may use beyond mapped files, `shard` the largest size of an output file in bytes.
    `device` (cpu, cuda or cuda:N) computes the elements; the result is the same on all of them, to the bit. `on_event`
    also receives the notes of the plan. Raises UsageError or ModelError with all problems of the recipe, its document,
    the device and the inputs: what can be checked in spite of the others is.
    """
    errors: list[SteerError] = []
    torch_device = None
    with collecting(errors):
        require_valid(recipe)
    with collecting(errors):
        torch_device = _device(device)
    on_event(Event(CHECKING))
    method = methods.available().get(recipe.method)
    opened, base, unopened = open_all([part.model for part in recipe.parts], recipe.base)
    errors += unopened
    refused = bool(errors)  # then only what does not depend on the method and its options can be checked
    sources = [source for source in opened if source is not None]
    if not refused and method is not None:
        recipe, sources = _canonical(recipe, sources, method)
    tried = stand_in(recipe, method, opened, base) if refused else (recipe, sources)
    compared = compare(recipe, method, sources, base, complete=not unopened)
    if compared.error is not None:
        errors.append(compared.error)
    if tried is None or not compared.comparable:
        raise_together(errors)
    assert tried is not None
    recipe, sources = tried
    method = methods.find(recipe.method)
    notes, main = [*recipe.notes, *compared.notes], compared.main
    uses_base = base if refused else compared.base
    for source in sources:
        trained = source.adapter.base_name if source.adapter is not None else None
        adapter_base = source.base or source
        base_name = adapter_base.model.name if adapter_base.model is not None else None
        if trained and base_name and trained != base_name:
            notes.append(
                f"{source.reference} names {trained} as the model it was trained on; it is applied to {base_name}"
            )
    quantised_by = quantiser(main.config) if main is not None and main.kind == "model" else None
    if quantised_by is not None and main is not None:
        notes.append(
            f"{main.reference} names a quantiser ({quantised_by}) and has plain weights: the result names none"
        )
    union = None
    if recipe.tokenizer is not None:
        assert main is not None
        with collecting(errors):
            union = vocabulary.union(recipe.tokenizer, main, [main, *(s for s in sources if s.kind == "model")])
            notes += union.notes(main)
        if union is None and not refused:
            raise_together(errors)
    pool = Pool(threads, torch_device)
    builder = Builder(recipe, method, sources, uses_base, main, pool, union)
    jobs = builder.build()
    notes += _trimmed_alone(recipe, jobs)
    if builder.problems:
        errors.append(ModelError(builder.problems, builder.hint()))
    if refused or builder.problems:
        raise_together(errors)
    notes += builder.notes()
    need = _memory(jobs, pool.threads, torch_device)
    if need > memory and pool.threads > 1:
        fit = next((n for n in range(pool.threads, 0, -1) if _memory(jobs, n, torch_device) <= memory), 1)
        pool, need = Pool(fit, torch_device), _memory(jobs, fit, torch_device)
        for job in jobs:
            if isinstance(job, TensorTask):
                job.pool = pool
        notes.append(f"using {fit} thread(s) to stay within the memory limit")
    if need > memory:
        whole = any(isinstance(job, TensorTask) and job.unit == "tensor" for job in jobs)
        errors.append(
            ModelError(
                f"{recipe.method} needs {need / 2**20:.0f} MiB{' for the largest tensor' * whole}, more than the "
                f"{memory / 2**20:.0f} MiB allowed",
                f"--memory {-(-need // 2**20)}MiB" + ", or use a method that works in pieces" * whole,
            )
        )
    raise_together(errors)
    for note in notes:
        on_event(Event(CHECKING, message=note))
    return Plan(recipe, tuple(sources), base, main, jobs, cut(jobs, shard), pool, need, union, notes)


def _device(name: str) -> Any:
    """The torch.device of that name, or None for the CPU, which needs no torch. Raises UsageError."""
    if name == "cpu":
        return None
    try:
        from merges.engine import gpu
    except ImportError:
        raise UsageError(f"the device {name!r} needs torch, which is not installed", "pip install torch") from None
    return gpu.find(name)


def _canonical(recipe: Recipe, sources: list[Source], method: MergeMethod) -> tuple[Recipe, list[Source]]:
    """The inputs, sorted by content if the method is symmetric, so that the user's order changes no bit."""
    if not method.symmetric or recipe.slices:
        return recipe, sources
    pairs = sorted(
        zip(recipe.parts, sources, strict=True), key=lambda pair: (pair[1].identity, canonical_json(pair[0].options))
    )
    return replace(recipe, parts=tuple(part for part, _ in pairs)), [source for _, source in pairs]


def _trimmed_alone(recipe: Recipe, jobs: list[Job]) -> list[str]:
    """A note where a trimming method has a single input, so that it only drops a part of its delta."""
    shares = [float(job.each["density"][0]) for job in jobs if isinstance(job, TensorTask) and "density" in job.each]
    if len(recipe.parts) > 1 or not shares or min(shares) >= 1:
        return []
    return [
        f"{recipe.method} of one input elects nothing, and drops part of its delta: density {min(shares):g}; "
        "1 keeps all of it"
    ]


def _memory(jobs: list[Job], threads: int, device: Any) -> int:
    """Peak memory in bytes beyond mapped files: the interpreter, buffers of each thread, finished pieces, counters."""
    most = 0
    for job in jobs:
        if not isinstance(job, TensorTask):
            continue
        inputs, chunk, group = (
            len(job.inputs),
            min(job.step(CHUNK), max(job.count, 1)),
            min(job.step(GROUP), max(job.count, 1)),
        )
        per_thread = chunk * (4 * (inputs + 2) + 8 * 4) + AHEAD * inputs * (5 << 18)
        if job.unit == "tensor":
            per_thread += job.count * 8 * (3 * inputs + 6)
        if device is not None:
            per_thread += (inputs + 1) * 4 * group
        most = max(most, threads * per_thread + (3 * threads + 2) * group * SIZES[job.dtype])
    return INTERPRETER + (TORCH if device is not None else 0) + most
