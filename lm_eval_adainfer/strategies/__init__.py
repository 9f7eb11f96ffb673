"""When to stop: the registry of strategies, their classes and features, and how specs and files name them."""
