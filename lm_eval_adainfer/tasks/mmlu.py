"""MMLU has five few-shot examples per subject; this task knows where further ones come from, and says so."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import datasets

from lm_eval_adainfer.tasks.qa import Doc, QATask

eval_logger = logging.getLogger(__name__)

# The 57 subjects (Hendrycks et al. 2021) with the categories of lm-eval's stock `mmlu`.
CATEGORIES: dict[str, str] = {
    "stem": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""",
    "social_sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
}
SUBJECTS: dict[str, str] = {subject: name for name, subjects in CATEGORIES.items() for subject in subjects.split()}


@cache
def dev_examples(dataset_path: str, subject: str) -> tuple[Doc, ...]:
    """The five ``dev`` examples of a subject, loaded once per process; empty if the subject can't be had."""
    try:
        return tuple(datasets.load_dataset(dataset_path, subject, split="dev"))
    except (OSError, ValueError) as error:  # not in the cache and no network
        eval_logger.warning("MMLU subject %s is not available as a source of shots: %s", subject, error)
        return ()


class MMLUTask(QATask):
    """One MMLU subject. Shots: its ``dev`` (5), then its ``validation``, then ``dev`` of the other subjects.

    ``metadata.fewshot_sources`` in the results counts them; a source that isn't there is listed with 0.
    """

    def __init__(self, config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._warned = False
        super().__init__(config, **kwargs)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """As lm-eval's; a copy of the data without ``validation`` will do, also where lm-eval loads splits by name."""
        try:
            super().download(dataset_kwargs, **kwargs)
        except ValueError:  # of datasets: unknown split
            split, self.config.validation_split = self.config.validation_split, None
            try:
                super().download(dataset_kwargs, **kwargs)
            finally:
                self.config.validation_split = split

    def shot_pools(self) -> Iterator[tuple[str, Sequence[Doc]]]:
        """The subject's own examples first; whatever lies beyond is loaded only if it is asked for."""
        yield from super().shot_pools()
        if not self._warned:
            self._warned = True
            eval_logger.warning(
                "%s: a subject has 5 dev examples; further shots come from its validation split, then from other "
                "subjects' dev (the results say how many: metadata.fewshot_sources).",
                self.config.task,
            )
        validation = self.dataset.get("validation") or ()
        yield "validation" if len(validation) else "validation (not available)", validation
        others = [subject for subject in SUBJECTS if subject != self.config.dataset_name]
        path = str(self.config.dataset_path)
        yield "dev of other subjects", [doc for subject in others for doc in dev_examples(path, subject)]
