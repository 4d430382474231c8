"""Greedy tokens by transformers: an oracle that shares no code path with vLLM. Run as a program:

    python -m disagglab.measure.oracles.transformers_greedy MODEL_FOLDER DTYPE OUTPUT_TOKENS PROMPT_TOKEN_IDS

with the ids as a JSON list.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def greedy(
    folder: Path, dtype: str, prompt: list[int], output_tokens: int
) -> dict[str, list[float] | list[int]]:
    """Greedy continuation of ``prompt``.

    Returns:
        ``token_ids`` and ``top2_gap`` (log-probability of the best minus the second best token, nats), by
        position.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval()
    tokens, gaps = list(prompt), []
    with torch.inference_mode():
        cache = None
        inputs = torch.tensor([tokens])
        for _ in range(output_tokens):
            output = model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = torch.log_softmax(output.logits[0, -1].float(), dim=-1).topk(2)
            gaps.append(float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
            inputs = torch.tensor([tokens[-1:]])
    return {"token_ids": tokens[len(prompt) :], "top2_gap": gaps}


if __name__ == "__main__":
    print(json.dumps(greedy(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[4]), int(sys.argv[3]))))
