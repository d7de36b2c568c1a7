"""mergekit-yaml, run in its own environment: mergekit 0.1.5, and what it needs, beside torch and transformers.

    python -m venv PEER && PEER/bin/pip install mergekit==0.1.5
    PEER/bin/python mergekit_peer.py RECIPE OUT [RECIPE OUT ...] [--OPTION ...]

Under transformers 5 two of its pydantic models refer to a `torch` that they did not import; they are given one here.
"""

from __future__ import annotations

import sys

import mergekit.architecture.base as architecture
import torch
from mergekit.scripts.run_yaml import main

for model in (architecture.ConfiguredModuleArchitecture, architecture.ConfiguredModelArchitecture):
    model.model_rebuild(_types_namespace={"torch": torch, **vars(architecture)})

if __name__ == "__main__":
    places = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    options = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    for recipe, out in zip(places[::2], places[1::2], strict=True):
        main([recipe, out, *options], standalone_mode=False)
