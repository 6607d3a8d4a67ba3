"""Whose images are in a remote, and the removal of those that nobody will ever ask for.

Images are looked through before the records of their devices, and a device writes its record before its first image:
so what has no record when it is asked for belongs to nobody.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from redis.connection import AbstractConnection
from redis.exceptions import RedisError

from nbdram.errors import NbdramError
from nbdram.memory.tiers.engine import Engine, ask
from nbdram.memory.tiers.remote import DEVICE_PREFIX
from nbdram.memory.tiers.remote_settings import RemoteSettings
from nbdram.memory.tiers.sending import IMAGE_PREFIX

_KEYS_A_STEP: Final = 1000


@dataclass
class Holding:
    """The images of one device. `record`: what its server has left, None if it has none."""

    identity: UUID
    images: int
    stored_bytes: int
    record: dict[str, Any] | None


class Orphans:
    """Looks through one remote; NbdramError if it can't be used."""

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings
        self._engine = Engine(settings)
        self._engine.start()

    def close(self) -> None:
        self._engine.close()

    def survey(self) -> list[Holding]:
        """All that devices have here, the largest first."""
        sums: dict[UUID, list[int]] = {}
        with self._sentences():
            for connection, keys in self._images():
                lengths = _pipeline(connection, [("STRLEN", key) for key in keys])
                for key, length in zip(keys, lengths, strict=True):
                    count = sums.setdefault(_device_of(key), [0, 0])
                    count[0] += 1
                    count[1] += length if isinstance(length, int) else 0
            found = [
                Holding(identity, images, length, self._record(identity)) for identity, (images, length) in sums.items()
            ]
        return sorted(found, key=lambda holding: -holding.stored_bytes)

    def remove(self, identity: UUID) -> int:
        """Remove all images of a device, and its record; returns how many images there were."""
        removed = 0
        with self._sentences():
            for connection, keys in self._images(identity):
                replies = _pipeline(connection, [("UNLINK", key) for key in keys])
                removed += sum(reply for reply in replies if isinstance(reply, int))
            self._on_owner("UNLINK", identity)
        return removed

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            raise NbdramError(f"{self._settings} can't be looked through: {error}") from error

    def _record(self, identity: UUID) -> dict[str, Any] | None:
        text = self._on_owner("GET", identity)
        found: dict[str, Any] | None = json.loads(text) if text else None
        return found

    def _on_owner(self, word: str, identity: UUID) -> Any:
        key = DEVICE_PREFIX + identity.hex.encode()
        owner = self._engine.owner(key)
        assert owner
        connection = self._engine.connect(owner)
        try:
            return ask(connection, word, key)
        finally:
            connection.disconnect()

    def _images(self, identity: UUID | None = None) -> Iterator[tuple[AbstractConnection, list[bytes]]]:
        """All keys of images, node by node, some at a time."""
        pattern = IMAGE_PREFIX + (identity.hex.encode() + b":" if identity else b"") + b"*"
        for address in self._engine.masters():
            connection = self._engine.connect(address)
            cursor = b"0"
            try:
                while True:
                    cursor, keys = ask(connection, "SCAN", cursor, "MATCH", pattern, "COUNT", str(_KEYS_A_STEP))
                    if keys:
                        yield connection, keys
                    if cursor == b"0":
                        break
            finally:
                connection.disconnect()


def _device_of(key: bytes) -> UUID:
    return UUID(key[len(IMAGE_PREFIX) :].partition(b":")[0].decode())


def _pipeline(connection: AbstractConnection, commands: list[tuple[Any, ...]]) -> list[Any]:
    connection.send_packed_command(connection.pack_commands(commands))
    return [connection.read_response() for _ in commands]
