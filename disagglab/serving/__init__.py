"""What answers requests: vLLM servers, routers, the topologies that they form."""
