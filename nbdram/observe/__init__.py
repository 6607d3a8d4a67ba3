"""Looking at a running server."""
