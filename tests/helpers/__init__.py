"""What several test modules share: tiny models, tasks, hand-made files and slow references. No test imports a test.

Scripts that tests start in other processes import it too, so it needs no pytest to be running.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.register_assert_rewrite("helpers.refusals", "helpers.replay")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where cores are busy
