"""Faults under load: what else may go wrong on a machine while clients work. See docs/chaos.md."""
