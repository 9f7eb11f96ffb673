"""An interruption at a drawn moment, in this process (``killed`` has those that end a process)."""

from __future__ import annotations


class InterruptAt:
    """Counts its calls, and is the user's Ctrl-C at one of them.

    Args:
        number: Of the call, from 1.
    """

    def __init__(self, number):
        self.number, self.calls = number, 0

    def __call__(self):
        self.calls += 1
        if self.calls == self.number:
            raise KeyboardInterrupt
