"""The journey on real data, as `make demo` shows it: extract a vector, try it, draw it, serve it, bake it, merge it,
and compare it with a prompt in a paired experiment.

Run it from the project's folder: .venv/bin/python examples/demo.py
Everything it makes lies in demo/.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from steer.cli import output, run

ROOT = Path(__file__).parent.parent
OUT = Path("demo")  # below ROOT
DATA = Path("examples") / "data"
EXPERIMENT = """\
name: warmth
model: smollm2
arms:
  base: {{}}
  prompt: {{system: You are a warm and caring friend. Answer warmly.}}
  steered: {{steer: "{expression}"}}
metric: {{name: warm_words, smallest_effect: 0.2}}     # the share of answers with a warm word
judges:
- {{name: warm_words, scorer: 'regex:(?i)\\b(glad|happy|love|wonderful|great|hope|enjoy|sorry|thank|welcome)'}}
"""
PROMPTS = ("How was your day?", "Can you help me with my homework?", "Good morning!")


def step(title: str, *arguments: str) -> None:
    """Show a command as one would type it, and run it; a failure ends the demo."""
    print(f"\n== {title}\n$ steer {shlex.join(arguments)}\n", flush=True)
    code = run(list(arguments))
    sys.stdout.flush()
    if code:
        sys.exit(code)


def expression_of(vector: str) -> str:
    """The vector at its recommended strength."""
    from steer import SteeringVector

    return f"{SteeringVector.load(vector).metadata['recommended']['strength']:g}*warm"


def check_point(vector: str) -> None:
    """Show what the recommended point writes; it must be within its budget, and its texts as coherent as the base's."""
    import json

    import steer
    from probes.strengths import Column, try_columns
    from vectors.resolve import compose

    print("\n== The recommended point: is it within the budget, and is the text coherent?\n", flush=True)
    report = json.loads(Path(vector).with_suffix(".sweep").joinpath("report.json").read_text())
    if report["chosen"] is None:
        output.fail([f"nothing is recommended: {report['nothing_recommended']}"], "report this: it is a defect")
        sys.exit(1)
    cost, budget = report["test"]["p95"], report["config"]["budget"]
    strength = report["recommended"]["strength"]
    composition, vectors = compose(vector)
    columns = [Column(0.0), Column(strength)]
    prompts = [*PROMPTS, "Tell me about your weekend.", "What should I cook tonight?", "My train is late."]
    answers = try_columns(
        steer.load_model("smollm2"), composition, vectors, prompts, columns, temperature=0, scored=False
    )
    for prompt, row in list(zip(prompts, answers, strict=True))[: len(PROMPTS)]:
        print(f"> {prompt}\n{output.side_by_side(['base', f'strength {strength:g}'], [each.text for each in row])}\n")
    base, steered = (sum(row[column].repeated_4grams for row in answers) / len(answers) for column in (0, 1))
    print(
        f"p95 KL on neutral text {cost:.3f} nats (budget {budget:g}); repeated 4-grams {steered:.1%} (base {base:.1%})",
        flush=True,
    )
    problems = [f"the recommended point costs {cost:.3f} nats, more than {budget:g}"] if cost > budget else []
    if steered > 1.5 * max(base, 0.02):  # a base that never repeats itself allows a chance repetition
        problems.append(f"{steered:.1%} of the 4-grams are repeated, the base's {base:.1%}")
    if problems:
        output.fail(problems, "report this: it is a defect")
        sys.exit(1)


def serve() -> None:
    """Start a server on the champion, ask the base and the champion the same question at once, and end the server."""
    print("\n== The same question to the base and to the champion, at once, over HTTP")
    if importlib.util.find_spec("vllm") is None:
        print("skipped: vLLM is not installed here (make setup installs it on Linux)")
        return
    import openai

    from steer.serving.launch import served
    from steer.store import layout
    from steer.store.using.resolver import followed, version_of
    from vectors import references
    from vectors.errors import SteerError

    store = layout.require((OUT / "tone").absolute())
    champion = version_of(store, "tone@champion")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "4"]
    print(
        f"$ cd {store.work.relative_to(ROOT)}; steer serve tone@champion --port {port} -- {shlex.join(flags)}\n",
        flush=True,
    )
    log = (OUT / "vllm.log").absolute()
    log.unlink(missing_ok=True)
    print(f"vLLM's own output goes to {OUT / 'vllm.log'}", flush=True)
    settings = {
        "vectors": {name: str(file) for name, file in champion.files.items()},
        "arms": {champion.label: str(champion.composition)},
        "versions": {champion.label: followed(store, "tone@champion", champion)},
    }

    def ask(model: str) -> Any:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        messages: Any = [{"role": "user", "content": PROMPTS[0]}]
        return client.chat.completions.create(model=model, messages=messages, max_tokens=40, temperature=0)

    try:
        path = references.resolve("smollm2").path
        show = lambda event: print(event.message or f"{event.stage} …", flush=True)  # noqa: E731
        with served(path, settings, name="smollm2", port=port, flags=flags, log=log, on_event=show) as server:
            models = ("smollm2", "smollm2:champion")
            with ThreadPoolExecutor() as pool:
                answers = list(pool.map(ask, models))
    except (SteerError, openai.OpenAIError) as error:
        output.fail(getattr(error, "problems", [str(error)]), getattr(error, "hint", f"look into {log}"))
        sys.exit(1)
    print(f"\n> {PROMPTS[0]}\n")
    print(output.side_by_side(models, [answer.choices[0].message.content for answer in answers]))
    receipt = answers[1].model_extra["steer"]
    print(
        f"\nreceipt of {models[1]}: the version {receipt['version']['commit'][7:15]} of {receipt['version']['name']}, "
        f"{receipt['expression']}, on {receipt['prompt_tokens']} prompt and "
        f"{receipt['response_tokens']} response tokens\n  {receipt['digest']}\nthe server has ended",
        flush=True,
    )


def versions(vector: str) -> None:
    """A personality with a history: two versions, evaluated, compared, promoted, and the second taken back."""
    work, data, formal = OUT / "tone", (ROOT / DATA).absolute(), (OUT / "formal.safetensors").absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    examples = ["--pos", str(DATA / "formal.jsonl"), "--neg", str(DATA / "casual.jsonl"), "--layers", "14"]
    step("A second vector, at one layer", "extract", *examples, "--budget-kl", "0", "--out", str(formal), "--force")
    with contextlib.chdir(work):
        step("A store of versions, and a first one", "init", "tone")
        step("The vector at the strength that it recommends", "add", str((ROOT / vector).absolute()))
        step("A version", "commit", "-m", "Warm")
        step("A part of another vector", "add", str(formal), "--strength=-0.1")
        step("Another version", "commit", "-m", "Warm, and a little less formal")
        Path("neutral.txt").write_text("Explain how tides work.\nList three uses of vinegar.\n")
        items = ["--pos", str(data / "warm.jsonl"), "--neg", str(data / "cold.jsonl"), "--items", "30"]
        short = ["--neutral", "neutral.txt", "--control", "none", "--curve", "1", "--max-tokens", "0"]
        step("Both on the same items", "eval", "tone~1", "tone", *items, *short, "--allow-overlap", "-q")
        step("What changed, in parts and in behaviour", "diff", "--behaviour")
        step("The champion is a version that works", "promote", "--require-eval")
        step("Taken back", "revert", "-m", "Less formal was too chatty")
        step("The history", "log")


def bake(vector: str) -> None:
    """Put the behaviour into weights: folded, and distilled; take the weight change, and merge it with a second one."""
    made = {name: OUT / name for name in ("folded", "distilled", "merged")}
    task, formal = OUT / "warm-task.safetensors", OUT / "formal-task.safetensors"
    for folder in made.values():
        shutil.rmtree(folder, ignore_errors=True)
    warm = [expression_of(vector), "--vector", f"warm={vector}"]
    step("Folded into the weights, and proved equal", "bake", *warm, "--mode", "fold", "-o", str(made["folded"]))
    few = ["--steps", "24", "--batch", "4", "--evaluate-every", "12"]
    short = [*few, "--lr", "2e-3", "--tokens", "24", "--prompts", str(DATA / "prompts.jsonl")]
    distilled = str(made["distilled"])
    step(
        "Distilled: the steered model teaches the plain one", "bake", *warm, "--mode", "distil", "-o", distilled, *short
    )
    step("The weight change is a task vector", "diff", "smollm2", distilled, "-o", str(task), "--force")
    data = str(DATA / "formal.jsonl")
    imitated = ["--mode", "train", "--data", data, "--as", "vector", "-o", str(formal), *few, "--lr", "1e-3"]
    formal.unlink(missing_ok=True)
    step("A second behaviour, from examples", "bake", *imitated)
    parts = [str(task), str(formal), "--ties", "--density", "0.5", "--base", "smollm2"]
    step("Both in one model, by TIES", "merge", *parts, "-o", str(made["merged"]))
    compare(vector, made)


def compare(vector: str, made: dict[str, Path]) -> None:
    """The table of all that was made; the folded model must equal the steered one."""
    from steer.evaluation.compare import ComparedModel, compare

    print("\n== What became of the behaviour\n", flush=True)
    models = {
        "base": ComparedModel("smollm2"),
        "steered": ComparedModel("smollm2", expression_of(vector), {"warm": Path(vector)}),
    }
    models |= {name: ComparedModel(str(folder)) for name, folder in made.items()}
    found = compare(models, DATA / "warm.jsonl", DATA / "cold.jsonl")
    rows = [[name, f"{figures['margin']:.3f}", f"{figures['kl_neutral']:.3f}"] for name, figures in found.items()]
    print(output.table(["model", "trait margin", "neutral KL"], rows, left=1))
    print("\nmargin: nats per token by which warm examples are likelier than cold ones; KL: from the base, elsewhere")
    apart = max(abs(found["steered"][key] - found["folded"][key]) for key in ("margin", "kl_neutral"))
    if apart > 1e-3:
        output.fail([f"the folded model differs from the steered one by {apart:.2g}"], "report this: it is a defect")
        sys.exit(1)


def experiment(vector: str) -> Path:
    """Base, prompt and steered arm on the same thirty prompts; returns the page."""
    file, folder = OUT / "warmth.yaml", OUT / "warmth.paired"
    file.write_text(EXPERIMENT.format(expression=expression_of(vector)))
    print(f"\n== The experiment {file}: what do a prompt and the vector change?\n\n{file.read_text()}")
    answered = ["--prompts", str(DATA / "questions.jsonl"), "--max-tokens", "20", "--no-likelihood"]
    arguments = ["ab", "paired", str(file), *answered, "--engine", "transformers", "-o", str(folder), "--force"]
    step("All arms on the same prompts, compared prompt by prompt", *arguments)
    return folder / "report.html"


def main() -> None:
    """Run every step."""
    os.chdir(ROOT)
    OUT.mkdir(exist_ok=True)
    vector, picture = str(OUT / "warm.safetensors"), str(OUT / "warm.png")
    pos, neg = str(DATA / "warm.jsonl"), str(DATA / "cold.jsonl")
    step("The bundled model", "models", "show", "smollm2")
    files = ["--pos", pos, "--neg", neg, "--out", vector, "--force"]
    some = ["--sweep", "--layers", "8,12,16"]  # of 30, so that it takes a minute
    step("A vector from warm and cold answers, where it steers most within a budget", "extract", *files, *some)
    check_point(vector)
    asked = [part for prompt in PROMPTS for part in ("-p", prompt)]
    strength = expression_of(vector).removesuffix("*warm")
    step("The same prompts, colder and warmer", "try", vector, *asked, "--strengths", f"-{strength},0,{strength}")
    step("How well each layer separates the two", "vectors", "plot", vector, "--out", picture, "--force")
    versions(vector)
    serve()
    bake(vector)
    page = experiment(vector)
    print(
        "\n== Where everything is\n"
        f"{page}   the experiment: each arm's answers, and the differences with intervals\n"
        "demo/warm.safetensors   the vector: every layer's direction, what was measured, where it acts\n"
        "demo/warm.png           the separation of the layers, on examples held out\n"
        "demo/tone               a personality and its versions; in it, steer serve tone@champion serves the champion\n"
        "demo/folded             the model with the behaviour in its weights, exactly; run.json has the proof\n"
        "demo/distilled          the same by training; report.html says how much, and at what cost\n"
        "demo/merged             warm and formal in one; `steer merge --verify demo/merged` computes it again\n"
        "\n== What to type next\n"
        "source .venv/bin/activate\n"
        'steer try demo/warm.safetensors -p "Tell me about your weekend." --strengths 0,1\n'
        "steer extract --pos examples/data/formal.jsonl --neg examples/data/casual.jsonl "
        "--out demo/formal.safetensors\n"
        f"steer try '{strength}*warm - formal' "
        "--vector warm=demo/warm.safetensors --vector formal=demo/formal.safetensors "
        '-p "Can you help me move?" --strengths 0,1\n'
        f"steer serve smollm2 --vector warm=demo/warm.safetensors --arm friendly='{strength}*warm'\n"
        "steer --help"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
