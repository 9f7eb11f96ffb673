"""Comparing runs of lm-eval: ``adainfer compare``, ``adainfer check`` and ``adainfer report``."""
