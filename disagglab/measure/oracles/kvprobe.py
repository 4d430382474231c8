"""vLLM's own accounting of a model's KV cache, without weights and without a server.

Run as a program in a node's environment: ``python -m disagglab.measure.oracles.kvprobe JOBS.json`` with a
list of jobs; prints one JSON object a job. vLLM builds the model of each ``config.json`` on PyTorch's meta
device, which allocates nothing, asks every attention layer for its KV cache spec, groups them, and divides
the memory budget into blocks: the same functions that a starting server calls.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disagglab.hosts.host import Host
from disagglab.kv import attention
from disagglab.kv.modelconfig import FILE, ORIGIN_KEY

# The language model inside a multimodal one is built by itself: its images have no part in the KV cache of
# text.
TEXT_ARCHITECTURES = {"gemma3_text": "Gemma3ForCausalLM", "gemma4_text": "Gemma4ForCausalLM"}
PROGRAM = ("-m", "disagglab.measure.oracles.kvprobe")
MAX_MODEL_LEN = 1024  # tokens; one request of it has to fit into the smallest budget asked for
WEIGHTS_KEYS = ("quantization_config",)  # its loaders may need a GPU; the cache has a dtype of its own


def ask(
    host: Host, python: str, jobs: Sequence[Mapping[str, Any]], limit_s: float
) -> dict[str, dict[str, Any]]:
    """What vLLM on a host makes of jobs, by their names; all in one program run.

    Args:
        python: Python there that has vLLM.

    Raises:
        LabError: if the program fails or exceeds ``limit_s``.
    """
    path = f"{host.about['logs']}/kvprobe-jobs.json"
    host.write_text(path, json.dumps(jobs))
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    said = host.run("kvprobe", [python, *PROGRAM, path], env, limit_s)
    rows = [json.loads(line) for line in said if line.startswith("{")]
    return {row["name"]: row for row in rows}


def account(job: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM makes of one job: ``{"config": {...}, "kv_dtype": "auto", "budget": bytes, "tp": [1, 2]}``.

    Returns:
        ``layers`` with a cache, ``block_size``, ``bytes_per_block`` of the pool, ``blocks``, ``hybrid``,
        ``groups`` (kind, layers, block_size, page_bytes by layer, window), and ``kv_heads`` by TP size.
    """
    import torch
    from vllm.config import ParallelConfig, get_layers_from_vllm_config, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec, iter_layer_specs
    from vllm.v1.worker.worker_base import get_current_attn_backends, get_supported_kv_cache_layouts

    config = _buildable(job["config"])
    _register(config.get("architectures") or [])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_text(json.dumps(config))
        engine = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            enforce_eager=True,
            dtype=job.get("dtype", "bfloat16"),
            kv_cache_dtype=job.get("kv_dtype", "auto"),
            block_size=job.get("block_size"),
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=MAX_MODEL_LEN,
            disable_hybrid_kv_cache_manager=None if job.get("hybrid", True) else True,
        ).create_engine_config()
        with set_current_vllm_config(engine):
            store = f"file://{folder}/store"
            parallel_state.init_distributed_environment(1, 0, store, 0, backend="gloo")
            parallel_state.initialize_model_parallel(1, 1)
            torch.set_default_dtype(engine.model_config.dtype)
            try:
                with torch.device("meta"):
                    model = initialize_model(vllm_config=engine)
                specs = {}
                for name, layer in get_layers_from_vllm_config(engine, AttentionLayerBase).items():
                    if isinstance(layer, Attention) and layer.kv_sharing_target_layer_name:
                        continue
                    spec = layer.get_kv_cache_spec(engine)
                    if spec is not None:
                        attends = isinstance(spec, AttentionSpec)
                        specs[name] = layer.get_attn_backend().customize_spec(spec) if attends else spec
                backends = get_current_attn_backends(engine)
                names = [known.name for known in get_supported_kv_cache_layouts(backends)]
                order = resolve_kv_cache_layout(engine, [names], list(specs.values()))
                kept = kv_cache_utils.get_kv_cache_configs(engine, [specs], [job["budget"]])[0]
                del model
            finally:
                torch.set_default_dtype(torch.float32)
                parallel_state.destroy_model_parallel()
                parallel_state.destroy_distributed_environment()
    groups = []
    for group in kept.kv_cache_groups:
        rows = list(iter_layer_specs(group.kv_cache_spec))
        if len(rows) == 1:
            rows *= len(group.layer_names)
        slides = isinstance(rows[0], SlidingWindowSpec)  # full attention notes a window it does not free by
        groups.append(
            {
                "kind": type(rows[0]).__name__,
                "layers": len(group.layer_names),
                "block_size": group.kv_cache_spec.block_size,
                "page_bytes": [row.page_size_bytes for row in rows],
                "window": rows[0].sliding_window if slides else None,
            }
        )
    heads = {}
    for tp in job.get("tp", ()):
        parallel = ParallelConfig.__new__(ParallelConfig)
        object.__setattr__(parallel, "tensor_parallel_size", tp)
        heads[str(tp)] = engine.model_config.get_num_kv_heads(parallel)
    return {
        "layers": len(specs),
        "layout": order.name,
        "block_size": engine.cache_config.block_size,
        "bytes_per_block": kept.kv_cache_tensors[0].size // kept.num_blocks,
        "blocks": kept.num_blocks,
        "hybrid": not engine.scheduler_config.disable_hybrid_kv_cache_manager,
        "groups": groups,
        "kv_heads": heads,
    }


def _buildable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that vLLM needs to build the language model."""
    text = attention.text_config(config)
    if text is not config:
        text = {**text, "architectures": [TEXT_ARCHITECTURES[text["model_type"]]]}
    return {key: value for key, value in text.items() if key not in (ORIGIN_KEY, *WEIGHTS_KEYS)}


def _register(architectures: list[str]) -> None:
    """Import the model class here; else vLLM starts a Python for each, only to look at it (10 s)."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import registry

    for name in architectures:
        known = ModelRegistry.models.get(name)
        if isinstance(known, registry._LazyRegisteredModel):
            ModelRegistry.models[name] = registry._RegisteredModel.from_model_cls(known.load_model_cls())


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            print(json.dumps({"name": job["name"], **account(job)}), flush=True)
        except Exception:  # noqa: BLE001 - a model that vLLM cannot build must not hide the others
            print(json.dumps({"name": job["name"], "error": traceback.format_exc()}), flush=True)
