"""Where a state directory has images in a remote: it remembers the address, and the command line may say the rest."""

import argparse

from nbdram.config_remote import parse_remote
from nbdram.memory.statedir import StateDirectory
from nbdram.memory.tiers.remote_settings import RemoteSettings


def add_swap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--swap",
        metavar="redis://HOST:PORT[,...][/?...]",
        help="as the server had it, where the address of a remote, which DIR remembers, is not enough: certificates, "
        "a file with the password, other nodes",
    )


def remote_of(state: StateDirectory, text: str | None) -> RemoteSettings | None:
    """None if the directory never had one."""
    text = text or state.manifest.remote
    return parse_remote(text) if text else None
