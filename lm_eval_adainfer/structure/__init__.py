"""What a model is made of: its blocks, final norm and head, found by watching; rounding; blocks taken out."""
