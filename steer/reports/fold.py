"""The report of a fold: its proof as a table, and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer.reports import page

COLUMNS = {"max_logit": "max |delta logit|", "kl_mean": "mean KL (nats)", "kl_max": "greatest KL"}


def rows(proof: Mapping[str, Any]) -> list[list[str]]:
    """The comparisons of a proof, one per row, under COLUMNS."""
    compared = {f"folded against {proof['reference']}": proof["transformers"]}
    if "composition" in proof:
        compared["folded against the composition as served"] = proof["composition"]
    compared["the unsteered model against it"] = proof["base"]
    return [[name, *(f"{figures[key]:.3g}" for key in COLUMNS)] for name, figures in compared.items()]


def prompts_of(proof: Mapping[str, Any]) -> str:
    """The prompts of a proof in words: how many they are, and whether all are held out of the extraction."""
    seen = proof.get("extraction_prompts", 0)
    return (
        f"{proof['prompts']} prompts, {seen} of them of the extraction"
        if seen
        else f"{proof['prompts']} held-out prompts"
    )


def vllm_result(proof: Mapping[str, Any]) -> str:
    """The outcome of the comparison in vLLM, or why there was none."""
    vllm = proof["vllm"]
    return vllm.get("skipped") or f"log-probabilities within {vllm['max_log_probability']:.2g}"


def html(report: Mapping[str, Any], record: str) -> str:
    """The report of a fold as one page; `record` names the file with everything in numbers."""
    proof = report["proof"]
    facts = {
        **report["via"],
        "verdict": f"{proof['verdict']}, on {prompts_of(proof)} ({proof['tokens']} tokens)",
        "vLLM": vllm_result(proof),
        "base": report["base"]["digest"],
        **{f"vector {name}": digest for name, digest in report["vectors"].items()},
        **report["outputs"],
    }
    table = page.table(["", *COLUMNS.values()], rows(proof))
    return page.page(f"Fold: {report['composition']}", table + page.example_answers(report) + page.facts(facts), record)
