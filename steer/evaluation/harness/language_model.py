"""A steered model as lm-evaluation-harness sees one: its likelihoods and texts are those of our own passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from probes.generation import generate
from probes.interventions import Intervention
from probes.logits import completion_logits, log_likelihoods
from probes.models.completions import Completion
from probes.models.loading import LoadedModel
from probes.models.residual import context_length
from vectors.events import OnEvent, ignore

LONGEST_CONTEXT = 2048  # tokens, for models that state no limit
LONGEST_ANSWER = 256  # tokens, where a task states none; the harness's own default


def language_model(
    loaded: LoadedModel, intervention: Intervention, *, name: str = "steer", seed: int = 0, on_event: OnEvent = ignore
) -> Any:
    """An `lm_eval.api.model.LM` of the model under an intervention.

    A request's context is the prompt, so that scopes of the prompt and the response mean the same as everywhere.
    Tokens are encoded as the harness's own Hugging Face model does, so the unsteered model gets the same figures.
    """
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    model, tokenizer = loaded.model, loaded.tokenizer
    longest = context_length(model.config) or LONGEST_CONTEXT

    class SteeredLanguageModel(TemplateLM):
        """The model under the intervention; a class, because the harness wants one."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        @property
        def max_length(self) -> int:
            return longest

        @property
        def tokenizer_name(self) -> str:
            return name.replace("/", "__")

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            bos = tokenizer.bos_token
            if add_special_tokens is None:
                add_special_tokens = not (bos and string.startswith(bos))
            return tokenizer.encode(string, add_special_tokens=add_special_tokens)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            # The end of a context that is too long is what a completion follows from.
            completions = [
                Completion(context[len(context) - max(longest - len(continuation), 1) :], continuation)
                if len(context) + len(continuation) > longest
                else Completion(context, continuation)
                for _, context, continuation in requests
            ]
            results: dict[int, tuple[float, bool]] = {}
            for index, logits in completion_logits(model, completions, intervention):
                ids = completions[index].completion_ids
                results[index] = (sum(log_likelihoods(logits, ids)), logits.argmax(-1).tolist() == list(ids))
            return [results[index] for index in range(len(results))]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            windows, counts = [], []
            for request in requests:
                rolling = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id, max_seq_len=longest - 1, context_len=1,
                )  # fmt: skip
                pairs = [(None, *utils.make_disjoint_window(pair)) for pair in rolling]
                windows += pairs
                counts.append(len(pairs))
            values = iter(self._loglikelihood_tokens(windows))
            return [sum(next(values)[0] for _ in range(count)) for count in counts]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts: dict[int, str] = {}
            groups: dict[tuple[int, float], list[int]] = {}
            stops: list[list[str]] = []
            for index, request in enumerate(requests):
                _, given = request.args
                settings = normalize_gen_kwargs(dict(given), LONGEST_ANSWER)
                stops.append(handle_stop_sequences(settings.get("until"), eos=None))
                groups.setdefault((settings["max_gen_toks"], float(settings.get("temperature") or 0.0)), []).append(
                    index
                )
            for (tokens, temperature), indices in groups.items():
                prompts = [self.tok_encode(requests[index].args[0])[-max(longest - tokens, 1) :] for index in indices]
                completions = generate(
                    model, tokenizer, prompts, intervention, max_tokens=tokens, temperature=temperature, seed=seed,
                    names=[str(index) for index in indices], stage="answering the task", on_event=on_event,
                )  # fmt: skip
                for index, completion in zip(indices, completions, strict=True):
                    text = tokenizer.decode(completion.completion_ids, skip_special_tokens=True)
                    for stop in stops[index]:
                        text = text.split(stop)[0] if stop else text
                    texts[index] = text
            return [texts[index] for index in range(len(requests))]

    return SteeredLanguageModel()
