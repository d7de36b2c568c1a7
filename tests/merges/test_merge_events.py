"""What merging tells its caller while it runs: notes on the inputs first, then bytes up to all of them."""

from __future__ import annotations

from pathlib import Path

import folders
import torch

from merges import api, steering
from merges.outputs import adapter
from merges.outputs.model_folder import write_model
from merges.recipes.plan import plan
from merges.recipes.recipe import Part, Recipe
from vectors.events import Event
from vectors.steering import SteeringVector

BOTH = Recipe("linear", (Part("a", "a"), Part("b", "b")), "base")


def last(events: list[Event], stage: str) -> Event:
    """The last event of a stage, whose counts only ever grow."""
    found = [event for event in events if event.stage == stage and event.total is not None]
    counts = [event.done or 0 for event in found]
    assert counts == sorted(counts)
    assert all(event.done <= event.total for event in found if event.done and event.total)
    return found[-1]


def test_a_merge_counts_the_bytes_that_it_writes_and_compares(here: Path) -> None:
    events: list[Event] = []
    api.merge(BOTH, "out", on_event=events.append)
    size = Path("out/model.safetensors").stat().st_size  # with its header
    assert events[0] == Event("checking the inputs")
    assert last(events, "merging") == Event("merging", size, size, "bytes")
    events.clear()
    api.verify("out", on_event=events.append)
    assert last(events, "verifying") == Event("verifying", size, size, "bytes")


def test_the_bytes_of_several_files_grow_to_all_of_them_and_never_beyond(here: Path) -> None:
    events: list[Event] = []
    planned = plan(BOTH, shard=2000)
    write_model(planned, Path("out"), on_event=events.append)
    files = sorted(Path("out").glob("*.safetensors"))
    assert len(files) == 2
    size = sum(file.stat().st_size for file in files)
    assert last(events, "merging") == Event("merging", size, size, "bytes")


def test_a_difference_and_a_merged_vector_count_bytes_too(here: Path) -> None:
    size = sum(tensor.nbytes for tensor in folders.read(here / "a").values())
    events: list[Event] = []
    api.diff("base", "a", "a.safetensors", on_event=events.append)
    assert last(events, "taking the difference") == Event("taking the difference", size, size, "bytes")
    api.merge(Recipe("ties", BOTH.parts, "base", as_="vector"), "ties.safetensors", on_event=events.append)
    assert last(events, "merging") == Event("merging", 2 * size, 2 * size, "bytes")  # bfloat16 becomes float32


def test_an_adapter_counts_parameters(here: Path) -> None:
    events: list[Event] = []
    adapter.from_models("base", "a", here / "lora", 2, on_event=events.append)
    count = len(folders.read(here / "a"))
    assert last(events, "taking the difference") == Event("taking the difference", count, count, "parameters")


def test_notes_on_the_inputs_are_messages_before_any_work(here: Path) -> None:
    memory = plan(BOTH, threads=8).memory
    events: list[Event] = []
    api.merge(BOTH, "out", threads=8, memory=memory - 1, on_event=events.append)
    notes = [number for number, event in enumerate(events) if "to stay within the memory limit" in event.message]
    assert notes == [2]  # after the one on models without a tokenizer


def test_steering_vectors_count_layers() -> None:
    vectors = [SteeringVector({layer: torch.ones(4) for layer in (1, 2)}, {"base": {"digest": "x"}}) for _ in "ab"]
    events: list[Event] = []
    steering.merge(Recipe("linear", BOTH.parts), vectors, on_event=events.append)
    assert events == [Event("merging", 1, 2, "layers"), Event("merging", 2, 2, "layers")]
