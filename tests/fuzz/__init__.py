"""Coverage-guided fuzzing; `make fuzz`, and docs/fuzzing.md."""
