"""Passes that run at the same time give what they give one after another, and leave torch's settings as they were."""

import threading
from collections.abc import Iterator
from contextvars import ContextVar

import pytest
import torch

from probes.models.threads import MOST, in_threads

CPU = torch.device("cpu")
number: ContextVar[int] = ContextVar("number", default=0)


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_tasks_run_at_the_same_time_each_with_its_share_of_the_threads() -> None:
    both = threading.Barrier(2, timeout=30)  # neither task ends before the other has begun

    def task(value: int) -> tuple[int, int, bool]:
        both.wait()
        return value, torch.get_num_threads(), torch.is_inference_mode_enabled()

    assert in_threads(task, [7, 8], CPU) == [(7, 2, True), (8, 2, True)]
    assert torch.get_num_threads() == 4
    assert not torch.is_inference_mode_enabled()


def test_results_come_in_the_order_of_the_tasks_however_many() -> None:
    assert in_threads(lambda value: value * value, range(5 * MOST), CPU) == [value**2 for value in range(5 * MOST)]
    assert in_threads(lambda value: value, [], CPU) == []


@pytest.mark.parametrize("threads", [1, 4])
def test_a_task_changes_the_context_of_no_other(threads: int) -> None:
    torch.set_num_threads(threads)
    number.set(3)

    def task(value: int) -> int:
        before = number.get()
        number.set(value)
        return before

    assert in_threads(task, [10, 20, 30], CPU) == [3, 3, 3]
    assert number.get() == 3


def test_one_task_and_another_device_have_the_caller_s_thread_with_all_of_its_threads() -> None:
    def task(_value: int) -> tuple[int, int]:
        return threading.get_ident(), torch.get_num_threads()

    here = threading.get_ident(), 4
    assert in_threads(task, [1], CPU) == [here]
    assert in_threads(task, [1, 2], torch.device("meta")) == [here, here]


def test_the_first_failure_is_raised_and_the_number_of_threads_comes_back() -> None:
    ran: list[int] = []

    def task(value: int) -> None:
        ran.append(value)
        if value in (0, 1):
            raise ValueError(f"task {value}")

    with pytest.raises(ValueError, match="task 0"):
        in_threads(task, range(1000), CPU)
    assert len(ran) < 1000
    assert torch.get_num_threads() == 4
