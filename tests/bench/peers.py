"""Time steering-vectors and repeng on the model and pairs of a benchmark, in an environment of their own.

Create the environment (apart from steer's: repeng needs NumPy < 2, steering-vectors needs transformers < 5):

    python3.11 -m venv peers
    peers/bin/pip install "torch==2.13.0+cpu"
    peers/bin/pip install -r tests/bench/requirements-peers.txt

Run (PAIRS.jsonl: one {"positive": text, "negative": text} a line, chat template already applied):

    printf '%s\n' steering-vectors repeng steering-vectors repeng quit |
        peers/bin/python tests/bench/peers.py MODEL_FOLDER PAIRS.jsonl --dtype float32 --threads 2
    printf '%s\n' 'forward 4096 64' quit |
        peers/bin/python tests/bench/peers.py MODEL_FOLDER --probe forward --dtype float32 --threads 2

Commands, one a line on stdin, so that a driver can interleave the peers with its own runs:

    steering-vectors       one train_steering_vector of all layers (mean difference, last token)
    repeng                 one ControlVector.train (pca_diff, last token, its default layers: all but block 0)
    forward TOKENS LENGTH  one pass of random ids [TOKENS / LENGTH, LENGTH] through the decoder, without lm_head
    quit

Each answers with one JSON line on stdout. The model is loaded before the first answer and nothing else is warmed up:
throw the first answer of each command away. An example is one text, so a pair is two. The peak is that of the command,
not of the process.

What the peers are given: inference mode, no KV cache, no progress bars, right padding, and a plain model. repeng takes
one unwrapped, so no ControlModule stands in the way of the other. The batch size is texts in a forward pass for both.

The default batch size, 16, is the best or level with the best for both. One thread, float32, SmolLM2-135M-Instruct,
texts of 73 to 95 tokens, CPU seconds an example because other jobs shared the processor, one run each of 16 pairs (32
where the batch is 32 for steering-vectors or 64 for repeng, 64 for steering-vectors at 64), so small gaps say nothing:

    batch size           8     16     32     64
    steering-vectors  .322   .322   .338   .356
    repeng            .352   .339   .337   .378
"""

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # repeng always draws its bars; read when tqdm is imported

import torch
from repeng import ControlVector, DatasetEntry
from steering_vectors import train_steering_vector
from threadpoolctl import threadpool_limits
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast


def load(folder, dtype):
    """The causal language model and tokenizer of a folder, also of one that transformers 5 saved.

    transformers 4 ignores `rope_parameters`, which would leave the model with a wrong rotary base and no warning, and
    does not know the tokenizer class `TokenizersBackend`.
    """
    config = AutoConfig.from_pretrained(folder)
    rope = getattr(config, "rope_parameters", None)
    if rope is not None:
        if "rope_theta" not in rope or "partial_rotary_factor" in rope:
            raise SystemExit(f"error: no translation for transformers 4 of rope_parameters {rope}")
        config.rope_theta = rope["rope_theta"]
        config.rope_scaling = None if rope["rope_type"] == "default" else rope
    config.use_cache = False
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=getattr(torch, dtype)).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="right")
    return model, tokenizer


def train_with_steering_vectors(model, tokenizer, pairs, batch_size):
    return train_steering_vector(model, tokenizer, pairs, batch_size=batch_size).layer_activations


def train_with_repeng(model, tokenizer, pairs, batch_size):
    entries = [DatasetEntry(positive, negative) for positive, negative in pairs]
    return ControlVector.train(model, tokenizer, entries, batch_size=batch_size).directions


PEERS = {"steering-vectors": train_with_steering_vectors, "repeng": train_with_repeng}


def timed(work):
    """Runs work in inference mode: its result, its seconds by the clock and of processor time, and the peak of resident
    memory meanwhile, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the last command freed is not this one's peak
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start, started = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        result = work()
    seconds = time.perf_counter() - start, time.process_time() - started
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return result, seconds, peak


def run_peer(peer, model, tokenizer, pairs, batch_size):
    """One whole training; a vector that is missing or not finite is an error, not a fast result."""
    layers, seconds, peak = timed(lambda: PEERS[peer](model, tokenizer, pairs, batch_size))
    if not layers or not all(torch.as_tensor(layer).isfinite().all() for layer in layers.values()):
        raise SystemExit(f"error: {peer} trained no finite vector")
    examples = 2 * len(pairs)
    return {
        "peer": peer,
        "version": version(peer),
        "seconds": seconds[0],
        "processor_seconds": seconds[1],
        "examples": examples,
        "examples_per_second": examples / seconds[0],
        "peak_rss_bytes": peak,
        "layers": len(layers),
        "batch_size": batch_size,
    }


def run_forward(model, tokens, length):
    """One dense, unpadded pass through the decoder blocks and the final norm."""
    ids = torch.randint(model.config.vocab_size, (tokens // length, length), generator=torch.Generator().manual_seed(0))
    _, seconds, peak = timed(lambda: model.base_model(input_ids=ids, use_cache=False))
    return {
        "peer": "forward",
        "version": version("transformers"),
        "seconds": seconds[0],
        "processor_seconds": seconds[1],
        "tokens": ids.numel(),
        "length": length,
        "tokens_per_second": ids.numel() / seconds[0],
        "peak_rss_bytes": peak,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", metavar="MODEL_FOLDER")
    parser.add_argument("pairs", metavar="PAIRS.jsonl", nargs="?", type=Path, help="not needed with --probe forward")
    parser.add_argument("--probe", choices=["forward"], help="only time bare forward passes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=16, help="texts in a forward pass (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.pairs is None and arguments.probe is None:
        parser.error("PAIRS.jsonl is needed without --probe forward")

    torch.set_num_threads(arguments.threads)
    threadpool_limits(arguments.threads)  # NumPy's BLAS, for repeng's PCA
    pairs = []
    if arguments.pairs is not None:
        rows = [json.loads(line) for line in arguments.pairs.read_text(encoding="utf-8").splitlines() if line.strip()]
        pairs = [(row["positive"], row["negative"]) for row in rows]
    model, tokenizer = load(arguments.model, arguments.dtype)

    for line in sys.stdin:
        match line.split():
            case ["quit"]:
                break
            case ["forward", tokens, length]:
                answer = run_forward(model, int(tokens), int(length))
            case [("steering-vectors" | "repeng") as peer] if pairs:
                answer = run_peer(peer, model, tokenizer, pairs, arguments.batch_size)
            case _:
                raise SystemExit(f"error: no command {line.strip()!r} here")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
