"""lm-eval's side: the model type, the answers that carry an exit record, and the metrics beside ``acc``."""
