"""A model before it is written: a job of the merge engine for each tensor, and the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from merges.engine.jobs import Copy, Job
from merges.engine.pool import Pool
from merges.engine.readers import Array, Dense, Reader
from merges.engine.tensor_task import Block, Computation, Input, TensorTask
from merges.inputs.decoder import text_settings
from merges.inputs.sources import Source


@dataclass(frozen=True)
class PendingModel:
    """The jobs of the merge engine by tensor name, and the configuration. No weights have been read."""

    jobs: Mapping[str, Job]
    config: Mapping[str, Any]
    pool: Pool

    def with_changes(self, jobs: Mapping[str, Job], **config: Any) -> PendingModel:
        """A copy with these jobs added, or replaced by name, and these settings of the configuration."""
        return replace(self, jobs={**self.jobs, **jobs}, config={**self.config, **config})

    @property
    def text(self) -> Mapping[str, Any]:
        """The settings of the text decoder, also inside a vision-language model."""
        return text_settings(self.config)

    def with_text_settings(self, **settings: Any) -> PendingModel:
        """A copy with these settings of the text decoder."""
        return replace(self, config=_replaced(self.config, self.text, settings))

    def read(self, name: str) -> np.ndarray:
        """A tensor of the source in memory, float32; for small tensors."""
        from merges.engine.readers import read_whole

        job = self.jobs[name]
        return read_whole(Dense(job.entry) if isinstance(job, Copy) else job.inputs[0].reader)

    def tensor_from(self, name: str, reader: Reader, dtype: str = "F32") -> TensorTask:
        """A tensor written as the reader gives it, in `dtype`."""
        source = Input(name, reader, False)
        return TensorTask(name, reader.shape, dtype, (source,), None, AS_IT_STANDS, self.pool)

    def constant(self, name: str, values: np.ndarray) -> TensorTask:
        """A float32 tensor from values in memory; for small tensors."""
        return self.tensor_from(name, Array(np.asarray(values, np.float32)))


def _replaced(config: Mapping[str, Any], part: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with settings changed in one of its parts."""
    if config is part:
        return {**config, **settings}
    return {
        key: _replaced(value, part, settings) if isinstance(value, dict) else value for key, value in config.items()
    }


def _as_it_stands(_tensor: TensorTask, block: Block, _prepared: Any) -> np.ndarray:
    return block.values[0]


AS_IT_STANDS = Computation(space="weight", combine=_as_it_stands)


def pending_from(source: Source, pool: Pool) -> PendingModel:
    """The model of `source`, unchanged."""
    return PendingModel({name: Copy(name, entry) for name, entry in source.entries.items()}, source.config, pool)
