"""Sparse devices in RAM. Knows nothing of NBD, sockets or cookies."""
