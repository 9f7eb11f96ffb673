"""Early exit while decoding: KV cache and policies, layouts, decisions, one step, and the loop that makes a text."""
