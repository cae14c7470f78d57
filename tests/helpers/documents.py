"""The indented blocks of the project's documents: commands, and all else."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.jobs import ROOT

DOCUMENTS = sorted(
    path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
)
_PROGRAMS = "aws curl docker echo export find for helm k8s/\\S+ kind kubectl make mlflow podman python"
# A program and its words, an assignment or `. FILE`; what programs print has two spaces between its columns.
_COMMAND = re.compile(
    rf"(?:({'|'.join(_PROGRAMS.split())}|ray|sudo|torchrun)(?: \S|$)|[A-Z_]+=|\. )", re.MULTILINE
)


def paragraphs(document: Path) -> list[str]:
    """The parts, without their indentation, that are indented by four spaces and divided by empty lines."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    blocks = re.findall(r"(?<=\n\n)(?:    .*\n)+", text)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks]


def commands_of(document: Path) -> str:
    """All commands of a document, as one script."""
    return "".join(p for p in paragraphs(document) if _COMMAND.match(p))
