"""The KV cache on paper: what layers keep, how vLLM puts it into blocks, bytes and times."""
