"""What leaves RAM is sealed with AES-GCM: salt (16 bytes), nonce (12 bytes), the image, tag (16 bytes).

The key of an image is derived from a secret, which exists only in this process or in the state directory, and a
salt, which is drawn anew at each start. Nonces count up from 1 under each such key. So they never repeat, and that
rests on no number that must be kept from one start to the next (an old copy of the state directory would bring an
old number back), and no keys need to be kept for images of earlier starts: their salts are with them.
"""

import os
from itertools import count
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from nbdram.memory.codec import IntegrityError
from nbdram.memory.layout import SECRET_BYTES

_NONCE_BYTES: Final = 12
_SALT_BYTES: Final = 16
_HEAD_BYTES: Final = _SALT_BYTES + _NONCE_BYTES
_KEYS_KEPT: Final = 64


class Seal:
    """Seals and opens images for one place, from any thread. Without a secret, with one that nobody will ever know."""

    def __init__(self, secret: bytes | None, purpose: bytes, place: str) -> None:
        """`purpose`: different ones have different keys. `place`: for people, as in "on disk"."""
        self.secret: Final = secret or os.urandom(SECRET_BYTES)
        self._purpose = purpose
        self._place = place
        self._salt = os.urandom(_SALT_BYTES)
        self._numbers = count(1)
        self._keys: dict[bytes, AESGCM] = {}

    def seal(self, image: bytes, identity: bytes) -> bytes:
        return b"".join(self.parts(image, identity))

    def parts(self, image: bytes | bytearray, identity: bytes) -> tuple[bytes, bytes]:
        """A sealed image in two pieces, so that the large one is not copied."""
        nonce = next(self._numbers).to_bytes(_NONCE_BYTES, "big")
        return self._salt + nonce, self._key(self._salt).encrypt(nonce, image, identity)

    def open(self, sealed: bytes | bytearray | memoryview, identity: bytes) -> bytes:
        """IntegrityError if it is not what was sealed as `identity`."""
        view = memoryview(sealed)
        try:
            key = self._key(bytes(view[:_SALT_BYTES]))
            return key.decrypt(view[_SALT_BYTES:_HEAD_BYTES], view[_HEAD_BYTES:], identity)
        except (InvalidTag, ValueError):
            raise IntegrityError(f"an image {self._place} is not what was stored") from None

    def _key(self, salt: bytes) -> AESGCM:
        key = self._keys.get(salt)
        if key is None:
            if len(self._keys) >= _KEYS_KEPT:  # damaged images may have any salt
                self._keys.clear()
            derived = HKDF(hashes.SHA256(), 32, salt, self._purpose).derive(self.secret)
            key = self._keys[salt] = AESGCM(derived)
        return key
