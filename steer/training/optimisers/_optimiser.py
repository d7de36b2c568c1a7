"""The optimiser class of all built-ins: groups of named parameters, each updated by a rule.

A rule is a function that updates a batch of weights in place, given their gradients and states. It always works in
float32 (or wider); this class rounds to bfloat16 for every rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as functional_adamw

from probes.seeds import child_seed
from steer.training.optimisers import _rounding
from steer.training.optimisers._protocol import Parameters
from vectors.errors import ArtifactError, UsageError
from vectors.registry.options import Option

ROUNDING = Option(
    "rounding", "exact", "how bfloat16 weights keep small steps: exact, stochastic or nearest", choices=_rounding.MODES
)
BETA1 = Option("beta1", 0.9, "decay of the mean of gradients", low=0, high=0.9999)
BETA2 = Option("beta2", 0.999, "decay of the mean of their squares", low=0, high=0.999999)
EPS = Option("eps", 1e-8, "added to the root of the mean of squares", low=0, high=1)
ADAMW_OPTIONS = (BETA1, BETA2, EPS, ROUNDING)

FUSED = ("cpu", "cuda", "mps", "xpu")  # devices with torch's fused AdamW
BATCH = 1 << 24  # bfloat16 elements that are converted to float32 at a time, to bound the extra memory
EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe|lm_head|word_embeddings|shared)(\.|$)")


class Batch(NamedTuple):
    """What a rule updates: weights and gradients in float32 or wider, and the state of each as a dict."""

    names: list[str]
    weights: list[Tensor]
    gradients: list[Tensor]
    states: list[dict[str, Any]]
    group: dict[str, Any]


Rule = Callable[[Batch], None]


def rule_and_adamw(
    parameters: Parameters, name: str, rule: Rule, group: Mapping[str, Any], adam: Mapping[str, float],
    **settings: Any,
) -> Optimiser:  # fmt: skip
    """`rule` over the matrices between hidden states, AdamW over embeddings, the head, norms, biases and all else.

    `group` is the rule's parameter group without `params`; `adam` are AdamW's options; `settings` are passed to
    `Optimiser`.
    """
    between, rest = matrices(parameters)
    groups = [{**group, "params": between}, *adamw_groups(rest, group["weight_decay"], **adam)]
    return Optimiser(groups, {name: rule, "adamw": adamw}, **settings)


def matrices(parameters: Parameters) -> tuple[list[Any], list[Any]]:
    """Split named parameters into the matrices between hidden states, and the rest.

    The rest are embeddings, the head, norms, biases, and kernels and experts of more than two dimensions.
    """
    between: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    for name, parameter in parameters:
        inner = parameter.ndim == 2 and min(parameter.shape) > 1 and not EMBEDDING.search(name)
        (between if inner else rest).append((name, parameter))
    return between, rest


def adamw_groups(parameters: Parameters, weight_decay: float, **adam: float) -> list[dict[str, Any]]:
    """Parameter groups for the rule `adamw`, without weight decay for norms, biases and other vectors."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for name, parameter in parameters:
        parts[parameter.ndim < 2].append((name, parameter))
    return [
        {"name": "adamw", "rule": "adamw", "params": parts[0], "weight_decay": weight_decay, **adam},
        {"name": "adamw vectors", "rule": "adamw", "params": parts[1], "weight_decay": 0.0, **adam},
    ]


def adamw(batch: Batch) -> None:
    """torch's AdamW, fused where the device has it; moments in the dtype of the batch's weights."""
    for weight, state in zip(batch.weights, batch.states, strict=True):
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
    group, states = batch.group, batch.states
    fused_adamw(
        batch.weights,
        batch.gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [state["step"] for state in states],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        beta1=group["beta1"],
        beta2=group["beta2"],
        eps=group["eps"],
    )


def fused_adamw(
    weights: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    **settings: Any,
) -> None:
    """torch's functional AdamW, in place; the lists hold, for each weight, its gradient, moments and step count."""
    fused = all(weight.device.type in FUSED for weight in weights)
    functional_adamw(
        weights, gradients, means, squares, [], steps, fused=fused, amsgrad=False, maximize=False, **settings
    )


class Optimiser(torch.optim.Optimizer):
    """A torch optimiser over groups of named parameters, each updated by its own rule."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], rules: Mapping[str, Rule], *, lr: float, seed: int, rounding: str
    ) -> None:
        """`groups` have `name`, `rule`, `params` (pairs) and what the rule reads. Raises UsageError."""
        trained = []
        for group in groups:
            parameters = [(name, parameter) for name, parameter in group["params"] if parameter.requires_grad]
            if parameters:
                trained.append({**group, "params": parameters})
        _require_trainable(trained)
        self.rules = dict(rules)
        super().__init__(trained, {"lr": lr, "seed": seed, "rounding": rounding, "updates": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns what `closure` returns, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rule = self.rules[group["rule"]]
            for names, parameters in _batches(group):
                self._move(rule, group, names, parameters)
            group["updates"] += 1
        return loss

    def _move(self, rule: Rule, group: dict[str, Any], names: list[str], parameters: list[Any]) -> None:
        """Apply a rule to parameters that are all bfloat16, or all wider."""
        states = [self.state[parameter] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        if parameters[0].dtype != torch.bfloat16:
            rule(Batch(names, parameters, gradients, states, group))
            return
        weights = [_rounding.widened(p.detach(), s.get("remainder")) for p, s in zip(parameters, states, strict=True)]
        rule(Batch(names, weights, [gradient.float() for gradient in gradients], states, group))
        for name, parameter, state, weight in zip(names, parameters, states, weights, strict=True):
            if group["rounding"] == "exact":
                rounded, state["remainder"] = _rounding.split(weight)
            elif group["rounding"] == "stochastic":
                generator = torch.Generator(parameter.device)
                generator.manual_seed(child_seed(group["seed"], "rounding", name, group["updates"]))
                rounded = _rounding.stochastic(weight, generator)
            else:
                rounded = weight.bfloat16()
            parameter.copy_(rounded)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, matched by parameter name and bit for bit: torch would cast it to the weights' dtype.

        Raises ArtifactError when it has other parameters or groups.
        """
        saved = {group.get("name"): group for group in state_dict["param_groups"]}
        expected_names = {group["name"]: set(group["param_names"]) for group in self.param_groups}
        saved_names = {name: set(group.get("param_names", ())) for name, group in saved.items()}
        if expected_names != saved_names:
            problems = _differences(expected_names, saved_names)
            raise ArtifactError(problems, "it belongs to another run, model or optimiser")
        states = {
            name: state_dict["state"].get(index, {})
            for group in state_dict["param_groups"]
            for name, index in zip(group["param_names"], group["params"], strict=True)
        }
        groups = [
            {**saved[group["name"]], "params": list(range(len(group["params"]))), "param_names": group["param_names"]}
            for group in self.param_groups
        ]
        super().load_state_dict({"state": {}, "param_groups": groups})
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if states[name]:
                    self.state[parameter] = {key: _copied(value, parameter) for key, value in states[name].items()}


def _batches(group: dict[str, Any]) -> Iterator[tuple[list[str], list[Any]]]:
    """Names and parameters of a group that have gradients; those in bfloat16 in batches of bounded size."""
    wide: tuple[list[str], list[Any]] = ([], [])
    narrow: tuple[list[str], list[Any]] = ([], [])
    size = 0
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        if parameter.grad is None:
            continue
        if parameter.dtype != torch.bfloat16:
            wide[0].append(name)
            wide[1].append(parameter)
            continue
        if narrow[1] and size + parameter.numel() > BATCH:
            yield narrow
            narrow, size = ([], []), 0
        narrow[0].append(name)
        narrow[1].append(parameter)
        size += parameter.numel()
    yield from (part for part in (narrow, wide) if part[1])


def _copied(value: Any, parameter: Tensor) -> Any:
    """A copy of a saved value on the parameter's device; fused AdamW needs its step count there too."""
    return value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value


def _require_trainable(groups: list[dict[str, Any]]) -> None:
    """Raise UsageError with every parameter that can't be trained."""
    if not groups:
        raise UsageError("there is no parameter that needs a gradient", "unfreeze what is to be trained")
    problems = []
    for group in groups:
        for name, parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                problems.append(f"{name} is in {str(parameter.dtype).removeprefix('torch.')}, which can't be trained")
            if group["rule"] != "adamw" and hasattr(parameter, "device_mesh"):
                problems.append(f"{name} is sharded over devices, which the rule {group['rule']} does not know")
    if problems:
        raise UsageError(problems, "load the model in bfloat16 or float32; for sharded models choose adamw")


def _differences(expected: dict[str, set[str]], saved: dict[Any, set[str]]) -> list[str]:
    """How two sets of groups and their parameter names differ, one sentence per difference."""
    sentences = [f"the optimiser's state has no group {name!r}" for name in expected if name not in saved]
    sentences += [
        f"the optimiser's state has a group {name!r} that is not here" for name in saved if name not in expected
    ]
    for name in expected.keys() & saved.keys():
        for verb, names in (("lacks", expected[name] - saved[name]), ("has besides", saved[name] - expected[name])):
            if names:
                listed = ", ".join(sorted(names)[:3]) + (" and others" if len(names) > 3 else "")
                sentences.append(f"the optimiser's state {verb} {listed}")
    return sentences
