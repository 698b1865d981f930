"""The house keeps its shape: one direction of imports, nothing leaks, the wheel holds every folder."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = sorted(p.parent.name for p in ROOT.glob("*/__init__.py"))
#: What each folder may import; DESIGN: schemas ← store ← {rollouts, pipeline, worldmodel} ← commands ← cli.
MAY_IMPORT = {
    "schemas": {"schemas"},
    "store": {"schemas", "store"},
    "rollouts": {"schemas", "store", "rollouts"},
    "pipeline": {"schemas", "store", "pipeline"},
    "worldmodel": {"schemas", "store", "worldmodel"},
    "commands": {"schemas", "store", "rollouts", "pipeline", "worldmodel", "commands"},
}
RAY_FILES = {
    "schemas/clusters.py",
    *(f"{stage}/ray_engine.py" for stage in ("rollouts", "pipeline", "worldmodel")),
    "commands/doctor.py",
}
NO_TORCH = ("schemas", "store", "rollouts")
TORCH_FILES = {"store/loading.py"}  # windows as tensors; windows as arrays need no torch


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        names = imports(path)
        inside = {n.split(".")[1] for n in names if n.startswith("pvrpipe.")}
        assert inside <= MAY_IMPORT[folder], path
        assert not names & {*FOLDERS, "cli"}, f"{path} imports a bare folder name"
        if f"{folder}/{path.name}" not in RAY_FILES:
            assert not any(n.split(".")[0] == "ray" for n in names), path
        if folder in NO_TORCH and f"{folder}/{path.name}" not in TORCH_FILES:
            assert not any(n.split(".")[0] in ("torch", "timm", "transformers") for n in names), path


def test_files_are_small_enough_to_read() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for f in FOLDERS
        for p in (ROOT / f).glob("*.py")
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert long == {}


def test_packages_are_the_folders_that_hold_one() -> None:
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(["pvrpipe", *(f"pvrpipe.{folder}" for folder in FOLDERS)])
    assert {p.name for p in ROOT.glob("*.py")} == {"__init__.py", "cli.py"}


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "uv",
        "build",
        "-q",
        "--wheel",
        "--no-build-isolation",
        "-o",
        str(tmp_path),
        str(ROOT),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names} == {
        "pvrpipe",
        f"pvrpipe-{PROJECT['project']['version']}.dist-info",
    }
    sources = {f"pvrpipe/{p.relative_to(ROOT)}" for f in FOLDERS for p in (ROOT / f).glob("*.py")}
    assert sources | {"pvrpipe/cli.py", "pvrpipe/py.typed", "pvrpipe/schemas/manifest-v1.schema.json"} <= set(
        names
    )


def test_importing_pvrpipe_is_light() -> None:
    heavy = "torch ray timm transformers polars pyarrow mujoco dm_control tensorboard"
    code = f"import sys, pvrpipe, pvrpipe.cli; print([m for m in '{heavy}'.split() if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_lock_holds_exact_versions_and_no_address() -> None:
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"
    ]
    assert all("==" in line for line in lines)
    assert not any("://" in line or line.startswith("-") for line in lines)
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    for requirement in wanted:
        name = requirement.split(">")[0].split("[")[0].split("<")[0].strip().lower().replace("_", "-")
        assert name in locked, f"{name} is not locked; run the command in CONTRIBUTING.md"
