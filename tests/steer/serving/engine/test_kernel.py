"""The kernels for GPUs compute what the plain tensor code computes; without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_process import NO_V2, environment_of

from probes.models.markers import Markers
from steer.serving.engine.worker import blocks, gates, sections
from steer.serving.engine.worker.kernels import gating, sectioning
from steer.serving.engine.worker.kernels import stream as kernel

SLOTS, TOKENS = 7, 13


def compare(device: str) -> int:
    """Compare all cases, in the process that has Triton; return their number."""
    cases = 0
    generator = torch.Generator().manual_seed(0)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    for dtype, tolerance in rounding.items():
        for hidden, directions in ((48, 0), (40, 4), (576, 2)):
            for is_sum in (False, True):
                half, other = (torch.randn(TOKENS, hidden, generator=generator).to(dtype) for _ in range(2))
                slots = torch.randint(0, SLOTS, (40,), generator=generator, dtype=torch.int32)
                slots[:4] = torch.arange(4)
                added = torch.randn(SLOTS, hidden, generator=generator)
                units = torch.randn(directions, SLOTS, hidden, generator=generator)
                units = torch.nn.functional.normalize(units, dim=-1)
                factors = torch.randn(directions, SLOTS, 2, generator=generator)
                added[0], factors[:, 0] = 0, 0
                factors[:, 1] = 0  # no direction acts here
                added[2], added[3] = added[2] * 1e5, added[3] * 1e13  # beyond float16, and beyond any model
                tables = [tensor.to(device) for tensor in (slots, added, units, factors)]
                half, second = half.to(device), other.to(device) if is_sum else None
                stream = half if second is None else half + second
                expected = (half + blocks.change_of(stream, *tables)).to(dtype)
                limit = blocks.HALF if dtype == torch.float16 else 0.0
                found = kernel.steered(half, second, *tables, limit)
                plain = tables[0][:TOKENS] == 0
                assert torch.equal(found[plain], half[plain])
                torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
                cases += 1
    strided = torch.stack([half, half], 1)[:, 0]
    assert torch.equal(kernel.steered(strided, second, *tables, limit), found)
    return cases


def compare_gates(device: str) -> int:
    """Compare random gates, plans and tokens, two layers one after the other; return the number of cases."""
    cases, generator = 0, torch.Generator().manual_seed(1)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    plans, rows, count, hidden = 6, 9, 150, 40  # two programs of the second kernel
    for number, is_sum in ((1, False), (2, True), (2, False)):
        table = {
            "weights": torch.randn(number, plans, hidden, generator=generator),
            "limits": torch.randn(number, plans, 2, generator=generator),
            "modes": torch.stack([draw(-1, 2, number, plans), draw(0, 8, number, plans)], -1),
            "ends": torch.stack([draw(-1, 2, plans), draw(0, 2, plans)], -1),
            "choices": draw(0, 50, plans, 1 << number),
            "tokens": torch.stack(
                [draw(0, plans, count), draw(1, rows, count), draw(0, 8, count), draw(0, 9, count)], -1
            ),
            "open": draw(0, 1 << number, count),
            "values": torch.randn(number, rows, generator=generator),
            "counts": draw(0, 5, rows, 4 << number),
            "slots": draw(0, 50, count + 7),
        }
        table["modes"][:, 0] = -1  # plan 0 is that of tokens without gates
        deciding = set()
        for token in table["tokens"]:  # of each request one token decides at most
            if int(token[2]) & gates.DECIDES and int(token[1]) in deciding:
                token[2] &= ~gates.DECIDES
            deciding.add(int(token[1]))
        half, other = (torch.randn(count, hidden, generator=generator) for _ in range(2))
        second = other if is_sum else None
        expected = {name: each.clone() for name, each in table.items()}
        found = {name: each.clone().to(device) for name, each in table.items()}
        for layer in (0, 1):
            gates._gate(half, second, layer, *expected.values())
            there = half.to(device), None if second is None else second.to(device)
            gating.gate(*there, layer, *found.values())
        for name in ("open", "slots"):
            assert torch.equal(found[name].cpu(), expected[name]), name
        assert torch.equal(found["counts"].cpu()[1:], expected["counts"][1:])  # row 0 is nobody's
        torch.testing.assert_close(found["values"].cpu()[:, 1:], expected["values"][:, 1:], rtol=1e-5, atol=1e-5)
        assert not torch.equal(expected["slots"], table["slots"])
        cases += 1
    return cases


def compare_sections(device: str) -> int:
    """Compare random markers and requests over steps of random lengths; return the number of cases."""
    cases, generator = 0, torch.Generator().manual_seed(2)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    plans, rows = 6, 9
    for number, markers in (
        (1, Markers((((1, 2), (4,)), ((2, 1, 1), (3, 3))), (((4,),), ((3, 1),)))),
        (2, Markers((((1,),), ((2,),)), (((3,),), ()))),
    ):
        sections_of = sections.SectionTable(markers, rows, torch.device("cpu"))
        for row in range(1, rows):
            sections_of.enter(row, draw(1, 5, int(draw(0, 4, 1))).tolist())
        table = {
            "markers": sections_of.markers,
            "marks": sections_of.marks,
            "modes": torch.stack([draw(0, 2, number, plans) - 2, draw(0, 3, number, plans)], -1),
            "ends": torch.stack([draw(0, 2, plans) - 2, draw(0, 2, plans)], -1),
            "choices": draw(0, 50, plans, 1 << number),
            "tokens": torch.zeros(200, gates.COLUMNS, dtype=torch.int32),
            "open": draw(0, 1 << number, 200),
            "states": sections_of.states,
            "counts": draw(0, 5, rows, 4 << number),
            "slots": draw(0, 50, 200),
        }
        table["modes"][:, 0] = -2
        expected = {name: each.clone() for name, each in table.items()}
        found = {name: each.clone().to(device) for name, each in table.items()}
        for lengths in ([150, 1, 3], [1, 1, 2, 1, 5], [40, 0, 130]):
            tokens, start = table["tokens"].zero_(), 0
            for row, length in enumerate(lengths, 1):
                part = tokens[start : start + length]
                part[:, 0], part[:, 1], part[:, 3] = draw(0, plans, length), row, start
                part[:, 2] = draw(0, 8, length)
                part[-1:, 2] |= sections.LAST
                start += length
            ids = draw(1, 5, start + 3).long()
            for tables in (expected, found):
                tables["tokens"].copy_(tokens)
            sections._section(ids, *expected.values())
            sectioning.section(ids.to(device), *found.values())
            for name in ("open", "slots"):
                assert torch.equal(found[name].cpu(), expected[name]), name
            for name in ("states", "counts"):  # row 0 is nobody's
                assert torch.equal(found[name].cpu()[1:], expected[name][1:]), name
            cases += 1
        assert not torch.equal(expected["slots"], table["slots"])
    return cases


def compile_all() -> list[str]:
    """Compile every kernel for a GPU of compute capability 9.0, which needs none; return their names."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        "GATES": 2,
        "TOGETHER": 64,
        "SUM": True,
        "LIMITED": True,
        "DIRECTIONS": 2,
        "BLOCK": 1024,
        "LONGEST": 1e3,
    }
    numbers = [
        "layer",
        "hidden",
        "rows",
        "value_rows",
        "count",
        "half_stride",
        "other_stride",
        "count_columns",
        "marker_count",
        "longest",
    ]
    types = dict.fromkeys(numbers, "i32") | {"limit": "fp32", "ids": "*i64", "half": "*bf16", "other": "*bf16"}
    types |= {"result": "*bf16"} | dict.fromkeys(
        ["weights", "limits", "values", "scores", "added", "units", "factors"], "*fp32"
    )
    compiled = []
    for function in (kernel._kernel(), *gating._kernels(), sectioning._kernel()):
        names = function.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in names}
        fixed = {(names.index(name),): value for name, value in constants.items() if name in names}
        source = ASTSource(fn=function, signature=signature, constexprs=fixed)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        compiled.append(function.__name__)
    return compiled


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run")
def test_the_kernels_compile_for_a_gpu() -> None:
    """Triton's interpreter takes what its compiler refuses."""
    environment = environment_of("v2")
    if environment is None:
        pytest.skip(NO_V2)
    triton = environment["PYTHONPATH"].split(os.pathsep)[1]
    path = os.pathsep.join([triton, *sys.path, str(Path(__file__).parent)])
    child = subprocess.run(
        [sys.executable, "-c", "import test_kernel as t; print(t.compile_all())"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.stdout.strip() == "['kernel', 'score', 'choose', 'see']", child.stderr[-2000:]


@pytest.mark.slow
def test_the_kernels_equal_the_tensor_code_and_leave_slot_0_as_it_is() -> None:
    if torch.cuda.is_available():
        assert (compare("cuda"), compare_gates("cuda"), compare_sections("cuda")) == (18, 3, 6)
        return
    environment = environment_of("v2")
    if environment is None:
        pytest.skip(NO_V2)
    path = os.pathsep.join([environment["PYTHONPATH"], *sys.path, str(Path(__file__).parent)])
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "import test_kernel as t; print(t.compare('cpu'), t.compare_gates('cpu'), t.compare_sections('cpu'))",
        ],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.stdout.split() == ["18", "3", "6"], child.stderr[-2000:]


def test_no_token_needs_no_launch() -> None:
    half, table = torch.zeros(0, 8), torch.zeros(1, 8)
    result = kernel.steered(half, None, torch.zeros(4, dtype=torch.int32), table, table[None], table[None, :, :2], 0.0)
    assert result.shape == (0, 8)
