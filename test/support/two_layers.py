"""Makes the model that the servers of tests share: two of the demo model's four layers.

They show what all four would. A decode step takes two thirds of the time.
"""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from sglang_shift.models.demo import demo_model_path

LAYERS = 2


@functools.cache
def two_layer_model() -> str:
    """Return the folder of the model. It is written once, and removed when this process ends."""
    root = tempfile.mkdtemp(prefix="sglang_shift_two_layers_")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = Path(shutil.copytree(demo_model_path(), Path(root, "demo_model")))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if layer(name) < LAYERS}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def layer(name: str) -> int:
    """Return the layer of a tensor, or -1 if it belongs to none."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1
