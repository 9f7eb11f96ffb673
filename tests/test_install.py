"""The wheel, installed for real: what it carries, and that the stock ``lm_eval`` command finds it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm_eval_adainfer import registration

REPO = Path(__file__).resolve().parents[1]


def run(*command, **kwargs):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=REPO)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """A fresh environment with the wheel; what it depends on is borrowed from the one the tests run in."""
    where = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", "--without-pip", where)
    site = next((where / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # what pip does with a pure wheel, but for the scripts
    (site / "zz_borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # its own .pth files are not read
    return where / "bin" / "python"


def test_the_wheel_carries_tasks_stoppers_and_the_demo(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        size = sum(i.file_size for i in archive.infolist() if "/demo/" in i.filename)
    expected = [
        "lm_eval_adainfer.pth",
        "lm_eval_adainfer/task_configs/_qa_template_yaml",
        "lm_eval_adainfer/task_configs/mmlu/anatomy.yaml",
        "lm_eval_adainfer/task_configs/demo/_demo.yaml",
        "lm_eval_adainfer/stoppers/svm.stopper",
        "lm_eval_adainfer/output/templates/page.html",
        "lm_eval_adainfer/demo/model/model.safetensors",
    ]
    assert not [name for name in expected if name not in names]
    assert size < 8 * 2**20


FIND = """
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
model, tasks = get_model("adainfer"), TaskManager()
import lm_eval_adainfer
print(model.__name__, "adainfer_mmlu_anatomy" in tasks.all_tasks, "adainfer_demo" in tasks.all_groups, get_model("hf").__name__)
print(lm_eval_adainfer.__file__)
"""


def test_stock_lm_eval_finds_model_and_tasks_after_an_install(python):
    found, where = run(python, "-c", FIND, cwd=python.parent).splitlines()[-2:]
    assert found == "AdaInferLM True True HFLM"
    assert str(python.parent.parent) in where  # the installed wheel, not this checkout


def test_start_up_imports_nothing_heavy(python):
    heavy = "sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'transformers', 'lm_eval', 'numpy', 'typing'})"
    assert run(python, "-c", f"import sys; print('lm_eval_adainfer' in sys.modules, {heavy})", cwd=python.parent) == "True []\n"


def test_a_left_over_pth_without_the_package_is_silent(python, tmp_path):
    line = (REPO / "lm_eval_adainfer.pth").read_text()
    code = "import sys; sys.modules['lm_eval_adainfer'] = None\n" + line + "print('fine')"
    assert run(sys.executable, "-S", "-c", code) == "fine\n"


def test_user_paths_and_include_defaults_false_are_respected(tmp_path):
    from lm_eval.tasks import TaskManager

    (tmp_path / "mine.yaml").write_text("task: my_task\ndataset_path: json\noutput_type: loglikelihood\n")
    only = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert "my_task" in only.all_tasks and not any(t.startswith("adainfer_") for t in only.all_tasks)
    assert only.include_path == str(tmp_path)


def test_installing_twice_registers_once():
    before = list(sys.meta_path)
    registration.install()
    assert sys.meta_path == before


def test_newer_lm_eval_with_plugins_is_left_alone(monkeypatch):
    from lm_eval.api import registry

    monkeypatch.setattr(registry, "load_plugins", lambda: None, raising=False)
    monkeypatch.setattr(registry.model_registry, "register", lambda *a, **k: pytest.fail("registered"))
    registration._register_model(None)


ENTRY_POINTS = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["entry-points"]


def folder_of(value):
    """The folder of a package that an entry point of the group ``lm_eval.tasks`` names, as lm-eval finds it."""
    return Path(next(iter(importlib.util.find_spec(value).submodule_search_locations))).resolve()


def discovered():
    return [folder_of(value) for value in ENTRY_POINTS["lm_eval.tasks"].values()]


def a_release(**names):
    """A stand-in for ``lm_eval.tasks.manager`` whose task manager keeps which folders it would scan."""

    class Manager:
        def __init__(self, verbosity=None, include_path=None, include_defaults=True, metadata=None):
            own = include_path if isinstance(include_path, list) else [include_path] if include_path else []
            plugins = [str(path) for path in names["discover_plugin_task_paths"]()] if names else []
            self.scanned = [*(["stock"] if include_defaults else []), *plugins, *own]

    return SimpleNamespace(TaskManager=Manager, **names)


def test_the_entry_points_name_the_model_and_the_folder_of_the_tasks():
    from lm_eval_adainfer import paths
    from lm_eval_adainfer.harness.model import AdaInferLM

    ((name, target),) = ENTRY_POINTS["lm_eval.models"].items()
    assert (name, target) == (registration.MODEL_NAME, registration.MODEL_TARGET)
    assert EntryPoint(name, target, "lm_eval.models").load() is AdaInferLM
    assert list(ENTRY_POINTS["lm_eval.tasks"].values()) == [registration.TASKS_MODULE]
    assert discovered() == [paths.task_configs().resolve()]


def test_an_installed_wheel_has_the_entry_points_and_the_folder(python):
    script = """
import importlib.util, json
from importlib.metadata import entry_points
found = {g: [e.value for e in entry_points(group=g) if e.name == "adainfer"] for g in ("lm_eval.models", "lm_eval.tasks")}
spec = importlib.util.find_spec("lm_eval_adainfer.task_configs")
print(json.dumps([found, list(spec.submodule_search_locations)]))
"""
    found, (folder,) = json.loads(run(python, "-c", script, cwd=python.parent).splitlines()[-1])
    assert {group: {"adainfer": values[0]} for group, values in found.items()} == ENTRY_POINTS
    assert str(python.parent.parent) in folder and (Path(folder) / "demo" / "_demo.yaml").is_file()


def test_the_folder_of_the_tasks_is_scanned_once_with_and_without_plugins(monkeypatch):
    from lm_eval_adainfer import paths

    ours = str(paths.task_configs())
    before, with_plugins = a_release(), a_release(discover_plugin_task_paths=discovered)
    stock = with_plugins.TaskManager.__init__
    for module in (before, with_plugins):
        registration._add_tasks(module)
        registration._add_tasks(module)
        assert module.TaskManager().scanned == ["stock", ours]
        assert module.TaskManager(include_path="mine").scanned == ["stock", ours, "mine"]
    assert with_plugins.TaskManager.__init__ is stock  # nothing is attached to it
    assert before.TaskManager(include_defaults=False).scanned == []


def test_a_plugin_of_others_is_not_taken_for_ours(tmp_path):
    from lm_eval_adainfer import paths

    module = a_release(discover_plugin_task_paths=lambda: [tmp_path])  # as where only our .pth is there
    registration._add_tasks(module)
    assert module.TaskManager().scanned == ["stock", str(tmp_path), str(paths.task_configs())]


@pytest.mark.parametrize("plugins", [True, False])
def test_our_commands_let_the_folder_be_scanned_once(plugins, monkeypatch):
    from lm_eval.tasks import manager

    from lm_eval_adainfer import paths
    from lm_eval_adainfer.harness import loading

    asked = []

    def maker(include_path=None, include_defaults=True, metadata=None):
        asked.append((include_path, include_defaults))
        return SimpleNamespace(all_tasks=["adainfer_demo"])

    monkeypatch.setattr("lm_eval.tasks.TaskManager", maker)
    if plugins:
        monkeypatch.setattr(manager, "discover_plugin_task_paths", discovered, raising=False)
    loading.task_manager({}, None, names=["adainfer_demo"])
    assert asked == [(None if plugins else str(paths.task_configs()), False)]


def test_our_names_collide_with_no_stock_task_group_or_tag():
    from lm_eval_adainfer import paths

    lines = [
        line.split(":", 1)[1].strip()
        for file in paths.task_configs().rglob("*yaml")
        for line in file.read_text().splitlines()
        if line.startswith(("task: ", "group: ", "tag: "))
    ]
    assert len(lines) > 90 and all(name.startswith("adainfer_") for name in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model_args", "pretrained=adainfer-demo,stopper=gap:7", "--tasks", "adainfer_demo_fact"], ["gap:7", "0 and 1"]),
        (["--model_args", "pretrained=adainfer-demo", "--tasks", "no_such_task"], ["no_such_task"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments, words):
    command = [sys.executable, "-m", "lm_eval_adainfer", "--model", "adainfer", *arguments, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("adainfer: error: ") and all(word in last for word in words)
    assert "Traceback" not in done.stderr
