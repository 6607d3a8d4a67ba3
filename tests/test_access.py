"""Who an export is for."""

import re
from typing import Any

import pytest

from nbdram.access import Client, Rules, address_of
from nbdram.errors import UsageError

LOCAL = Client(uid=1000, gids=frozenset({1000, 27}))


def tcp(host: str, *names: str) -> Client:
    return Client(address=address_of(host), names=frozenset(names))


def test_without_rules_everybody_may() -> None:
    for client in (LOCAL, tcp("192.0.2.1"), tcp("::1"), Client()):
        assert Rules().allow(client)


@pytest.mark.parametrize(
    ("network", "inside", "outside"),
    [
        ("10.0.0.1", ["10.0.0.1", "::ffff:10.0.0.1"], ["10.0.0.10", "10.0.0.100", "110.0.0.1", "::a00:1"]),
        ("10.0.0.0/8", ["10.0.0.0", "10.255.255.255"], ["11.0.0.0", "9.255.255.255", "::1"]),
        ("fd00::/8", ["fd12::1"], ["fe80::1", "10.0.0.1"]),
        ("fe80::/10", ["fe80::1%eth0"], ["::1"]),
        ("0.0.0.0/0", ["192.0.2.1"], ["2001:db8::1"]),
    ],
)
def test_cve_2013_6410_addresses_are_compared_as_numbers(network: str, inside: list[str], outside: list[str]) -> None:
    rules = Rules.parse({"networks": [network]})
    assert all(rules.allow(tcp(host)) for host in inside)
    assert not any(rules.allow(tcp(host)) for host in outside)
    assert not rules.allow(LOCAL), "an export for a network is not for local users"


def test_local_users_are_known_by_themselves_or_by_any_of_their_groups() -> None:
    assert Rules(users=(1000,)).allow(LOCAL)
    assert Rules(groups=(27,)).allow(LOCAL)
    assert Rules(users=(0,), groups=(1000,)).allow(LOCAL)
    for rules in (Rules(users=(0,)), Rules(groups=(0,)), Rules(users=(27,)), Rules(users=(1000,), certificates=("x",))):
        assert not rules.allow(LOCAL)
    assert not Rules(users=(1000,)).allow(tcp("127.0.0.1")), "an export for users is not for TCP"
    assert not Rules(users=(1000,)).allow(Client()), "who has gone already is nobody"


@pytest.mark.parametrize(
    ("rule", "name", "allowed"),
    [
        ("ci.example.org", "CI.example.ORG", True),
        ("ci.example.org", "example.org", False),
        ("ci.example.org", "xci.example.org", False),
        ("*.example.org", "ci.example.org", True),
        ("*.example.org", "a.ci.example.org", False),
        ("*.example.org", "example.org", False),
        ("*.example.org", ".example.org", False),
        ("spiffe://x/a", "spiffe://x/a", True),
    ],
)
def test_certificates_are_known_by_their_names(rule: str, name: str, allowed: bool) -> None:
    rules = Rules.parse({"certificates": [rule]})
    assert rules.allow(tcp("192.0.2.1", "another", name)) is allowed
    assert not rules.allow(tcp("192.0.2.1"))


def test_a_certificate_does_not_help_from_the_wrong_place() -> None:
    rules = Rules.parse({"certificates": ["alice"], "networks": ["10.0.0.0/8"]})
    assert rules.allow(tcp("10.1.1.1", "alice"))
    assert not rules.allow(tcp("11.1.1.1", "alice"))
    assert not rules.allow(tcp("10.1.1.1", "bob"))


def test_rules_survive_being_written_down() -> None:
    told = {"networks": ["10.0.0.0/8", "::1"], "users": ["root", 1000], "groups": ["root"], "bandwidth": "10M"}
    rules = Rules.parse({**told, "certificates": ["*.example.org"], "iops": 100})
    assert Rules.parse(rules.plain()) == rules
    assert rules.plain()["users"] == [0, 1000]
    assert Rules().plain() == {}


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("networks", "10.0.0.0/8", "'10.0.0.0/8' is not a list of networks, as in"),
        ("networks", ["10.0.0.1/8"], "'10.0.0.1/8' is not a network: write 10.0.0.0/8, or an address, as in"),
        ("networks", ["example.org"], "'example.org' is not a network: write one, or an address, as in 10.0.0.0/8"),
        ("users", "root", "'root' is not a list of users, by name or number"),
        ("users", ["nobody-of-this-name"], "there is no user called 'nobody-of-this-name' here: write its number"),
        ("users", [-1], "-1 is no user"),
        ("users", [True], "True is no user"),
        ("groups", ["nobody-of-this-name"], "there is no group called"),
        (
            "certificates",
            ["a.*.org"],
            "'a.*.org' is not a name in a certificate: an asterisk stands only for its first label",
        ),
        ("certificates", [""], "'' is not a name in a certificate"),
        ("iops", "many", "'many' is not a number of requests a second"),
        ("iops", -1, "-1 is not a number of requests a second"),
        ("bandwidth", "fast", "'fast' is not a size"),
        ("bandwidth", 1.5, "1.5 is not a number of bytes a second"),
    ],
)
def test_what_is_no_rule_is_told_with_its_key(key: str, value: Any, told: str) -> None:
    with pytest.raises(UsageError, match="^" + re.escape(f"{key}: {told}")):
        Rules.parse({key: value})
