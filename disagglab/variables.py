"""Environment variables by which a lab's settings reach the plugin in vLLM's processes."""

DELAY_VARIABLE = "DISAGGLAB_NIXL_PROGRESS_DELAY_US"
CPUS_VARIABLE = "DISAGGLAB_NODE_CPUS"
TRACE_VARIABLE = "DISAGGLAB_TRANSFER_TRACE"
