"""Where cold images live. Every tier has the same few methods (see `ram.RamTier`)."""
