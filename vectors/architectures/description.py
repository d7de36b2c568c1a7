"""The two halves of a row: the model in memory (transformers), and its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

_ATTENTION = ("self_attn", "attn", "attention")
_FEED_FORWARD = ("mlp", "feed_forward")


@dataclass(frozen=True)
class Checkpoint:
    """Where the tensors of a checkpoint write to the residual stream, and how a constant can be added to it.

    Names begin below the decoder's prefix ("model."), which is found in each checkpoint. `block` is the prefix of block
    {i}. `embeddings` write to the stream before block 0, one row per token; `head` is the output head, which is stored
    outside of the decoder.

    `writers`: for each part of a block, the regular expressions (for a parameter's name inside the block) of what
    writes to the stream; `modules`: for each part, the names of the modules in a loaded block whose outputs are these
    writes, all that the block has; `norms`: for a part, the norm between its write and the stream (sandwich norms).
    `columns`: the expressions among them whose tensors have the stream as their last dimension, not as their first.
    `plus_one`: norms multiply by 1 + weight.

    `slot`: the bias that is added at the end of a block. It exists if the configuration sets `flag`, which brings all
    of `flag_brings`, or always if `flag` is None. `gated`: gate, up and down projection of a feed-forward
    down(act(gate x) * (up x)), or why no block with a constant one can be inserted; `norm_before`: the norm before it.
    `scale`: the setting by which a block multiplies what it adds to the stream; `per_block`: settings that are lists
    with one value per block, and the value of an inserted one. `unless`: settings with which none of this holds, and
    why. `whole`: the type of the vision-language model around the decoder of this checkpoint, if there is one.
    """

    block: str = "layers.{i}."
    embeddings: tuple[str, ...] = ("embed_tokens.weight",)
    head: str = "lm_head.weight"
    writers: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "attention": (r"self_attn\.o_proj\.(weight|bias)",),
            "feed_forward": (r"mlp\.down_proj\.(weight|bias)",),
        }
    )
    modules: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"attention": _ATTENTION, "feed_forward": _FEED_FORWARD}
    )
    norms: Mapping[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    plus_one: bool = False
    slot: str | None = None
    flag: str | None = None
    flag_brings: tuple[str, ...] = ()
    gated: tuple[str, str, str] | str = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    norm_before: str | None = "post_attention_layernorm"
    scale: str | None = None
    per_block: Mapping[str, int] = field(default_factory=dict)
    unless: Mapping[str, str] = field(default_factory=dict)
    whole: str | None = None

    def inside(self, whole: str) -> Checkpoint:
        """The same as the text decoder of a vision-language model of this type."""
        return replace(self, whole=whole)

    def below(self, prefix: str) -> Checkpoint:
        """The same with whole names, for a checkpoint whose decoder's tensors begin with `prefix`."""
        # The last part of the prefix is the decoder ("model.", "transformer."); what is before it lies around the head
        # too, as in "language_model.model.", except in "model.language_model.".
        outer = prefix.removesuffix(".").rpartition(".")[0]
        outside = f"{outer}." if outer not in ("", "model") else ""
        return replace(
            self, block=prefix + self.block, embeddings=tuple(prefix + e for e in self.embeddings),
            head=outside + self.head,
        )  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """What an architecture is; the defaults are those of a Llama.

    `blocks`: the path of the list of blocks below the decoder in transformers. `packs`: attention is the only thing
    that mixes tokens, and positions come from `position_ids`, so that a tree of sequences can share one forward pass.
    `continues`: a pass over several tokens may go on from a cache, so that sequences can share a cached prefix.
    `recurrent`: for each of the configuration's layer types whose blocks carry a recurrent state from token to token,
    the name of the module in the block that does. `wrappers`: the model types of vision-language models that have it
    as their text decoder. `without_lora`: linear modules that take no adapter. `checkpoint`: its tensors, or why it is
    not known where they write to the stream, for which it can't be folded.
    """

    blocks: str = "layers"
    packs: bool = True
    continues: bool = True
    recurrent: Mapping[str, str] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    without_lora: tuple[str, ...] = ()
    checkpoint: Checkpoint | str = field(default_factory=Checkpoint)
