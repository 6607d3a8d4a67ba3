"""Where settings come from: a TOML file, NBDRAM_* variables and flags, put together and checked as a whole."""
