"""A model folder in the making: what each of its tensors is made of, and its configuration. Nothing is read yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from merges.engine.jobs import Copy, Job
from merges.engine.pool import Pool
from merges.engine.readers import Array, Dense, Reader
from merges.engine.tensor_task import Block, Computation, Input, TensorTask
from merges.inputs.sources import Source


@dataclass(frozen=True)
class PendingModel:
    """The jobs of the merge engine by the name of their tensor, and the configuration beside them."""

    jobs: Mapping[str, Job]
    config: Mapping[str, Any]
    pool: Pool

    def with_changes(self, jobs: Mapping[str, Job], **config: Any) -> PendingModel:
        """With these jobs in place of, or beside, those of the same names, and these settings."""
        return replace(self, jobs={**self.jobs, **jobs}, config={**self.config, **config})

    def read(self, name: str) -> np.ndarray:
        """A small tensor of the source, float32 in its shape."""
        from merges.engine.readers import whole

        job = self.jobs[name]
        return whole(Dense(job.entry) if isinstance(job, Copy) else job.inputs[0].reader)

    def tensor_from(self, name: str, reader: Reader, dtype: str = "F32") -> TensorTask:
        """A tensor that a reader gives as it stands."""
        source = Input(name, reader, False)
        return TensorTask(name, reader.shape, dtype, (source,), None, AS_IT_STANDS, self.pool)

    def constant(self, name: str, values: np.ndarray) -> TensorTask:
        """A small float32 tensor that is in memory."""
        return self.tensor_from(name, Array(np.asarray(values, np.float32)))


def _as_it_stands(_tensor: TensorTask, block: Block, _prepared: Any) -> np.ndarray:
    return block.values[0]


AS_IT_STANDS = Computation(space="weight", combine=_as_it_stands)


def pending_from(source: Source, pool: Pool) -> PendingModel:
    """The model as it is."""
    return PendingModel({name: Copy(name, entry) for name, entry in source.entries.items()}, source.config, pool)
