"""One KV transfer at a time, proved to the byte, by asking both servers directly."""

from __future__ import annotations

from dataclasses import replace

from disagglab.config.schema import Lab
from disagglab.kv.shape import KvShape, reusable_tokens
from disagglab.measure import ledger
from disagglab.results.records import Ledger, Sent
from disagglab.serving import openai
from disagglab.serving.topology import Topology
from disagglab.serving.vllm import VllmServer


def transfer(
    topology: Topology,
    length: int,
    number: int,
    lab: Lab,
    shape: KvShape,
    block: int,
    tag: str = "",
    prefill: VllmServer | None = None,
    decode: VllmServer | None = None,
) -> Ledger:
    """Move a prompt of ``length`` tokens; prefill holds it if ``number`` is not 0, decode never does.

    Args:
        number: which transfer of this prompt it is, from 0.
        block: tokens per KV cache block.
        tag: tells prompts from those of other tests.
        prefill, decode: the servers asked; the first of each role by default.

    Raises:
        TransferError: if the transfer failed or moved something else than computed.
        InvalidRun: if the counters do not settle.
    """
    request = openai.body(topology.served_name, openai.prompt_of(length, length), 1)
    held = reusable_tokens(length, block) if number else 0
    before = ledger.read(topology)
    salt = f"transfer{tag}"
    source, target = prefill or topology.prefill[0], decode or topology.decode[0]
    topology = replace(topology, name=f"{topology.name}, {source.name} to {target.name}")
    handshake = openai.prefill(source.url, request | {"cache_salt": salt})
    openai.decode(target.url, request | {"cache_salt": f"{salt}-{length}-{number}"}, handshake)
    after = ledger.settle(topology, before, 1)
    sent = [Sent(length, 1, held_by_prefill=held)]
    return ledger.prove(topology, before, after, sent, shape, lab.vllm.version)
