"""The NBD server: listeners, connections, exports."""
