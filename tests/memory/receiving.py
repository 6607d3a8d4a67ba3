"""A WRITE that arrives in pieces, without a connection."""

from nbdram.memory.device import Device
from nbdram.memory.incoming import Incoming
from tests.helpers import MIB


def begin(made: Device, offset: int, end: int) -> Incoming:
    return Incoming(made, offset, end, memoryview(bytearray(4 * MIB)))


def receive(incoming: Incoming, data: bytes) -> bool:
    """`data` arrives on the socket; whether that was all."""
    incoming.view()[: len(data)] = data
    return incoming.received(len(data))
