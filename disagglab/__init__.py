"""disagg-lab: evidence on whether splitting LLM prefill and decode pays off on given hardware."""

__version__ = "0.1.0"
