"""Every number and layout of the NBD protocol that this project speaks.

Names and values are those of the specification (doc/proto.md of NetworkBlockDevice/nbd and its
extension for 64-bit headers). Everything on the wire is big-endian. The hot loop of
`server/connection.py` uses these as plain ints.
"""

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

# -- magics ---------------------------------------------------------------------------------------
NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

DEFAULT_PORT: Final = 10809

# -- limits that a peer can count on ----------------------------------------------------------------
MAX_STRING_BYTES: Final = 4096
MAX_OPTION_BYTES: Final = 64 * 1024
MAX_OPTIONS: Final = 32
MAX_PAYLOAD_BYTES: Final = 32 * 1024 * 1024
MAX_CONTEXTS: Final = 128
MINIMUM_BLOCK: Final = 1
PREFERRED_BLOCK: Final = 4096


# -- handshake phase --------------------------------------------------------------------------------
class HandshakeFlag(IntFlag):
    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 2**31 + 1
    ERR_POLICY = 2**31 + 2
    ERR_INVALID = 2**31 + 3
    ERR_PLATFORM = 2**31 + 4
    ERR_TLS_REQD = 2**31 + 5
    ERR_UNKNOWN = 2**31 + 6
    ERR_SHUTDOWN = 2**31 + 7
    ERR_BLOCK_SIZE_REQD = 2**31 + 8
    ERR_TOO_BIG = 2**31 + 9
    ERR_EXT_HEADER_REQD = 2**31 + 10


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


# -- transmission phase -----------------------------------------------------------------------------
class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


REPLY_FLAG_DONE: Final = 1


class ReplyType(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 2**15 + 1
    ERROR_OFFSET = 2**15 + 2


class Error(IntEnum):
    OK = 0
    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# -- meta contexts ----------------------------------------------------------------------------------
BASE_ALLOCATION: Final = "base:allocation"
TIER_CONTEXT: Final = "x-nbdram:tier"
# Listed as x-nbdram:id=UUID, never selected: it says which device an export is, whatever its name.
IDENTITY_CONTEXT: Final = "x-nbdram:id"
CONTEXT_IDS: Final = {BASE_ALLOCATION: 1, TIER_CONTEXT: 2}

STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1

# -- layouts ----------------------------------------------------------------------------------------
GREETING = Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS = Struct(">I")
OPTION_HEADER = Struct(">QII")  # IHAVEOPT, option, length
OPTION_REPLY_HEADER = Struct(">QIII")  # magic, option, reply type, length
EXPORT_NAME_REPLY = Struct(">QH")  # size, transmission flags (124 zeroes follow unless NO_ZEROES)
INFO_EXPORT = Struct(">HQH")  # INFO_EXPORT, size, transmission flags
INFO_BLOCK_SIZE = Struct(">HIII")  # INFO_BLOCK_SIZE, minimum, preferred, maximum payload
U16 = Struct(">H")
U32 = Struct(">I")

REQUEST = Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
EXTENDED_REQUEST = Struct(">IHHQQQ")
SIMPLE_REPLY = Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY = Struct(">IHHQI")  # magic, flags, type, cookie, length
EXTENDED_REPLY = Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
READ_DATA = Struct(">IHHQIQ")  # a STRUCTURED_REPLY header and the offset of an OFFSET_DATA chunk
EXTENDED_READ_DATA = Struct(">IHHQQQQ")
HOLE = Struct(">QI")  # offset, length
ERROR_HEAD = Struct(">IH")  # error, message length
EXTENT = Struct(">II")  # length, flags
EXTENDED_EXTENT = Struct(">QQ")
EXTENDED_STATUS_HEAD = Struct(">II")  # context id, extent count


def check_string(raw: bytes) -> str:
    """Decode a string of the protocol; ValueError says what is wrong with it."""
    if len(raw) > MAX_STRING_BYTES:
        raise ValueError(f"a string of {len(raw)} bytes is longer than {MAX_STRING_BYTES}")
    if b"\0" in raw:
        raise ValueError("a string contains NUL")
    return raw.decode("utf-8")  # UnicodeDecodeError is a ValueError
