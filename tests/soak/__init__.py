"""Mixed clients on many exports for as long as one likes; `make soak`, and docs/soak.md."""
