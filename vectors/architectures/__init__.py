"""What each known architecture is: one row per architecture (table.py), read by every part that has to know.

Extraction and hooks read where the blocks are and what mixes tokens, folding reads where a checkpoint writes to the
residual stream, training which linear modules take no adapter. Serving reads nothing here: it proves where vLLM's
blocks hold the stream on the loaded model.
"""

from __future__ import annotations

from vectors.architectures.description import Architecture as Architecture
from vectors.architectures.description import Checkpoint as Checkpoint
from vectors.architectures.table import ARCHITECTURES as ARCHITECTURES


def find(model_type: str) -> Architecture | None:
    """The row of a `model_type`, which may be that of a vision-language model around a known text decoder, or None."""
    return ARCHITECTURES.get(model_type) or ARCHITECTURES.get(_WRAPPED.get(model_type, ""))


_WRAPPED = {whole: text for text, row in ARCHITECTURES.items() for whole in row.wrappers}
