"""`steer doctor`: check the installation, the machine and vLLM, and what works with a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer.cli import options, requests
from steer.cli.output import out
from vectors.errors import SteerError
from vectors.registry.options import option


@dataclass(frozen=True, kw_only=True)
class Request:
    """The argument of `steer doctor`."""

    model: str | None = option(
        None, help="A model, to see what works with it: " + options.A_MODEL, argument=True, metavar="[MODEL]",
        complete="models",
    )  # fmt: skip


@options.command(
    summary="Check the installation, the devices, vLLM and the caches, and what works with a model.",
    examples="""
    steer doctor
    steer doctor smollm2
    steer doctor org/name --json
    """,
)
@requests.takes(Request)
def command(**values: Any) -> None:
    """Check what is installed, where it runs, and what works with a model: extract, try, serve, fold, train.

    Every problem stands with the next step. Fails if a package that every command needs is missing, has the wrong
    version, or can't be imported.
    """
    request = requests.build(Request, values)
    from steer.doctor import report

    with out.progress() as on_event:
        data, problems = report.examine(request.model, on_event)
    fatal = [problem for problem in problems if problem.fatal]
    if not (fatal and out.json):
        out.result(data, lambda: _print(data))
    if fatal:
        raise SteerError([problem.what for problem in fatal], fatal[0].hint)


def _print(data: dict[str, Any]) -> None:
    out.line(f"steer {data['steer']}, Python {data['python']} ({data['executable']}), {data['platform']}\n")
    out.table(["what", "name", "state"], [*_rows(data)], left=3)
    if data["model"] is not None:
        out.line()
        _print_model(data["model"])
    out.line()
    if not data["problems"]:
        out.line("no problems")
    for problem in data["problems"]:
        out.line(f"problem: {problem['what']}")
        out.line(f"  to do: {problem['hint']}")


def _rows(data: dict[str, Any]) -> list[list[str]]:
    rows = [["package", name, version or "missing"] for name, version in data["packages"].items()]
    for name, extra in data["extras"].items():
        installed = ", ".join(f"{package} {version}" for package, version in extra["packages"].items() if version)
        if extra["state"] == "installed":
            state = installed
        elif extra["state"] == "missing":
            state = f"not installed ({extra['for']}): {extra['install']}"
        else:
            state = f"{extra['state']} ({installed}): {extra['install']}"
        rows.append(["extra", name, state])
    for name, device in data["devices"].items():
        memory = f", {device['memory'] / 2**30:.0f} GiB" if "memory" in device else ""
        rows.append(["device", name, device.get("name", f"{device.get('cores')} cores") + memory])
    vllm = data["vllm"]
    if vllm is None:
        broken = any(problem["fatal"] for problem in data["problems"])
        rows.append(["vLLM", "version", "not examined: see the problems" if broken else "not installed"])
    else:
        supported = "supported" if vllm["supported"] else "not supported"
        rows.append(["vLLM", "version", f"{vllm['version']} ({vllm['distribution']}), {supported}"])
        rows.append(["vLLM", "back end", vllm["back_end"]])
        rows.append(["vLLM", "runner", f"{vllm['runner']}: {vllm['runner_reason']}"])
        rows.append(["vLLM", "plugin", "registered" if vllm["plugin"] else "not registered"])
    for name, folder in data["folders"].items():
        size = f"{folder['bytes'] / 1e9:.2f} GB in " if folder["bytes"] is not None and folder["exists"] else ""
        missing = "" if folder["exists"] else " (not there yet)"
        writable = "" if folder["writable"] else ", can't be written to"
        rows.append(["folder", name, f"{size}{folder['path']}{missing}, {folder['free'] / 1e9:.1f} GB free{writable}"])
    rows += [["environment", name, value] for name, value in data["environment"].items()]
    rows += [["leftover", path, "of an interrupted run; the same command resumes it"] for path in data["leftovers"]]
    rows += [["can run", name, answer] for name, answer in data["can"].items()]
    return rows


def _print_model(model: dict[str, Any]) -> None:
    table = model["table"]
    out.line(f"{model['reference']}: {model['architecture']}, {model['layers']} layers of {model['hidden_size']}")
    out.line(
        f"steer serve: the table of slots takes {table['bytes'] / 2**20:.0f} MiB (--steer-rows {table['rows']}, "
        f"--steer-directions {table['directions']})\n"
    )
    rows = [[name, answer["answer"], answer["reason"]] for name, answer in model["support"].items()]
    out.table(["with this model", "", "why"], rows, left=3)
