"""Variants of a lab: a setting changed, its servers resident beside the lab's own, measured in turns."""

from __future__ import annotations

from collections.abc import Sequence

from disagglab.config.schema import Lab, TransportSection, VariantSection
from disagglab.errors import ConfigError, Problem

GPU_SHARE = 0.9  # of a GPU's memory, for the servers of all deployments together
GIB = 2**30


def transport_of(transport: TransportSection, variant: VariantSection) -> TransportSection:
    """The lab's [transport] with the variant's keys.

    Raises:
        ValidationError: if a key is unknown or a value is wrong.
    """
    own = transport.model_dump()
    for key, value in variant.transport.items():
        own[key] = (
            {**own[key], **value} if isinstance(own.get(key), dict) and isinstance(value, dict) else value
        )
    return TransportSection.model_validate(own)


def changed(lab: Lab, variant: VariantSection) -> Lab:
    """The lab as the variant has it; its ``args`` and ``env`` go before the lab's."""
    vllm = lab.vllm.model_copy(
        update={"args": {**lab.vllm.args, **variant.args}, "env": {**lab.vllm.env, **variant.env}}
    )
    return lab.model_copy(update={"vllm": vllm, "transport": transport_of(lab.transport, variant)})


def chosen(lab: Lab, names: Sequence[str]) -> tuple[VariantSection, ...]:
    """The variants of these names, in the order asked for.

    Raises:
        ConfigError: if the lab file has none of that name, or the same is asked for twice.
    """
    known = {variant.name: variant for variant in lab.variants}
    problems = []
    for position, name in enumerate(names):
        if name not in known:
            mend = f"use one of {', '.join(known)}" if known else "add [[variant]] sections to the lab file"
            problems.append(Problem(lab.file, f"--variant {name}", "no such [[variant]]", mend))
        elif name in names[:position]:
            problems.append(Problem(lab.file, f"--variant {name}", "asked for twice", "name it once"))
    if problems:
        raise ConfigError(problems)
    return tuple(known[name] for name in names)


def beside(lab: Lab, count: int) -> Lab:
    """The lab with servers so small that those of ``count`` variants fit beside them on the same GPUs.

    vLLM is given the size of its KV cache rather than a share of the GPU's memory, because servers that start
    at the same moment on one GPU disturb each other's measurement of what is free.

    Raises:
        ConfigError: if the lab has GPUs and does not say how large the caches are.
    """
    if not count or not any(node.gpus for node in lab.nodes):
        return lab
    if lab.memory.kv_beside_gib is None:
        wrong = "missing, and variants share the GPUs' memory"
        mend = "add kv_beside_gib = 8.0, say"
        raise ConfigError([Problem(lab.where("memory"), "memory.kv_beside_gib", wrong, mend)])
    room = {
        "gpu-memory-utilization": round(GPU_SHARE / (count + 1), 3),
        "kv-cache-memory-bytes": round(lab.memory.kv_beside_gib * GIB),
    }
    return lab.model_copy(update={"vllm": lab.vllm.model_copy(update={"args": {**lab.vllm.args, **room}})})
