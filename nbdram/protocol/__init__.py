"""The NBD protocol without I/O: bytes in, bytes out. No sockets, no devices, no event loop."""
