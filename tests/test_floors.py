"""Who may import whom, and what an import may not do."""

import ast
import os
import pathlib
import subprocess
import sys

import keras
import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "keras_fcn"
# A module imports from lower floors only, never sideways.
FLOORS = [
    ["geometry", "labels", "files", "progress", "caffe", "kernels"],
    [
        "images",
        "weights",
        "manifest",
        "layers",
        "metrics",
        "download",
        "devices",
    ],
    [
        "features",
        "dense",
        "porting",
        "hub",
        "datasets.archives",
        "datasets.batches",
        "datasets.folder",
        "datasets.hha",
        "datasets.matlab",
        "evaluation",
        "snapshots",
        "exporting",
        "training",
    ],
    [
        "backbones",
        "summary",
        "callbacks",
        "checkpoints",
        "protocols",
        "datasets.building",
    ],
    [
        "models",
        "datasets.camvid",
        "datasets.catalog",
        "datasets.nyudv2",
        "datasets.pascal_context",
        "datasets.sbd",
        "datasets.siftflow",
    ],
    ["saving", "datasets.voc"],  # seg11valid is what SBD does not train on
    ["batch_norm"],
    ["cli_data"],
    ["cli_train"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}
# Doors to code execution and half-written files (docs say what is used instead).
FORBIDDEN = {"pickle", "load_model", "get_file", "extract_archive", "Lambda"}


def imports(path):
    """Yields the full name of everything that a module imports."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_lower_floors_only(name):
    for imported in imports(MODULES[name]):
        inner = imported.removeprefix("keras_fcn.")
        used = [module for module in FLOOR if f"{inner}.".startswith(f"{module}.")]
        if imported.startswith("keras_fcn.") and used:
            assert FLOOR[used[0]] < FLOOR[name], imported


def imports_at_once(path):
    """Yields the names that a module imports when it is imported."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.name for alias in node.names)
            yield getattr(node, "module", "")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_knows_keras_and_no_backend(name):
    # Each backend has an engine of its own for several devices, which Keras does not
    # hide, and kernels that Keras does not use: two modules name them, each in the
    # functions of that backend alone.
    known = imports_at_once if name in ("devices", "kernels") else imports
    for imported in known(MODULES[name]):
        assert imported.split(".")[0] not in ("tensorflow", "jax", "torch"), imported
        assert not imported.startswith("keras.src"), imported
        if not name.startswith("datasets"):
            assert imported.split(".")[0] not in ("tensorflow_datasets", "scipy")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_opens_no_door_to_hostile_files(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Attribute | ast.Name):
            assert getattr(node, "attr", getattr(node, "id", None)) not in FORBIDDEN
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "safe_mode"):
            assert ast.unparse(node) in ("allow_pickle=False", "safe_mode=True")


QUIET = """
import sys
events = []
def hook(event, arguments):
    if event.startswith("socket.") and event not in ("socket.gethostname",):
        events.append((event, str(arguments)))
    mode = arguments[1] if event == "open" else None
    if isinstance(mode, str) and set(mode) & set("wax+"):
        events.append((event, str(arguments)))
import keras
before = set(sys.modules)
sys.addaudithook(hook)
import keras_fcn
print([e for e in events if "/dev/null" not in e[1]])
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_importing_the_package_is_quiet(tmp_path):
    environment = {
        **os.environ,
        "PYTHONDONTWRITEBYTECODE": "1",
        "KERAS_BACKEND": keras.backend.backend(),
    }
    done = subprocess.run(
        [sys.executable, "-c", QUIET],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    events, modules = map(ast.literal_eval, done.stdout.splitlines()[-2:])
    assert events == []
    others = {"tensorflow", "jax", "torch", "tensorflow_datasets", "matplotlib"}
    assert not set(modules) & (others | {"huggingface_hub", "google", "rich", "scipy"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_a_backend_that_is_not_installed_is_named(backend, tmp_path):
    program = f"""
import sys
sys.modules[{backend!r}] = None  # Python's own sign for what cannot be imported
import keras_fcn
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "KERAS_BACKEND": backend, "KERAS_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    wanted = f"wants the backend {backend}, which is not installed"
    assert wanted in done.stderr.splitlines()[-1]
