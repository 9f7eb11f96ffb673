"""The ``adainfer`` command: ``main`` is the program, ``options`` what commands share, each other file a command."""
