"""The README is executed: its commands, in order, and its Python."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
#: What makes the README's commands fit a test; the commands themselves are taken as they stand.
SMALLER = {
    "collect": "--size 32 --episodes 3 --max-steps 24 --policy random --engine inline",
    "embed": "--weights random:0 --batch 4 --engine inline --device cpu",
    "train-model": "--updates 2 --batch 2 --length 8 --device cpu",
    "probe": "--device cpu",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_daily_way_of_the_readme_works_as_typed(tmp_path: Path) -> None:
    (block,) = [b for b in blocks("bash") if "pvrpipe collect" in b]
    lines = [line.split("#")[0].strip() for line in block.splitlines()]
    assert [shlex.split(line)[1] for line in lines] == list(SMALLER)
    for line in lines:
        program, command, *rest = shlex.split(line)
        arguments = [str(Path(sys.executable).parent / program), command, *rest, *SMALLER[command].split()]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (python,) = blocks("python")
    code = python.replace("/vc1", "/vc1-random-0").replace("length=64", "length=16")
    code += "\nassert batch['embedding'].shape == (16, 16, 768), batch['embedding'].shape"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    (block,) = [b for b in blocks("bash") if "make demo" in b]
    makefile = (ROOT / "Makefile").read_text()
    for line in block.splitlines():
        assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line


def test_files_that_the_documents_name_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_row_of_the_reliability_table_is_a_test_that_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 25
    for file, function in named:
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), function
