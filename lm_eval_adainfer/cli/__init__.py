"""The ``adainfer`` command: shared options, and one small file per family of subcommands."""
