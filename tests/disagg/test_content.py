"""What came out is what one server alone would have said, and what another implementation says.

Tie policy: greedy decoding picks the larger of two log-probabilities; where they lie closer than what the
dtype rounds, either choice is right and the rest of the text differs. So probes are compared token for token
only if the single server's smallest gap over the whole answer exceeds GAP_NATS, and the test fails if too few
probes qualify.
"""

from __future__ import annotations

import json
import sys

from disagglab import client, ledger
from disagglab.host import LocalHost
from disagglab.kv import KvShape
from disagglab.ledger import Sent
from disagglab.model import Model
from disagglab.recorder import Recorder
from disagglab.section import Lab
from disagglab.topology import Topology

GAP_NATS = 0.2  # bf16 keeps 8 bits: logits near 16 are rounded to 1/16, and two roundings meet in a gap
OUTPUT_TOKENS = 8
QUALIFYING = 3
REFERENCE_LIMIT_S = 300.0
PROBES = (
    "The capital of France is",
    "1, 2, 3, 4, 5, 6, 7, 8, 9,",
    "Monday, Tuesday, Wednesday, Thursday,",
    "A B C D E F G H I J K L",
    "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a",
    "January, February, March, April, May,",
    "To be, or not to be, that is the",
    "2, 4, 6, 8, 10, 12, 14, 16,",
    "red green blue red green blue red green blue red green",
    "a b a b a b a b a b a b a b a",
    "<ul><li>one</li><li>one</li><li>one</li><li>one</li>",
    "10 20 30 40 50 60 70",
    "yes no yes no yes no yes no yes no yes",
    "one two three four one two three four one two three four one two",
    "Zürich, Genève, Łódź, 東京, 北京. Zürich, Genève, Łódź, 東京,",
)


def test_greedy_output_equals_the_single_servers(
    single: Topology, disaggregated: Topology, lab: Lab, shape: KvShape, record: Recorder
) -> None:
    """Token for token the same as the single server at temperature 0, on every probe without a near tie."""
    qualified, differing = 0, []
    before = ledger.read(disaggregated)
    sent = []
    for probe in PROBES:
        alone = client.complete(single.router.url, client.body(single.served_name, probe, OUTPUT_TOKENS))
        if min(alone.top2_gap) < GAP_NATS:
            continue
        qualified += 1
        # the single server is the prefill node too; its counters are read around this request alone
        before = ledger.read(disaggregated)
        apart = client.complete(
            disaggregated.router.url, client.body(single.served_name, probe, OUTPUT_TOKENS)
        )
        sent = [Sent(apart.prompt_tokens, apart.output_tokens)]
        after = ledger.settle(disaggregated, before, 1)
        ledger.prove(disaggregated, before, after, sent, shape, lab.vllm.version)
        if apart.token_ids != alone.token_ids:
            differing.append((probe, alone.text, apart.text))
    record.numbers(
        "probes compared token for token",
        [qualified],
        "probes",
        what="count",
        note=f"of {len(PROBES)}; the others have a gap below {GAP_NATS} nat somewhere",
    )
    assert qualified >= QUALIFYING, (
        f"only {qualified} of {len(PROBES)} probes are free of near ties; this proves nothing"
    )
    assert not differing, (
        f"{len(differing)} of {qualified} differ, first (prompt, single, disaggregated): {differing[0]}"
    )


def test_output_agrees_with_transformers(
    host: LocalHost, disaggregated: Topology, weights: Model, lab: Lab, record: Recorder
) -> None:
    """On one probe the disaggregated answer is what Hugging Face transformers computes from the same weights.

    Prefill and decode server share one engine; an error in that engine is invisible to any comparison between
    them.
    """
    prompt = client.tokenize(disaggregated.decode[0].url, disaggregated.served_name, PROBES[1])
    answer = client.complete(
        disaggregated.router.url, client.body(disaggregated.served_name, prompt, OUTPUT_TOKENS)
    )
    argv = [sys.executable, "-m", "disagglab.reference", str(weights.folder), lab.model.dtype]
    argv += [str(OUTPUT_TOKENS), json.dumps(prompt)]
    lines = host.run("reference", argv, {"HF_HUB_OFFLINE": "1"}, REFERENCE_LIMIT_S)
    reference = json.loads(next(line for line in lines if line.startswith("{")))
    gap = min(reference["top2_gap"])
    record.numbers("smallest top-2 gap of the transformers probe", [gap], "nat", what="probes")
    assert gap > GAP_NATS, f"the probe has a near tie ({gap:.2f} nat) and cannot tell; choose another"
    assert list(answer.token_ids) == reference["token_ids"]
