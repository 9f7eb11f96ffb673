"""Scripts and commands that are started in processes of their own, or as if they were."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys

from lm_eval_adainfer.cli.main import main
from lm_eval_adainfer.errors import AdaInferError


def in_two_processes(*command, **environment) -> subprocess.CompletedProcess:
    """A script or ``-m module`` with its arguments, on CPUs, through the launcher that people use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    return subprocess.run(
        [str(c) for c in (*launcher, *command)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def execute(command: str, monkeypatch) -> int:
    """As a shell would, but in this process: starting Python for every command takes most of the time."""
    program, *arguments = shlex.split(command)
    if program == "adainfer":
        return main(arguments)
    assert program == "lm_eval", command
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the model type changes it for the command
    try:
        cli_evaluate()
    except AdaInferError as error:  # what it would print (tests/test_install.py)
        print(f"adainfer: error: {error}")
        return 1
    return 0
