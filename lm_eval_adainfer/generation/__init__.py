"""Early exit while decoding: the KV cache by slot, layouts, one step, the loop."""
