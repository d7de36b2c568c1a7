"""A model in which a behaviour is planted: its residual stream is the embedding of a token, at every layer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pico
import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
DISTANCE = 30.0  # between the embeddings of the two words; the others are normal, of deviation 1


def direction() -> torch.Tensor:
    """The unit direction along which the embeddings of " warm" and " cold" lie apart."""
    generator = torch.Generator().manual_seed(5)
    return torch.nn.functional.normalize(torch.randn(pico.HIDDEN, generator=generator), dim=0)


def planted(folder: Path, distance: float = DISTANCE) -> Path:
    """A pico Llama whose blocks add nothing, with " warm" and " cold" `distance` apart, and its tokenizer."""
    model = pico.build("llama")
    tokenizer = pico.tokenizer()
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0)))
        for word, side in ((" warm", 0.5), (" cold", -0.5)):
            (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
            embeddings[token] = side * distance * direction()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(path: Path, word: str, count: int, seed: int, prompts: bool = False) -> Path:
    """Texts of eight random letters and a word; with `prompts` each is a prompt with the same answer."""
    draw = random.Random(seed)
    texts = ["".join(draw.choices(LETTERS, k=8)) + word for _ in range(count)]
    values = [{"prompt": text, "completion": " yes"} for text in texts] if prompts else texts
    path.write_text("\n".join(map(json.dumps, values)))
    return path
