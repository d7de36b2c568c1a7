"""The examples of docs/python.md run as they stand, on a small model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import steer

ROOT = Path(__file__).parents[2]


def test_the_examples_of_the_python_page_run(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("warm", "cold", "formal", "casual"):  # a few short examples each
        lines = (ROOT / "examples" / "data" / f"{name}.jsonl").read_text().splitlines()
        (tmp_path / "examples" / "data").mkdir(parents=True, exist_ok=True)
        shortest = sorted(lines, key=len)[:10]
        (tmp_path / "examples" / "data" / f"{name}.jsonl").write_text("\n".join(shortest))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    source = "".join(blocks).replace('"smollm2"', repr(str(model_folder)))
    assert len(blocks) == 2
    exec(compile(source, "docs/python.md", "exec"), {})
    made = {path.name for path in tmp_path.iterdir()}
    assert {"kind.safetensors", "warm.png", "formal-task.safetensors", "half-formal", "merged"} <= made
    assert "parameters changed" in capsys.readouterr().out


def test_generate_answers_in_the_chat_template(model_folder: Path) -> None:
    loaded = steer.load_model(model_folder)
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    answer = steer.generate("Hi", model=loaded, max_tokens=5)
    assert answer == steer.generate(turn, model=loaded, max_tokens=5)
    assert steer.generate(["Hi", "Ho"], model=loaded, max_tokens=5)[0] == answer
    vector = {2: 30 * loaded.model.model.embed_tokens.weight[9]}
    steered = steer.generate("Hi", vector, model=loaded, max_tokens=5)
    assert steered != answer
    assert steered == steer.generate("Hi", "v", model=loaded, vectors={"v": vector}, max_tokens=5)
    with pytest.raises(TypeError, match="an expression or a file's path"):
        steer.generate("Hi", 3, model=loaded)  # type: ignore[arg-type]
