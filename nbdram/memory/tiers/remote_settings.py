"""Where a remote is, and what is wanted of it. Knows no library: the remote's is only loaded where there is one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

DEFAULT_WAIT_S: Final = 20.0  # below the 30 s after which clients are usually told to give up

Address = tuple[str, int]


def address_text(address: Address) -> str:
    """HOST:PORT, IPv6 in brackets."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class RemoteSettings:
    """A Redis or Valkey server, or a cluster of which some nodes are named.

    `max_bytes` 0: as much as it takes. `replicas`: that many must have an image before it counts as stored.
    `wait_s`: how long a read waits for a remote that is away.
    """

    addresses: tuple[Address, ...]
    tls: bool = False
    max_bytes: int = 0
    replicas: int = 0
    wait_s: float = DEFAULT_WAIT_S
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        """The URL without what was asked for: good for logs, and for a label."""
        return ("rediss://" if self.tls else "redis://") + ",".join(map(address_text, self.addresses))
