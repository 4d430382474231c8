"""Writes the model of a GGUF file as a safetensors folder. Run as a program, because it imports torch:

python -m disagglab.hosts.gguf FILE.gguf FOLDER DTYPE
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

MANIFEST = "disagglab.json"


def convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Load ``gguf``, write it to ``folder`` in ``dtype``, read it back and compare every tensor.

    Raises:
        SystemExit: if what was written differs from what was loaded.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read_once()
    place, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    model: Any = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=getattr(torch, dtype))
    # save_pretrained refuses a model that still calls itself quantized; its tensors are plain by now
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written = load_file(folder / "model.safetensors")
    state = model.state_dict()
    different = [key for key, tensor in written.items() if not torch.equal(tensor, state[key])]
    if different or not written:
        sys.exit(
            f"{folder}: {len(different)} of {len(written)} tensors differ from the GGUF file: {different[:3]}"
        )
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    manifest = {"source": name, "dtype": dtype, "sizes": {path.name: path.stat().st_size for path in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def read_once() -> None:
    """Let transformers read a file once, and make the table of tensor names of an architecture once.

    transformers 5 makes a reader for the config, the tokenizer and the weights each, whose 10^5 words of the
    vocabulary take seconds, and the table for every module of the model. Neither changes once it is made.
    """
    package: object = importlib.import_module("gguf")
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(package, name, functools.cache(getattr(package, name)))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
