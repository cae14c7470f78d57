"""The commands of the documents, as a reader's shell understands them."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.helpers.documents import DOCUMENTS, commands_of

# No program is found: each command is written down instead, in one piece: those of a pipe run at the same time.
_NOTE = """() {
  local word line=
  for word in "$@"; do line="$line<$word>"; done
  printf '%s\n' "$line" >&3
}
"""
_PRELUDE = {
    # As in zsh, a pattern without a match is an error.
    "bash": f"command_not_found_handle{_NOTE}shopt -s failglob\n",
    "zsh": f"command_not_found_handler{_NOTE}",
}


def words_of(shell, script, folder):
    """The commands that a shell makes of a script, sorted: some run in the background."""
    binary = shutil.which(shell)
    if binary is None:
        pytest.skip(f"{shell} is not installed")
    for sourced in (".venv/bin/activate", "stack/env"):
        (folder / sourced).parent.mkdir(parents=True, exist_ok=True)
        (folder / sourced).touch()
    (folder / "k8s").mkdir(exist_ok=True)
    stub = '#!/bin/sh\nline="<k8s/job.sh>"\nfor word in "$@"; do line="$line<$word>"; done\necho "$line" >&3\n'
    (folder / "k8s" / "job.sh").write_text(stub)
    (folder / "k8s" / "job.sh").chmod(0o755)
    log = folder / f"{shell}.log"
    (folder / "script").write_text(f"exec 3>>{log}\n{_PRELUDE[shell]}{script}\nwait\n")
    plain = {"bash": ["--norc", "--noprofile"], "zsh": ["-f"]}[shell]
    parsed = subprocess.run(
        [binary, *plain, "-n", "script"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert (parsed.returncode, parsed.stderr) == (0, ""), parsed.stderr
    environment = {"PATH": "/nowhere", "HOME": str(folder), "LC_ALL": os.environ.get("LC_ALL", "C.UTF-8")}
    done = subprocess.run(
        [binary, *plain, "script"],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return sorted(log.read_text().splitlines())


WITH_COMMANDS = [path for path in DOCUMENTS if commands_of(path)]


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=lambda path: path.stem)
def test_commands_mean_the_same_in_bash_and_zsh(document, tmp_path):
    in_bash = words_of("bash", commands_of(document), tmp_path)
    assert in_bash and words_of("zsh", commands_of(document), tmp_path) == in_bash


def test_what_shells_take_for_patterns_or_do_not_divide_is_caught(tmp_path):
    with pytest.raises(AssertionError, match=r"no match: featureGates\[0\].name=RayCronJob"):
        words_of("bash", "helm install --set featureGates[0].name=RayCronJob\n", tmp_path)
    with pytest.raises(AssertionError, match="unexpected"):
        words_of("bash", "kubectl --patch '{\n", tmp_path)
    divided = 'W="--weights x"\npython $W\n'
    assert words_of("bash", divided, tmp_path)[-1:] == ["<python><--weights><x>"]
    assert words_of("zsh", divided, tmp_path) == ["<python><--weights x>"]


def test_commands_are_told_from_what_they_print():
    assert {"README", "kubernetes", "training", "CONTRIBUTING"} <= {path.stem for path in WITH_COMMANDS}
    (readme,) = [path for path in DOCUMENTS if path.stem == "README"]
    lines = commands_of(readme).splitlines()
    assert any(line.startswith("make demo") for line in lines)
    assert not any(line.startswith(("pictures", "best accuracy", "from cvdist")) for line in lines)
