"""What a refusal is: one error of one line that names what was wrong."""

from __future__ import annotations

import pytest

from lm_eval_adainfer.errors import AdaInferError


def refused(call, *words, exactly=AdaInferError):
    """The call raises an AdaInferError of one line that holds these words."""
    with pytest.raises(exactly) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message
    assert all(word in message for word in words), message
    return message
