"""Environment variables by which a lab's settings reach vLLM's processes: the plugin in them, and vLLM."""

DELAY_VARIABLE = "DISAGGLAB_NIXL_PROGRESS_DELAY_US"
CPUS_VARIABLE = "DISAGGLAB_NODE_CPUS"
TRACE_VARIABLE = "DISAGGLAB_TRANSFER_TRACE"
CPU_KV_SPACE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"  # vLLM's own: GiB of a CPU server's KV cache
