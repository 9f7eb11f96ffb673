"""Writes the YAMLs that differ only in a name: `python task_configs/_generate.py`. Not needed to run them."""

from pathlib import Path

from lm_eval_adainfer.tasks.mmlu import CATEGORIES, SUBJECTS

HERE = Path(__file__).parent
WORDS = """antonym capitalize capitalize_first_letter capitalize_last_letter capitalize_second_letter
    country-capital country-currency english-french english-german english-spanish landmark-country
    lowercase_first_letter lowercase_last_letter national_parks next_capital_letter next_item park-country
    person-instrument person-occupation person-sport present-past prev_item product-company sentiment
    singular-plural synonym word_length"""


def _group(name: str, alias: str, members: list[str]) -> str:
    lines = "".join(f"  - {member}\n" for member in members)
    aggregate = "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    return f"group: {name}\ngroup_alias: {alias}\ntask:\n{lines}{aggregate}metadata:\n  version: 1.0\n"


def files() -> dict[str, str]:
    """Path below ``task_configs`` -> text of the file."""
    out = {}
    for subject, category in SUBJECTS.items():
        out[f"mmlu/{subject}.yaml"] = (
            f"include: _mmlu_template_yaml\ntask: adainfer_mmlu_{subject}\ntask_alias: {subject}\n"
            f"tag: adainfer_mmlu_{category}_tasks\ndataset_name: {subject}\n"
        )
    for category in CATEGORIES:
        name = f"adainfer_mmlu_{category}"
        out[f"mmlu/_{category}.yaml"] = _group(name, category, [f"{name}_tasks"])
    out["mmlu/_mmlu.yaml"] = _group(
        "adainfer_mmlu", "adainfer_mmlu", [f"adainfer_mmlu_{category}" for category in CATEGORIES]
    )
    tasks = {word: f"adainfer_word_{word.replace('-', '_')}" for word in WORDS.split()}
    for word, task in tasks.items():
        out[f"word/{word}.yaml"] = (
            f"include: _word_template_yaml\ntask: {task}\ntask_alias: {word}\ndataset_name: {word}\n"
        )
    out["word/_word.yaml"] = _group("adainfer_word", "adainfer_word", list(tasks.values()))
    return out


if __name__ == "__main__":
    for name, text in files().items():
        (HERE / name).write_text(text, encoding="utf-8")
