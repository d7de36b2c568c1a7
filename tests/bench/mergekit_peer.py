"""mergekit-yaml, run in its own environment: mergekit 0.1.4, and what it needs, beside torch and transformers.

    python -m venv PEER && PEER/bin/pip install mergekit==0.1.4

Under transformers 5 two of its pydantic models refer to a `torch` that they did not import; they are given one here.
"""

from __future__ import annotations

import mergekit.architecture.base as architecture
import torch
from mergekit.scripts.run_yaml import main

for model in (architecture.ConfiguredModuleArchitecture, architecture.ConfiguredModelArchitecture):
    model.model_rebuild(_types_namespace={"torch": torch, **vars(architecture)})

if __name__ == "__main__":
    main()
