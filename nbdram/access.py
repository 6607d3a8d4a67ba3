"""Who may use an export, and how much of it: rules, and the client they are held against. Knows no sockets.

A client that an export is not for must not notice that it exists. Rules:

1. Without `networks`, `users` and `groups`, clients may come from anywhere. With any of them, a TCP client must come
   from one of the networks, and a client of a Unix socket must be one of the users or in one of the groups: so an
   export for networks alone is closed to local users, and one for users alone is closed to TCP.
2. With `certificates`, the client must be inside TLS besides, and one of the names in its certificate be listed.
"""

import grp
import pwd
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final

from nbdram.errors import UsageError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


@dataclass(frozen=True)
class Client:
    """Who is at the other end: an address, or a local user; `names` are those of a certificate that was checked."""

    address: Address | None = None
    uid: int | None = None
    gids: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()


def address_of(host: str) -> Address:
    """An address as the kernel tells it; one of IPv4 that came in over IPv6 is one of IPv4."""
    address = ip_address(host)
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


@dataclass(frozen=True)
class Rules:
    """What is said of one export. `iops` and `bandwidth` (bytes) are caps per second for all its clients; 0: none."""

    networks: tuple[Network, ...] = ()
    users: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    certificates: tuple[str, ...] = ()
    iops: int = 0
    bandwidth: int = 0

    def allow(self, client: Client) -> bool:
        if self.certificates and not any(_matches(rule, name) for rule in self.certificates for name in client.names):
            return False
        if not (self.networks or self.users or self.groups):
            return True
        if client.address is not None:
            return any(client.address in network for network in self.networks)
        return client.uid in self.users or not client.gids.isdisjoint(self.groups)

    def plain(self) -> dict[str, Any]:
        """For JSON: only what is set."""
        values = asdict(self) | {"networks": [str(network) for network in self.networks]}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if value}

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Rules":
        """From what a user or `plain` wrote; UsageError for the first mistake."""
        parsed = {}
        for key, value in values.items():
            try:
                parsed[key] = PARSERS[key](value)
            except UsageError as error:
                raise UsageError(f"{key}: {error}") from None
        return cls(**parsed)


OPEN: Final = Rules()


def _matches(rule: str, name: str) -> bool:
    """Names compare without regard to case; `*.example.org` stands for one more label."""
    rule, name = rule.lower(), name.lower()
    label, _, rest = name.partition(".")
    return name == rule or (rule.startswith("*.") and bool(label) and rest == rule[2:])


def parse_networks(value: Any) -> tuple[Network, ...]:
    networks = []
    for text in _texts(value, 'networks, as in ["10.0.0.0/8", "fd00::/8"]'):
        try:
            networks.append(ip_network(text))
        except ValueError:
            raise UsageError(f"{text!r} is not a network{_meant(text)}, as in 10.0.0.0/8 or 192.0.2.7") from None
    return tuple(networks)


def _meant(text: str) -> str:
    try:
        return f": write {ip_network(text, strict=False)}, or an address"
    except ValueError:
        return ": write one, or an address"


def parse_users(value: Any) -> tuple[int, ...]:
    return _ids(value, "user", lambda name: pwd.getpwnam(name).pw_uid)


def parse_groups(value: Any) -> tuple[int, ...]:
    return _ids(value, "group", lambda name: grp.getgrnam(name).gr_gid)


def _ids(value: Any, what: str, number_of: Callable[[str], int]) -> tuple[int, ...]:
    wanted = f'a list of {what}s, by name or number, as in ["root", 1000]'
    if not isinstance(value, list):
        raise UsageError(f"{value!r} is not {wanted}")
    ids = []
    for entry in value:
        if isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < 2**32 - 1:
            ids.append(entry)
        elif isinstance(entry, str):
            try:
                ids.append(number_of(entry))
            except KeyError:
                raise UsageError(f"there is no {what} called {entry!r} here: write its number") from None
        else:
            raise UsageError(f"{entry!r} is no {what}: write {wanted}")
    return tuple(ids)


def parse_certificates(value: Any) -> tuple[str, ...]:
    names = _texts(value, 'names in certificates, as in ["ci.example.org", "*.example.org"]')
    for name in names:
        if not name or not name.isprintable() or "*" in name.removeprefix("*."):
            raise UsageError(f"{name!r} is not a name in a certificate: an asterisk stands only for its first label")
    return tuple(names)


def _texts(value: Any, wanted: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UsageError(f"{value!r} is not a list of {wanted}")
    return value


def parse_iops(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**40:
        raise UsageError(f"{value!r} is not a number of requests a second: write a whole number, 0 for no limit")
    return value


def parse_bandwidth(value: Any) -> int:
    from nbdram.config import parse_size

    if isinstance(value, str):
        return parse_size(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f'{value!r} is not a number of bytes a second: write a size, as in "100M", 0 for no limit')
    return value


PARSERS: Final[dict[str, Callable[[Any], Any]]] = {
    "networks": parse_networks,
    "users": parse_users,
    "groups": parse_groups,
    "certificates": parse_certificates,
    "iops": parse_iops,
    "bandwidth": parse_bandwidth,
}

# The same on a command line, where each may be said more than once.
RULE_OPTIONS: Final = {
    "network=": "networks",
    "user=": "users",
    "group=": "groups",
    "certificate=": "certificates",
    "iops=": "iops",
    "bandwidth=": "bandwidth",
}


def take_rule(option: str, rules: dict[str, Any]) -> bool:
    """Add `network=10.0.0.0/8` and the like to what `Rules.parse` takes; False if it is something else."""
    word, equals, text = option.partition("=")
    key = RULE_OPTIONS.get(word + equals)
    if key is None:
        return False
    is_number = text.isascii() and text.isdecimal() and key in ("users", "groups", "iops")
    value = int(text) if is_number else text
    if key in ("iops", "bandwidth"):
        rules[key] = value
    else:
        rules.setdefault(key, []).append(value)
    return True
