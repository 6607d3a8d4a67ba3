"""Side-by-side measurements against other NBD servers: `python -m bench --help`."""
