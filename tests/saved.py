"""Model files as another version of flowpost, or a stranger, would have written them."""

import hashlib
import json

from safetensors.torch import load, save

REAL = {"type": "Real", "size": 1}


def files_of(path):
    return sorted(path.iterdir()) if path.is_dir() else [path]


def rewrite(path, change):
    """Change the description in a directory and sign it anew."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config)
    blank = json.dumps({**config, "sha256": "0" * 64})
    weights = (path / "weights.safetensors").read_bytes()
    config["sha256"] = hashlib.sha256(blank.encode() + weights).hexdigest()
    file.write_text(json.dumps(config))


def rewrite_tensors(path, change):
    """Change the tensors in a directory, a dict, and sign them anew."""
    file = path / "weights.safetensors"
    tensors = load(file.read_bytes())
    change(tensors)
    file.write_bytes(save(tensors))
    rewrite(path, lambda config: None)


def nest(config, depth):
    """A space as deep in products."""
    for _ in range(depth):
        config = {"type": "Product", "spaces": [["a", config]]}
    return config
