"""Documents through the blocks: batches, shared prefixes, the forward that rows can leave, the engine."""
