"""Plots of the measurements in a vector's metadata. Needs the extra `plots`."""

from __future__ import annotations

import io
from pathlib import Path

from vectors.errors import UsageError
from vectors.steering import SteeringVector
from vectors.storage.files import require_writable, write_atomically


def layer_separation(vector: SteeringVector, path: str | Path, title: str = "") -> None:
    """Draw the held-out AUROC, the AUROC on shuffled labels and Cohen's d by layer, as a .png or .svg file.

    Raises UsageError, also for a vector without measurements; OutputError.
    """
    path = Path(path)
    require_writable(path)
    if path.suffix not in (".png", ".svg"):
        raise UsageError(f"the picture {path} has no known suffix", "end its name in .png or .svg")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures need matplotlib", "pip install 'steer-workbench[plots]'") from error
    measured = {
        int(i): entry for i, entry in (vector.metadata.get("measured") or {}).items() if entry.get("auroc") is not None
    }
    if not measured:
        raise UsageError("nothing was measured to draw", "extract from more examples")
    layers = sorted(measured)
    column = {key: [measured[i][key] for i in layers] for key in measured[layers[0]]}

    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(layers, column["auroc_low"], column["auroc_high"], color="tab:blue", alpha=0.2, linewidth=0)
    axes.plot(
        layers, column["auroc"], color="tab:blue", marker="o", markersize=3, label="AUROC, held out (95 % interval)"
    )
    axes.plot(layers, column["auroc_shuffled"], color="tab:gray", linestyle=":", label="AUROC, shuffled labels")
    for i in vector.apply:
        axes.axvline(i, color="tab:orange", linewidth=1.5, label="acts here" if i == vector.apply[0] else None)
    axes.set(
        xlabel="layer (output of decoder block)", ylabel="AUROC", ylim=(0.35, 1.02), title=f"Layer separation: {title}"
    )
    effect = axes.twinx()
    effect.plot(layers, column["cohens_d"], color="tab:green", linestyle="--", linewidth=1, label="Cohen's d (right)")
    effect.set_ylabel("Cohen's d")
    effect.set_ylim(bottom=min(0.0, *column["cohens_d"]))
    lines = [*axes.get_legend_handles_labels()[0], *effect.get_legend_handles_labels()[0]]
    labels = [*axes.get_legend_handles_labels()[1], *effect.get_legend_handles_labels()[1]]
    figure.legend(lines, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    content = io.BytesIO()
    # Without a date and random ids, the same measurements give the same picture.
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "steer"}):
        figure.savefig(content, format=path.suffix[1:], dpi=150, metadata=metadata)
    write_atomically(path, content.getvalue())
