"""Run as a program it is ``python -m dynamo.vllm``, also where there is no torchvision.

Whatever model it serves, Dynamo's worker imports a module of transformers for models that see, which imports
torchvision (dynamo/vllm/multimodal_utils/models/qwen.py). PyPI has no torchvision for a CPU build of torch;
vLLM and transformers do without. Where none is installed, empty modules stand in for what is imported; a
model of text never uses it. A torchvision that is installed is left alone.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import runpy
import sys
import types

PROGRAM = "dynamo.vllm"
STOOD_IN = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


def stand_in() -> None:
    """Put empty modules where torchvision's are imported from."""
    for name in STOOD_IN:
        module = types.ModuleType(name, "Stands in for a package that is not installed.")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)


def main() -> None:
    """Run Dynamo's worker in this process, with our arguments."""
    if importlib.util.find_spec("torchvision") is None:
        # transformers remembers its answer; asked after the stand-in, it would be yes and want more of it
        importlib.import_module("transformers.utils.import_utils").is_torchvision_available()
        stand_in()
    runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
