"""The systemd units of deploy/, and what systemd's own tools say of them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Final

from tests.observe.tools import tool

UNITS: Final = Path(__file__).parents[2] / "deploy" / "systemd"
PROGRAM: Final = "/usr/local/bin/nbdram"


def settings(name: str) -> list[tuple[str, str]]:
    """All settings of a unit, in order, whatever their section."""
    lines = (line.strip() for line in (UNITS / name).read_text().splitlines())
    pairs = (line.partition("=") for line in lines if line and line[0] not in "#[")
    return [(key, value) for key, _, value in pairs]


def values(name: str, key: str) -> list[str]:
    return [value for found, value in settings(name) if found == key]


def analyze(*arguments: str, units: Path = UNITS) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:", "SYSTEMD_PAGER": "", "LC_ALL": "C"}
    return subprocess.run(
        [tool("systemd-analyze"), *arguments], capture_output=True, text=True, env=environment, timeout=60
    )


def system_calls(unit: str) -> set[str]:
    """Those that the unit's SystemCallFilter= lets through."""
    groups = _groups()
    allowed: set[str] = set(groups["@default"])  # which systemd always allows
    for line in values(unit, "SystemCallFilter"):
        forbid = line.startswith("~")
        for word in line.removeprefix("~").split():
            meant = _expand(word, groups)
            allowed = allowed - meant if forbid else allowed | meant
    return allowed


def seccomp_profile(unit: str) -> str:
    """The same filter as container engines read it."""
    rule = {"names": sorted(system_calls(unit)), "action": "SCMP_ACT_ALLOW"}
    return json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": [rule]})


def _groups() -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for line in analyze("syscall-filter").stdout.splitlines():
        if line.startswith("@"):
            members = groups[line.strip()] = []
        elif line.startswith("    ") and not line.strip().startswith("#"):
            members.append(line.strip())
    return groups


def _expand(word: str, groups: dict[str, list[str]]) -> set[str]:
    if not word.startswith("@"):
        return {word}
    return {call for member in groups[word] for call in _expand(member, groups)}
