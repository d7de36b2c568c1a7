"""The flags with which vLLM loads the LoRA adapters of arms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steer.experiments.specification import Arm, Experiment, Metric
from steer.serving.lora import lora_arguments, lora_flags
from vectors.errors import UsageError


def adapter(folder: Path, rank: int) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return str(folder)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    arms = [Arm("control", 0.4), *(Arm(f"r{r}", 0.3, lora=adapter(tmp_path / f"r{r}", r)) for r in (4, 20))]
    return Experiment("tone", tuple(arms), Metric("thumbs"), "salt")


def test_without_adapters_nothing_is_added(experiment: Experiment) -> None:
    assert lora_flags([], (), on_cpu=True) == []
    assert lora_arguments([]) == {}


def test_every_arm_s_adapter_is_a_module_and_the_rank_holds_the_largest(experiment: Experiment) -> None:
    flags = lora_flags([experiment], (), on_cpu=False)
    assert flags[:4] == ["--enable-lora", "--max-lora-rank", "32", "--lora-modules"]
    assert [json.loads(module)["name"] for module in flags[4:]] == ["tone.r4", "tone.r20"]
    folders = [Path(arm.lora) for arm in experiment.arms if arm.lora]
    assert lora_arguments(folders) == {"enable_lora": True, "max_lora_rank": 32, "max_loras": 2}


def test_on_a_cpu_requests_are_served_one_at_a_time(experiment: Experiment) -> None:
    """There, vLLM applies an adapter to a whole batch."""
    assert "--max-num-seqs" not in lora_flags([experiment], (), on_cpu=False)
    flags = lora_flags([experiment], (), on_cpu=True)
    assert flags[flags.index("--max-num-seqs") + 1] == "1"
    assert "--max-num-seqs" not in lora_flags([experiment], ("--max-num-seqs", "1"), on_cpu=True)
    with pytest.raises(UsageError, match="--max-num-seqs is 8"):
        lora_flags([experiment], ("--max_num_seqs=8",), on_cpu=True)


def test_adapters_of_the_command_line_beside_those_of_arms_are_refused(experiment: Experiment) -> None:
    with pytest.raises(UsageError, match="beside -- --lora-modules"):
        lora_flags([experiment], ("--lora-modules", "a=b"), on_cpu=False)
