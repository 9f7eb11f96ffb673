"""What a user would pick instead, beside this package: the same model, tasks and documents; nothing of it is imported
by the package. ``python -m benchmarks.peers`` runs them all, ``python -m benchmarks.peers.NAME`` runs one.
"""
