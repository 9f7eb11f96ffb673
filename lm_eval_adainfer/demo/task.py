"""The task class of the demo: its data set is generated, not downloaded."""

from __future__ import annotations

from typing import Any

from lm_eval_adainfer.demo import data
from lm_eval_adainfer.tasks.qa import QATask


class DemoTask(QATask):
    """A demo task; ``dataset_name`` in its YAML is one of ``data.TASKS``."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Generate the documents instead of loading a data set of the hub."""
        self.dataset = data.load(str(self.config.dataset_name))
