"""`rediss://`: a real redis-server that speaks TLS, whom it lets in, and what those are told whom it does not."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdram.errors import NbdramError
from nbdram.memory.tiers import engine
from nbdram.memory.tiers.remote import Remote
from nbdram.memory.tiers.remote_settings import RemoteSettings
from tests.certificates import Authority, Certificates
from tests.helpers import eventually, run, running
from tests.memory.tiers.redis_cluster import Cluster, cluster, free_ports
from tests.memory.tiers.test_remote import Model, modelled


class Guarded:
    """A cluster of one, which asks for certificates, and for a password of user `me`."""

    def __init__(self, servers: Cluster, port: int, papers: Certificates) -> None:
        self.node = servers.masters[0]
        self.node.call("ACL", "SETUSER", "me", "on", ">sesame", "~nbdram:*", "+@all")
        self.papers = papers
        self.settings = RemoteSettings(
            (("127.0.0.1", port),),
            tls=True,
            ca=papers.ca,
            certificate=papers.directory / "client-cert.pem",
            key=papers.directory / "client-key.pem",
            user="me",
            password="sesame",
        )

    def url(self, **others: Path) -> str:
        files = {"ca": self.settings.ca, "cert": self.settings.certificate, "key": self.settings.key, **others}
        return f"{self.settings}/?" + "&".join(f"{name}={path}" for name, path in files.items())


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    papers = Certificates(tmp_path_factory.mktemp("papers"))
    (port,) = free_ports(1)
    files = ("--tls-cert-file", papers.server, "--tls-key-file", papers.server_key, "--tls-ca-cert-file", papers.ca)
    options = ("--tls-port", str(port), "--tls-cluster", "yes", "--tls-auth-clients", "yes", *map(str, files))
    with cluster(tmp_path_factory.mktemp("guarded"), 1, 0, *options) as servers:
        yield Guarded(servers, port, papers)


async def test_three_times_as_much_as_memory_holds_comes_back_through_tls(guarded: Guarded, tmp_path: Path) -> None:
    async with modelled(tmp_path, guarded.settings) as (server, model):
        await model.fill()
        device = server.device()
        await eventually(lambda: device.remote_clusters > 300)
        await model.check()
        await model.check_in_one_piece(server)
        assert device.remote_faults > 300


def told(settings: RemoteSettings) -> str:
    """How a remote is refused; at once, where waiting might have helped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_START_S", 0.0)
        with pytest.raises(NbdramError) as caught:
            Remote(settings)
    assert "sesame" not in str(caught.value)
    return str(caught.value)


def test_a_server_whose_certificate_nobody_vouches_for_is_refused(guarded: Guarded, tmp_path: Path) -> None:
    Authority(tmp_path / "other.pem", "others")
    for ca in (tmp_path / "other.pem", None):
        sentence = told(replace(guarded.settings, ca=ca))
        assert sentence.startswith(f"{guarded.settings} shows a certificate that is not trusted (")
        assert sentence.endswith(
            "give the authority that has signed it with ca=FILE, and the name that it is for as HOST"
        )


def test_a_server_with_a_certificate_for_another_name_is_refused(guarded: Guarded) -> None:
    port = guarded.settings.addresses[0][1]
    elsewhere = replace(guarded.settings, addresses=(("127.0.0.2", port),))
    guarded.node.call("CONFIG", "SET", "bind", "127.0.0.1 127.0.0.2")
    assert "not trusted (IP address mismatch, certificate is not valid for '127.0.0.2')" in told(elsewhere)


def test_who_shows_no_certificate_is_told_how(guarded: Guarded) -> None:
    sentence = told(replace(guarded.settings, certificate=None, key=None))
    assert sentence.startswith(f"can't use {guarded.settings} for swap: ")
    assert sentence.endswith("if it asks for a certificate, give one with cert=FILE and key=FILE")


def test_tls_where_there_is_none_and_none_where_there_is_are_told_apart_at_once(guarded: Guarded) -> None:
    plain, secured = (f"127.0.0.1:{port}" for port in (guarded.node.port, guarded.settings.addresses[0][1]))
    wrong = replace(guarded.settings, addresses=(("127.0.0.1", guarded.node.port),))
    with pytest.raises(NbdramError) as caught:
        Remote(wrong)
    assert str(caught.value) == f"{plain} answers without TLS: name the port that it has for TLS, or write redis://"
    with pytest.raises(NbdramError) as caught:
        Remote(replace(guarded.settings, tls=False))
    assert str(caught.value) == f"{secured} takes TLS only: write rediss://, or name its port without TLS"


@pytest.mark.parametrize(("user", "password"), [("me", "wrong"), ("nobody", "sesame!"), ("", "")])
def test_a_wrong_login_is_one_sentence(guarded: Guarded, user: str, password: str) -> None:
    guarded.node.call("ACL", "SETUSER", "default", "off")  # who is in already stays in
    try:
        sentence = told(replace(guarded.settings, user=user, password=password))
    finally:
        guarded.node.call("ACL", "SETUSER", "default", "on")
    assert sentence.startswith(f"{guarded.settings} does not let us in: ")


@pytest.mark.parametrize("name", ["ca", "certificate", "key"])
def test_a_file_that_can_not_be_read_is_named(guarded: Guarded, tmp_path: Path, name: str) -> None:
    def with_file(file: str) -> RemoteSettings:
        other: dict[str, Any] = {name: tmp_path / file}
        return replace(guarded.settings, **other)

    assert told(with_file("nowhere")) == f"can't read {tmp_path / 'nowhere'}: No such file or directory"
    (tmp_path / "empty").touch()
    assert f"{tmp_path / 'empty'} " in told(with_file("empty"))
    assert "is of no use without its certificate" in told(replace(guarded.settings, certificate=None))


async def test_the_login_comes_from_a_file_or_from_the_environment(guarded: Guarded, tmp_path: Path) -> None:
    login = tmp_path / "login"
    login.write_text("me:sesame\n")
    variables = {"NBDRAM_REMOTE_USER": "me", "NBDRAM_REMOTE_PASSWORD": "sesame"}
    for number, (url, environment) in enumerate(
        ((f"{guarded.url()}&auth-file={login}", None), (guarded.url(), variables))
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        options = ("--swap", url, "--memory", "48M", "--export", "ram=1G")
        async with running(directory, *options, environment=environment) as server, await server.entered() as client:
            model = Model(client, 512)
            await model.fill()
            await model.check()
            assert "user=me" in guarded.node.call("CLIENT", "LIST").decode()
            listed = Path(f"/proc/{server.process.pid}/cmdline").read_text()
            assert "sesame" not in listed
    wrong = variables | {"NBDRAM_REMOTE_PASSWORD": "no"}
    refused = await run("serve", "--swap", guarded.url(), "--metrics", "off", environment=wrong)
    assert refused.code == 1
    assert refused.errors.count("\n") == 1
    assert f"{guarded.settings} does not let us in" in refused.errors
