"""The wheel holds what git tracks, whichever way it is built."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _tracked() -> list[str]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listing = subprocess.run(
        [git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [name for name in listing.split("\0") if name and os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked files, so that no stale build/ and no untracked file plays a part."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in _tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


def _wheel_files(checkout: Path, out: Path, *options: str) -> set[str]:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *options, checkout]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize(
    "options", [pytest.param(["--wheel"], id="wheel"), pytest.param([], id="sdist-then-wheel")]
)
@pytest.mark.parametrize("symlinks", [True, False], ids=["symlinks", "no-symlinks"])
def test_wheel_holds_what_git_tracks(checkout, tmp_path, options, symlinks):
    source = shutil.copytree(checkout, tmp_path / "source", symlinks=True)
    if not symlinks:  # what git writes where the file system has none
        link = source / "ecomoe" / "integrations"
        link.unlink()
        link.write_text("../integrations")
    files = _wheel_files(source, tmp_path / "dist", *options)
    packaged = {name for name in files if not name.startswith("ecomoe-")}
    tracked = {
        name if name.startswith("ecomoe/") else f"ecomoe/{name}"
        for name in _tracked()
        if name.startswith(("ecomoe/", "integrations/")) and not (ROOT / name).is_symlink()
    }
    assert packaged == tracked
    assert {Path(name).name for name in files - packaged} >= {"METADATA", "RECORD", "LICENSE"}
