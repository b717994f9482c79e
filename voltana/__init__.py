"""voltana: LLM serving on as little energy as its latency promises allow."""
