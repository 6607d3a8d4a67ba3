"""nbdram: a network block-device server whose devices live in RAM, grow, shrink and page."""

__version__ = "0.1.0"
