"""The exit strategies: what they share (``base``), the rules, the fitted ones, and their files (``artifact``)."""
