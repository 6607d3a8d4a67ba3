"""Runs targets one after the other, each under libFuzzer in a process of its own, and keeps count.

In the directory (`.fuzz` unless told otherwise, which is not committed): `corpus/TARGET`, what reached something new,
from which the next run goes on; `findings/TARGET-...`, inputs that broke something, with what was said in `.log`; and
`totals.json`.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from .targets import Target

# Far above what any execution takes, also on a machine with much else to do.
_EXECUTION_S: Final = 120
_MEMORY_MIB: Final = 512
# So long at a time: each start reads the whole corpus again.
SLICE_S: Final = 300.0
_ARTIFACT: Final = re.compile(r"Test unit written to (\S+)")
_COVERED: Final = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
_DONE: Final = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


@dataclass
class Total:
    """What a target has done so far; `edges` and `features` as libFuzzer counts them."""

    executions: int = 0
    seconds: float = 0.0
    edges: int = 0
    features: int = 0
    corpus: int = 0
    findings: int = 0


class Fuzzing:
    """The directory, and who runs in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.findings = directory / "findings"
        self._file = directory / "totals.json"
        self.findings.mkdir(parents=True, exist_ok=True)
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.totals = {name: Total(**fields) for name, fields in known.items()}

    def corpus(self, target: Target) -> Path:
        path = self.directory / "corpus" / target.name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def run(self, target: Target, seconds: float) -> list[Path]:
        """Fuzz for so long, or until something is found; what was found."""
        options = (
            f"-max_total_time={max(1, round(seconds))}",
            f"-max_len={target.longest}",
            "-len_control=20",
            f"-timeout={_EXECUTION_S}",
            f"-report_slow_units={_EXECUTION_S}",
            f"-rss_limit_mb={_limit_mib()}",
            f"-artifact_prefix={self.findings}/{target.name}-",
            "-print_final_stats=1",
        )
        directories = [str(path) for path in (self.corpus(target), target.seeds) if path.exists()]
        command = [sys.executable, "-m", "tests.fuzz.child", target.name, *options, *directories]
        # Measuring the tests' coverage would count these processes, too, at half the speed.
        quiet = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet)
        try:
            said = process.communicate(timeout=seconds + 4 * _EXECUTION_S)[0]
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(f"/dev/shm/nbdram-fuzz-{process.pid}", ignore_errors=True)
        found = [Path(name) for name in _ARTIFACT.findall(said)]
        if process.returncode and not found:
            raise RuntimeError(f"{target.name} did not run:\n{said[-4000:]}")
        for path in found:
            path.with_suffix(".log").write_text(said)
        self._add(target, seconds, said, len(found))
        return found

    def _add(self, target: Target, seconds: float, said: str, findings: int) -> None:
        total = self.totals.setdefault(target.name, Total())
        total.executions += sum(map(int, _DONE.findall(said)))
        total.seconds += seconds
        total.findings += findings
        if covered := _COVERED.findall(said):
            total.edges, total.features, total.corpus = map(int, covered[-1])
        text = json.dumps({name: asdict(total) for name, total in self.totals.items()}, indent=1)
        self._file.with_suffix(".new").write_text(text)
        self._file.with_suffix(".new").replace(self._file)


def _limit_mib() -> int:
    """What a run may take: libFuzzer looks at the most there ever was, which begins with that of who starts it."""
    return _MEMORY_MIB + (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
