"""RAM per byte of cold data: the images of nbdram, in both block sizes, against zram's."""

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench import corpus, fio, report, zram
from bench.checks import Check
from bench.errors import BenchError
from bench.fio import Job
from bench.options import Found, Options
from bench.paged_servers import Nbdram, copy_in
from bench.servers import DEFAULT_EXPORT
from bench.zram import Zram

_SIZE: Final = 256 << 20
_BUDGET: Final = _SIZE  # the images fit, the data and what pushes them out do not
_PUSHER: Final = "pusher"
_PUSH_S: Final = 1.0
_PUSHES: Final = 20  # at most
_SETTLED: Final = 0.01  # what a push still makes cold, of what is resident, when all is cold that ever will be
_TARGETS: Final = {"default": 0.94, "density": 0.88}
_INDEX_SHARE: Final = 0.0002
_CLUSTER: Final = 64 << 10


@dataclass(frozen=True)
class Cold:
    """What nbdram holds of one content, in bytes, when all of it is cold."""

    data: int  # in pages that are not zeros
    images: int
    images_of: int  # the clusters that were compressed, with their pages of zeros
    resident: int  # what would not compress
    index: int  # cluster words and reference bytes

    @property
    def cost(self) -> int:
        return self.images + self.resident + self.index


def run(_: Options) -> tuple[Found, list[Check]]:
    """A tar and a file system, each stored in three ways."""
    found: dict[str, object] = {}
    checks: list[Check] = []
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="nbdram-bench-") as directory:
        tar, image = Path(directory) / "tar", Path(directory) / "image"
        for name, content in {
            "tar": corpus.tar(tar, _SIZE),
            "ext4 image": corpus.ext4_image(image, _SIZE, Path(directory) / "tree"),
        }.items():
            print(f"running density, {name}", file=sys.stderr)
            data = corpus.data_bytes(content)
            peer = zram.cost_of(content) if Zram.available() else None
            if peer:
                rows.append([name, "zram", *_cells(data, peer.cost, peer.metadata), "-", "-", "1", "-", "-"])
                found[f"{name}, zram"] = asdict(peer)
            for kind, target in _TARGETS.items():
                cold = measure(content, data, kind)
                found[f"{name}, {kind}"] = asdict(cold)
                ratio = cold.cost / peer.cost if peer else None
                verdict = ["-", "-"] if ratio is None else [f"<={target}", "yes" if ratio <= target else "no"]
                shown = "-" if ratio is None else f"{ratio:.3f}"
                own = [f"{cold.images / cold.images_of:.3f}", report.size(cold.resident), shown]
                rows.append([name, f"nbdram, {kind}", *_cells(data, cold.cost, cold.index), *own, *verdict])
                if kind == "default":
                    checks.append(Check(f"index / data, {name}", cold.index / data * 100, _INDEX_SHARE * 100, "%"))
    head = [
        "content",
        "kept by",
        "data",
        "RAM/data",
        "metadata",
        "images/clusters",
        "stuck",
        "to zram",
        "target",
        "met",
    ]
    print(report.table("RAM for cold data, everything counted", head, rows, left=2), end="\n\n")
    return found, checks


def _cells(data: int, cost: int, metadata: int) -> list[str]:
    return [report.size(data), f"{cost / data:.3f}", f"{metadata / data:.3%}"]


def measure(content: Path, data: int, kind: str) -> Cold:
    """Store `content`, and write beside it until nothing more of it goes cold."""
    size = content.stat().st_size
    option = "" if kind == "default" else f",{kind}"
    server = Nbdram({DEFAULT_EXPORT: f"{size}{option}", _PUSHER: str(_SIZE)}, _BUDGET, f"nbdram, {kind}")
    pushes = Job(
        "push", "write", "256k", 16, span=str(_SIZE), options=("--buffer_compress_percentage=95", "--refill_buffers=1")
    )
    with server:
        copy_in(content, server.uri(), sparse=True)
        before = 2 * size
        for _ in range(_PUSHES):
            fio.run(pushes, server.uri(_PUSHER), _PUSH_S)
            stats = server.export_stats()
            if before - stats["resident"] <= _SETTLED * before:
                break
            before = stats["resident"]
        else:
            raise BenchError(f"{server.name}: data still go cold after {_PUSHES * _PUSH_S:.0f} s of writes")
        server.settle()
        stats = server.export_stats()
        index = stats["index"] + size // _CLUSTER
        return Cold(data, stats["compressed"], stats["compressed_from"], stats["resident"], index)
