"""--swap redis://: what is understood, and what gets a sentence instead."""

from pathlib import Path

import pytest

from nbdram.config_remote import parse_remote, parse_swap
from nbdram.errors import UsageError
from nbdram.memory.tiers.remote_settings import RemoteSettings


def test_nodes_and_options_are_read() -> None:
    found = parse_remote("redis://10.0.0.5:7000,[fd00::1],cache/?max=500G&replicas=1&wait=7")
    assert found.addresses == (("10.0.0.5", 7000), ("fd00::1", 6379), ("cache", 6379))
    assert (found.max_bytes, found.replicas, found.wait_s, found.tls) == (500 << 30, 1, 7.0, False)
    assert str(found) == "redis://10.0.0.5:7000,[fd00::1]:6379,cache:6379"


def test_tls_takes_certificates() -> None:
    found = parse_remote("rediss://cache/?ca=/etc/ca.pem&cert=/etc/me.pem&key=/etc/me.key")
    assert found.tls
    assert (found.ca, found.certificate, found.key) == (
        Path("/etc/ca.pem"),
        Path("/etc/me.pem"),
        Path("/etc/me.key"),
    )


def test_user_and_password_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBDRAM_REMOTE_USER", "someone")
    monkeypatch.setenv("NBDRAM_REMOTE_PASSWORD", "open sesame")
    found = parse_remote("redis://cache")
    assert (found.user, found.password) == ("someone", "open sesame")
    assert "sesame" not in f"{found!r} {found}"
    login = tmp_path / "login"
    for content, expected in (("me:a:b\n", ("me", "a:b")), ("alone", ("", "alone"))):
        login.write_text(content)
        found = parse_remote(f"redis://cache/?auth-file={login}")
        assert (found.user, found.password) == expected
    login.write_text("\n")
    with pytest.raises(UsageError, match="is empty: write USER:PASSWORD or PASSWORD there"):
        parse_remote(f"redis://cache/?auth-file={login}")
    with pytest.raises(UsageError, match=r"can't read .*/nowhere: No such file or directory"):
        parse_remote(f"redis://cache/?auth-file={tmp_path}/nowhere")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("redis://", "write redis://HOST:PORT,HOST:PORT/?max=SIZE"),
        ("redis:cache", "write redis://HOST:PORT"),
        ("redis://cache:many", "the port of 'cache:many' is not a number from 0 to 65535"),
        ("redis://cache:70001", "the port of 'cache:70001' is not a number from 0 to 65535"),
        ("redis://cache/?max=0", "max must be at least 1 MiB; without it there is no limit"),
        ("redis://cache/0", "write redis://HOST:PORT"),
        ("redis://cache/?max=lots", "'lots' is not a size"),
        ("redis://cache/?size=1G", "there is no option 'size'; known are max, replicas, wait"),
        ("redis://cache/?replicas=-1", "replicas must be a whole number, at most 10"),
        ("redis://cache/?wait=1h", "wait must be a whole number, at most 600"),
        ("redis://cache/?ca=x", "ca, cert and key are for rediss://"),
        ("rediss://cache/?ca=/a\tb", "write control characters as % and two digits"),
        ("redis://cache/?max", "write options as in ?max=1G&replicas=1"),
    ],
)
def test_a_mistake_gets_one_sentence(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_remote(text)
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"--swap {text!r}: ")


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="put it in NBDRAM_REMOTE_PASSWORD, or in a file") as caught:
        parse_remote("redis://me:sesame@cache")
    assert "sesame" not in str(caught.value)


def test_tiers_are_used_in_the_order_given() -> None:
    disk, remote = "disk:/swap", "redis://cache"
    for texts, first in (([disk, remote], False), ([remote, disk], True), ([remote], False), ([disk], False)):
        swap, found, remote_first = parse_swap(texts)
        assert [area.path for area in swap] == [Path("/swap")] * (disk in texts)
        assert found == (RemoteSettings((("cache", 6379),)) if remote in texts else None)
        assert remote_first is first
    with pytest.raises(UsageError, match="there can be one remote; name more nodes of it as HOST:PORT,HOST:PORT"):
        parse_swap([remote, remote])
