"""What the conditions of a composition read and decide while a model runs: the reference for faster implementations.

A condition reads the output of its block, after what the composition does there, in float32 (`probe.reading_of`).
`@when` is decided by the state of the last token of the prompt, and holds for the whole response; `@while` by the state
of each token of the response, for that token. Sections are decided by the tokens (`probes.models.markers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from probes.models import residual
from probes.models.markers import Markers, Place, in_section, inside, problems_of_sections
from vectors.errors import UsageError
from vectors.expression import Condition, Scope
from vectors.probe import Probe, Readout, reading_of
from vectors.steering import SteeringVector


class Positions(Protocol):
    """What is asked of the running pass."""

    current: Tensor | None  # int64 [batch, tokens]; -1 for padding
    prompt_lengths: Tensor | None  # int64 [batch]
    sequences: int  # how many times a pass has begun new sequences
    ids: Tensor | None  # int64 [batch, tokens]; None for a pass on embeddings

    def covered(self, scope: Scope | None) -> Tensor:
        """Which tokens of the running pass a scope covers, bool [batch, tokens]; never padding."""


class Decided(NamedTuple):
    """What a condition decided in one row: of `read` values (their mean is `value`), it held for `held`.

    Of `@when` one value is read, at the last token of the prompt; of `@while` one at every token of the response in the
    scopes of its terms that went through the model, which the last one never does. Of a section these tokens are
    counted, and `value` is NaN.
    """

    condition: str
    value: float
    held: int
    read: int


class _Pass(NamedTuple):
    """What a condition that each token decides has read in a pass, [batch, tokens] each: of sections, bool values."""

    in_response: Tensor
    in_scope: Tensor  # of the terms that have the condition
    values: Tensor


class Decisions:
    """The values that conditions read, and what follows from them; it lives across the passes of a generation."""

    def __init__(
        self,
        sources: Mapping[Condition, Probe | SteeringVector],
        sections: Sequence[Condition] = (),
        markers: Markers | None = None,
        scopes: Mapping[Condition, Sequence[tuple[int | None, Scope | None]]] | None = None,
    ) -> None:
        """`sections` are the conditions without a source; `scopes` those of the terms that have a condition, each with
        its row of the batch (None: all), by default all tokens. Raises UsageError for sections without markers.
        """
        if problems := problems_of_sections(sections, markers):
            raise UsageError(problems, "give them: --steer-markers thinking=BEGIN,END, or markers=Markers(...)")
        self.sections, self.markers = list(dict.fromkeys(sections)), markers or Markers()
        self.places: dict[Condition, Place] = {}  # of sections: where the sequences are behind the last pass
        self.scopes = scopes or {}
        self.readouts: dict[int, dict[Condition, Readout]] = {}
        for condition, source in sources.items():
            layer, readout = reading_of(source, condition.layer)
            self.readouts.setdefault(layer, {})[condition] = readout
        self.sequences = 0
        self.prompts: dict[Condition, Tensor] = {}  # of @when: float32 [batch], NaN before it is read
        self.tokens: dict[Condition, list[_Pass]] = {}  # of the others

    def begin(self, positions: Positions) -> None:
        """Begin a pass, whose positions are known. Raises UsageError for sections of a pass without token ids."""
        assert positions.current is not None
        assert positions.prompt_lengths is not None
        if positions.sequences != self.sequences:
            self.sequences = positions.sequences
            self.prompts, self.tokens, self.places = {}, {}, {}
        current, ids = positions.current, positions.ids
        for section in self.sections:
            if ids is None:
                raise UsageError(f"{section} is decided by tokens, and the pass has only embeddings", "pass input_ids")
            before, markers = self.places.get(section), self.markers.of(section.kind)
            if before is None and bool((current > 0).any(1).logical_and(~(current == 0).any(1)).any()):
                raise UsageError(
                    f"{section} is decided by all tokens up to it, of which the first are part of no pass",
                    "run the whole prompt inside the context",
                )
            lies_inside, self.places[section] = inside(ids, current >= 0, before, markers)
            self._keep(section, positions, in_section(section.kind, lies_inside))

    def _keep(self, condition: Condition, positions: Positions, values: Tensor) -> None:
        """Keep what a condition has read at each token of a pass, on the device where it was read."""
        assert positions.current is not None
        assert positions.prompt_lengths is not None
        in_response = positions.current >= positions.prompt_lengths[:, None]
        in_scope = torch.zeros_like(in_response)
        for row, scope in self.scopes.get(condition, [(None, None)]):
            rows = slice(None) if row is None else slice(row, row + 1)
            in_scope[rows] |= positions.covered(scope)[rows]
        passes = self.tokens.setdefault(condition, [])
        passes.append(_Pass(in_response.to(values.device), in_scope.to(values.device), values))

    def hook(self, layer: int, positions: Positions) -> Callable[..., None]:
        """The forward hook of a block that is read. It changes nothing."""

        def call(_block: nn.Module, _inputs: Any, output: Any) -> None:
            states = residual.output_of(output)
            assert positions.current is not None
            assert positions.prompt_lengths is not None
            current = positions.current.to(states.device)
            lengths = positions.prompt_lengths.to(states.device)[:, None]
            for condition, readout in self.readouts[layer].items():
                values = readout.scores(states.float())  # [batch, tokens]
                if condition.kind == "when":
                    known = self.prompts.get(condition, values.new_full((len(values),), math.nan))
                    last = current == lengths - 1
                    self.prompts[condition] = torch.where(last.any(1), values.masked_fill(~last, 0.0).sum(1), known)
                else:
                    self._keep(condition, positions, values)

        return call

    def holds(self, condition: Condition, covered: Tensor) -> Tensor:
        """Whether a condition holds, bool [batch, 1] or [batch, tokens] of the running pass.

        `covered`, bool [batch, tokens], is where it matters. Raises UsageError where a prompt's last token was never
        part of a pass.
        """
        if condition.is_section:
            return self.tokens[condition][-1].values
        if condition.never:  # which may be read above the term
            return torch.zeros_like(covered)
        if condition.kind == "while":
            return torch.as_tensor(condition.holds(self.tokens[condition][-1].values))
        values = self.prompts[condition][:, None]
        if bool((values.isnan() & covered.to(values.device)).any()):
            raise UsageError(
                f"{condition} is decided at the last token of the prompt, which is part of no pass",
                "run the prompt, or its last token at least, inside the context",
            )
        return torch.as_tensor(condition.holds(values))

    def of_row(self, row: int, tokens: int | None = None) -> list[Decided]:
        """What each condition decided in one row of the batch, for the first `tokens` tokens of its response."""
        decided = []
        read = [condition for layer in self.readouts.values() for condition in layer]
        for condition in [*read, *self.sections]:
            values = torch.empty(0)
            if condition in self.prompts:
                values = self.prompts[condition][row : row + 1]
            elif condition in self.tokens:
                in_response, in_scope, values = (
                    torch.cat([part[row] for part in parts], -1) for parts in zip(*self.tokens[condition], strict=True)
                )
                in_scope, values = in_scope[in_response], values[in_response]
                if tokens is not None:
                    in_scope, values = in_scope[: max(0, tokens - 1)], values[: max(0, tokens - 1)]
                values = values[in_scope]
            mean = float(values.double().mean()) if len(values) and not condition.is_section else math.nan
            held = values if condition.is_section else condition.holds(values)
            decided.append(Decided(str(condition), mean, int(held.sum()), len(values)))
        return decided
