"""The documents keep up with the tree."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("", "pocketllm", "csrc")


def named(page: str) -> list[str]:
    """File names and patterns in backticks."""
    return re.findall(r"`([\w./*]+)`", (ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "folder, patterns", [("pocketllm", ["[!_]*.py"]), ("csrc", ["*.c", "*.h"])]
)
def test_architecture_names_every_file(folder: str, patterns: list[str]) -> None:
    names = named("docs/ARCHITECTURE.md")
    files = [path.name for pattern in patterns for path in (ROOT / folder).glob(pattern)]
    assert files
    assert not [file for file in files if not any(fnmatch(file, name) for name in names)]


@pytest.mark.parametrize("page", ["docs/ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_named_files_exist(page: str) -> None:
    for name in named(page):
        if re.search(r"\.(py|c|h|md)$", name):
            found = [path for folder in FOLDERS for path in (ROOT / folder).glob(name)]
            assert found, name


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/ARCHITECTURE.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
