"""From checked sources to jobs: what each tensor of the result is computed from. All problems are collected."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merges.engine.floats import MERGEABLE
from merges.engine.jobs import Copy, Job
from merges.engine.method import MergeMethod
from merges.engine.pool import Pool
from merges.engine.readers import Dense, Reader, Zero
from merges.engine.tensor_task import Input, TensorTask
from merges.inputs.decoder import decoder, other_stacks
from merges.inputs.heads import EMBEDDINGS, HEADS
from merges.inputs.sources import Source
from merges.recipes import slices, vocabulary
from merges.recipes.parameters import resolve
from merges.recipes.recipe import Part, Recipe
from merges.recipes.stacked_config import stacked_config
from vectors.errors import SteerError, first_of, guess, shortened
from vectors.registry.options import Option
from vectors.storage.files import digest_bytes
from vectors.weights import Entry, mapped, read_header

Levels = tuple[Mapping[str, Any], ...]  # options, from the most specific to the most general
VOCABULARY = "vocabularies differ: "  # begins a problem
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Builder:
    """Builds the jobs; a class because problems are collected across its methods."""

    def __init__(
        self, recipe: Recipe, method: MergeMethod, sources: list[Source], base: Source | None, main: Source | None,
        pool: Pool, union: vocabulary.Union | None,
    ) -> None:  # fmt: skip
        self.recipe, self.method, self.sources, self.base, self.main = recipe, method, sources, base, main
        self.pool, self.union = pool, union
        self.problems: list[str] = []
        self.missing: dict[str, list[str]] = {}  # required options without a value, and where
        self.misfits: dict[str, list[str]] = {}  # tensors that do not fit, by the input
        self.parts = list(recipe.parts)
        self.keys = _keys(recipe, sources)
        self.shared: dict[str, Any] = {}
        self.scope: list[TensorTask] = []
        self.extras = [self._open_extras(part) for part in self.parts]
        self.frame: Mapping[str, Entry] = main.entries if main is not None else {}
        shapes: dict[str, tuple[int, ...]] = {}
        for source in sources:
            shapes |= source.shapes if not self.frame else {}
        self.shapes = {name: entry.shape for name, entry in self.frame.items()} or shapes
        self.decoder = decoder(main.config, self.shapes) if main is not None else decoder({}, self.shapes)

    def hint(self) -> str:
        """The hint for the collected problems."""
        if self.missing:
            return "mergekit has no default for it: set it under the file's parameters, or add an entry without filter"
        if any(problem.startswith(VOCABULARY) for problem in self.problems):
            return "models with different vocabularies need a recipe with `tokenizer: {source: union}`"
        return "merge models that were fine-tuned from one base"

    def notes(self) -> list[str]:
        """A note where slices or gradients are used and the model has layers outside the text decoder."""
        others = other_stacks(self.decoder, self.shapes)
        given = [self.recipe.options, *(part.options for part in self.parts)]
        gradients = any(_is_gradient(value) for options in given for value in options.values())
        if not others or not (self.recipe.slices or gradients):
            return []
        decoder_layers = f"{self.decoder.prefix}0 to {self.decoder.depth - 1}"
        how = "stay as they are" if self.recipe.slices else "take the first value of a gradient"
        return [f"the layers of the text decoder are {decoder_layers}; those of {shortened(others)} {how}"]

    def build(self) -> list[Job]:
        """A job for each tensor of the result, sorted by name; also fills `problems`."""
        jobs = self._stacked() if self.recipe.slices else self._alike()
        if self.recipe.scope == "global":
            self.scope += [job for job in jobs if isinstance(job, TensorTask)]
            self._check_scope()
        self.problems += [
            f"the required parameter {option} has no value for {shortened(places)}"
            for option, places in self.missing.items()
        ]
        return jobs

    def _alike(self) -> list[Job]:
        """The jobs for models with the same tensors."""
        for source in self.sources:
            if source.kind == "model":
                lacking = sorted(set(self.shapes) - set(source.entries))
                extra = sorted(set(source.entries) - set(self.shapes))
                self._list(lacking, f"{source.reference} lacks")
                self._list(extra, f"{source.reference} has tensors that the others lack:")
            else:
                self._list(
                    sorted(set(source.shapes) - set(self.shapes)),
                    f"{source.reference} changes tensors that the base lacks:",
                )
        jobs = [self._job(name) for name in sorted(self.shapes)]
        for misfits in self.misfits.values():
            self.problems += first_of(misfits)
        return [job for job in jobs if job is not None]

    def _list(self, names: list[str], what: str) -> None:
        if names:
            self.problems.append(f"{what} {shortened(names)}")

    def _check_scope(self) -> None:
        if not self.scope:
            return
        first = self.scope[0]
        for option in ("density", "gamma"):
            if option in first.each and any(not np.array_equal(t.each[option], first.each[option]) for t in self.scope):
                self.problems.append(f"with scope: global, {option} must be the same for all tensors")

    def _job(self, name: str) -> Job | None:
        entry = self.frame.get(name)
        if entry is not None and entry.dtype not in MERGEABLE:
            return self._fixed(name, entry)
        shape = self.shapes[name]
        if self.union is not None and name in self.union.parameters:
            shape = (self.union.size, *shape[1:])
        sources = [s for s in self.sources if s.kind != "model" or name in s.entries]
        if len(sources) < len(self.sources):
            return None  # already reported
        untouched = self.recipe.as_ == "model" and not any(s.changes(name) for s in self.sources)
        untouched &= self.main is None or self.main.adapter is None
        if entry is not None and untouched and DTYPES.get(self.recipe.dtype, entry.dtype) == entry.dtype:
            return Copy(name, entry)
        inputs = []
        for part, source, key in zip(self.parts, self.sources, self.keys, strict=True):
            source_shape = source.shapes.get(name)
            if (
                source_shape is not None
                and source_shape != self.shapes[name]
                and not (self.union and name in self.union.parameters)
            ):
                of_tokens = name.endswith((*EMBEDDINGS, *HEADS)) and source_shape[1:] == self.shapes[name][1:]
                what = VOCABULARY if of_tokens else ""
                owner = self.main.reference if self.main else "the first"
                self.misfits.setdefault(source.reference, []).append(
                    f"{what}{name} is {list(source_shape)} in {source.reference}, {list(self.shapes[name])} in {owner}"
                )
                continue
            if source_shape is None and source.kind == "model":
                self.misfits.setdefault(source.reference, []).append(
                    f"{name} is {source.entries[name].dtype} in {source.reference}, which can't be merged with "
                    f"{entry.dtype if entry else 'floating-point numbers'}"
                )
                continue
            reader, is_delta = source.reader(name, shape)
            if self.union is not None and name in self.union.parameters:
                reader = self.union.reader(name, source, reader, is_delta)
            inputs.append(Input(part.name, reader, is_delta, _key(key, name)))
        if len(inputs) < len(self.sources):
            return None
        base = self.base.reader(name, shape)[0] if self.base is not None else None
        if self.union is not None and self.base is not None and base is not None and name in self.union.parameters:
            base = self.union.reader(name, self.base, base, False)
        levels = [(name, (part.options, self.recipe.options)) for part in self.parts]
        return self._tensor(
            name, shape=shape, inputs=inputs, base=base, entry=entry, position=self._position(name), levels=levels,
            shared=(self.recipe.options,),
        )  # fmt: skip

    def _tensor(
        self, name: str, *, shape: tuple[int, ...], inputs: list[Input], base: Reader | None, entry: Entry | None,
        position: float, levels: Sequence[tuple[str, Levels]], shared: Levels,
    ) -> TensorTask:  # fmt: skip
        """The task of one parameter.

        `entry` is the parameter in the main model. `position`, in [0, 1], is where gradients are evaluated. `levels`
        are, for each input, the parameter's name in it and the options that may apply, from the most specific to the
        most general; `shared` those that apply to all inputs together.
        """
        each: dict[str, np.ndarray] = {}
        plain: dict[str, Any] = {}
        for option in self.method.options:
            if option.each:
                values = [
                    self._value(option, own_name, option_levels, position, f"{tensor_input.name} at {own_name}")
                    for tensor_input, (own_name, option_levels) in zip(inputs, levels, strict=True)
                ]
                each[option.name] = np.array(values, float)
            else:
                plain[option.name] = self._value(option, name, shared, position, name)
        if "weight" in each and not each["weight"].any() and base is None:
            self.problems.append(f"all weights are zero at {name}")
        elif "weight" in each and self.method.divides_by_weights(plain) and abs(each["weight"].sum()) < 1e-12:
            self.problems.append(f"the weights sum to zero at {name}, and {self.recipe.method} divides by their sum")
        as_delta = self.recipe.as_ == "vector"
        tensor = TensorTask(
            name, shape, self._dtype(name, entry), tuple(inputs), base, self.method, self.pool, each, plain,
            self._extra(name, shape), as_delta, self.scope if self.recipe.scope == "global" else (), self.shared,
        )  # fmt: skip
        tensor.patch = self._patch(tensor)
        for problem in self.method.problems_of(tensor):
            if problem not in self.problems:
                self.problems.append(problem)
        return tensor

    def _value(self, option: Option, name: str, levels: Levels, position: float, at: str) -> Any:
        """The value of an option; the method's default where no level has one, unless the recipe requires it."""
        value = resolve(option.name, levels, name, position)
        if value is None and option.name in self.recipe.required:
            self.missing.setdefault(option.name, []).append(at)
        if value is None:
            return option.default
        problem = option.problem_of(value) if isinstance(option.default, int) else None
        if problem and (sentence := f"{problem}, at {at}") not in self.problems:
            self.problems.append(sentence)
        return value

    def _dtype(self, name: str, entry: Entry | None) -> str:
        dtype = self._dtype_of_inputs(name, entry)
        return "F32" if dtype == "F64" else dtype

    def _dtype_of_inputs(self, name: str, entry: Entry | None) -> str:
        if self.recipe.as_ == "vector":
            return "F32"
        if self.recipe.dtype != "auto":
            return DTYPES[self.recipe.dtype]
        only = self.sources[0].vector if len(self.sources) == 1 else None
        if only is not None and only.exact and name in only.parameters:
            return only.dtype(name)
        if self.base is not None and entry is not None:
            return entry.dtype
        dtypes = {s.entries[name].dtype for s in self.sources if s.kind == "model" and name in s.entries}
        return dtypes.pop() if len(dtypes) == 1 else entry.dtype if entry is not None and not dtypes else "F32"

    def _patch(self, tensor: TensorTask) -> tuple[np.ndarray, np.ndarray] | None:
        """The elements that base + delta would round wrongly, if an exact vector is applied alone and unscaled."""
        only = self.sources[0].vector if len(self.sources) == 1 else None
        plain = (
            self.recipe.method == "task_arithmetic" and tensor.options["lambda"] == 1 and tensor.each["weight"][0] == 1
        )
        if only is None or not plain or tensor.as_delta or not only.exact:
            return None
        positions = only.part(tensor.name, "residual.positions")
        if positions is None or only.dtype(tensor.name) != tensor.dtype:
            return None
        bits = mapped(only.entries[f"{tensor.name}:residual.bits"])
        stored = bits.view(np.float32) if tensor.dtype == "F32" else bits.astype(np.uint16)
        return only.positions(tensor.name, "residual.positions"), stored

    def _fixed(self, name: str, entry: Entry) -> Copy | None:
        """The copy of a tensor that is not floating-point, which must be the same in all inputs."""
        if entry.dtype not in ("I64", "I32", "I16", "I8", "U8", "BOOL", "U16", "U32", "U64"):
            self.problems.append(f"{name} is {entry.dtype}, which can't be merged")
            return None
        others = []
        for source in self.sources:
            other = source.entries.get(name)
            if other is not None and (other.dtype, other.shape) != (entry.dtype, entry.shape):
                self.problems.append(
                    f"{name} is {other.dtype} {list(other.shape)} in {source.reference}, "
                    f"not {entry.dtype} {list(entry.shape)}"
                )
            elif other is not None and other.file != entry.file:
                others.append(other)
        if self.recipe.as_ != "vector":
            return Copy(name, entry, tuple(others))  # which compares the contents
        if not all(np.array_equal(mapped(other), mapped(entry)) for other in others):
            self.problems.append(f"{name} is {entry.dtype}, not floating-point, and differs between the inputs")
        return None

    def _position(self, name: str) -> float:
        layer = self.decoder.layer(name)
        return 0.0 if layer is None else layer / (self.decoder.depth - 1) if self.decoder.depth > 1 else 1.0

    def _open_extras(self, part: Part) -> dict[str, dict[str, Entry]]:
        entries: dict[str, dict[str, Entry]] = {}
        for extra in (statistic.name for statistic in self.method.statistics):
            try:
                entries[extra] = read_header(Path(os.path.expanduser(str(part.options.get(extra)))))[0]
            except SteerError as error:
                self.problems += [f"{extra} of {part.name}: {problem}" for problem in error.problems]
                entries[extra] = {}
        return entries

    def _extra(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[Reader, ...]]:
        result: dict[str, tuple[Reader, ...]] = {}
        for extra, shape_of, required in self.method.statistics:
            wanted = shape_of(shape)
            readers: list[Reader] = []
            for part, opened in zip(self.parts, self.extras, strict=True):
                entry = opened[extra].get(name)
                if wanted is None or (entry is None and not required):
                    readers = []
                    break
                if entry is None or entry.shape != wanted or entry.dtype not in MERGEABLE:
                    actual = "is missing" if entry is None else f"is {entry.dtype} {list(entry.shape)}"
                    self.problems.append(f"{extra} of {part.name}: {name} {actual}, {list(wanted)} is needed")
                    readers.append(Zero(wanted))
                else:
                    readers.append(Dense(entry))
            result[extra] = tuple(readers)
        return result

    def _stacked(self) -> list[Job]:
        """The jobs for slices. For methods on deltas, the base as a source only selects its layers to subtract."""
        entries = self.recipe.slices
        models = {source.reference: source for source in [*self.sources, *([self.base] if self.base else [])]}
        named = {source.model for entry in entries for source in entry.sources}
        for reference in sorted((named | {entry.base for entry in entries if entry.base}) - set(models)):
            self.problems.append(f"a slice names {reference}, which is not among the models{guess(reference, models)}")
        if any(source.kind != "model" for source in self.sources):
            self.problems.append("slices can be taken from models only, not from vectors or adapters")
        if len({part.model for part in self.parts}) < len(self.parts):
            self.problems.append("with slices, each model can be listed only once")
        if self.problems:
            return []
        stacks = {
            reference: slices.Model(tuple(source.entries), decoder(source.config, source.entries))
            for reference, source in models.items()
        }
        self.problems += slices.problems_of_slices(entries, stacks)
        if self.main is not None:
            self.problems += stacked_config(self.main.config, entries, self.main.reference)[1]
        if self.problems:
            return []
        stacked = slices.stacked_tensors(entries, stacks)
        jobs = [
            self._stacked_job(tensor, models[tensor.base] if tensor.base else self.base)
            for tensor in sorted(stacked, key=lambda tensor: tensor.name)
        ]
        return [job for job in jobs if job is not None]

    def _stacked_job(self, tensor: slices.StackedTensor, base_source: Source | None) -> Job | None:
        by_reference = {
            part.model: (part, source, key)
            for part, source, key in zip(self.parts, self.sources, self.keys, strict=True)
        }
        union = self.union if self.union is not None and tensor.name in self.union.parameters else None
        from_base = base_source.reference if base_source is not None and self.method.space != "weight" else None
        inputs, levels = [], []
        first: Entry | None = None
        for reference, name in tensor.sources.items():
            if reference == from_base:
                continue
            part, source, key = by_reference[reference]
            entry = source.entries.get(name)
            shape = None if entry is None else entry.shape[1:] if union else entry.shape
            if entry is None or (first is not None and shape != (first.shape[1:] if union else first.shape)):
                self.problems.append(f"{reference} has no {name} with the shape of {tensor.name}")
                return None
            first = first or entry
            reader, is_delta = source.reader(name, entry.shape)
            if union is not None:
                reader = union.reader(name, source, reader, is_delta)
            inputs.append(Input(part.name, reader, is_delta, _key(key, tensor.name)))
            levels.append((name, (tensor.options[reference], tensor.shared, part.options, self.recipe.options)))
        least, most = self.method.inputs
        if first is None or len(inputs) < least or (most is not None and len(inputs) > most):
            self.problems.append(f"{self.recipe.method} can't take the {len(inputs)} source(s) of {tensor.name}")
            return None
        if first.dtype not in MERGEABLE:
            return Copy(tensor.name, first)
        base: Reader | None = None
        if base_source is not None:
            name = tensor.sources.get(base_source.reference, next(iter(tensor.sources.values())))
            base_entry = base_source.entries.get(name)
            if base_entry is None or (base_entry.shape != first.shape and union is None):
                self.problems.append(f"the base {base_source.reference} has no {name} with the shape of {tensor.name}")
                return None
            base = base_source.reader(name, base_entry.shape)[0]
            base = base if union is None else union.reader(name, base_source, base, False)
        shape = first.shape if union is None else (union.size, *first.shape[1:])
        return self._tensor(
            tensor.name, shape=shape, inputs=inputs, base=base, entry=first, position=tensor.position, levels=levels,
            shared=(tensor.shared, self.recipe.options),
        )  # fmt: skip


def _is_gradient(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_gradient(value.get("value"))
    return isinstance(value, list) and any(
        _is_gradient(entry) if isinstance(entry, Mapping) else isinstance(entry, int | float) for entry in value
    )


def _keys(recipe: Recipe, sources: list[Source]) -> list[str]:
    """The random key of each input, from the seed and its content, so that neither order nor names matter."""
    seen: dict[str, int] = {}
    keys = []
    for source in sources:
        occurrence = seen[source.identity] = seen.get(source.identity, -1) + 1
        keys.append(f"{recipe.seed} {source.identity} {occurrence}")
    return keys


def _key(key: str, name: str) -> int:
    return int(digest_bytes(f"{key} {name}".encode())[7:23], 16)
