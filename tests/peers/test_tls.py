"""TLS with the clients that people have: libnbd, qemu, and nbd-client as far as it goes without a kernel device."""

import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdram.cli import main
from tests.certificates import Certificates

from .conftest import Serve
from .running import Server, output, random_bytes, run, tool

NO = 2  # nbdinfo --is: 0 is yes


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def secured(serve: Serve, certificates: Certificates) -> Callable[..., Server]:
    def start(*options: str, client_ca: bool = False) -> Server:
        return serve("disk=128M", tcp=True, options=[*certificates.options(client_ca=client_ca), *options])

    return start


def uri(server: Server, certificates: Path) -> str:
    """Of what the server announced, for libnbd."""
    (announced,) = (line for line in server.announced if line.startswith("nbds://"))
    return f"{announced}?tls-certificates={certificates}"


def test_libnbd_copies_in_and_out_through_tls(
    shm: Path, secured: Callable[..., Server], certificates: Certificates
) -> None:
    server = secured(client_ca=True)
    disk = uri(server, certificates.directory)
    run("nbdinfo", "--is", "tls", disk)
    source, copy = shm / "source", shm / "copy"
    source.write_bytes(random_bytes(24 << 20))
    run("nbdcopy", source, disk)
    run("nbdcopy", disk, copy)
    with source.open("rb") as one, copy.open("rb") as other:
        assert one.read() == other.read(24 << 20)


def test_nbdinfo_is_refused_without_tls_and_without_a_certificate(
    secured: Callable[..., Server], certificates: Certificates
) -> None:
    server = secured(client_ca=True)
    disk = uri(server, certificates.directory)
    for refused in (disk.partition("?")[0].replace("nbds:", "nbd:"), uri(server, certificates.without_client())):
        assert b"disk" not in run("nbdinfo", "--list", refused.replace("/disk", "/"), code=1).stdout
        run("nbdinfo", refused, code=1)
    assert output("nbdinfo", "--size", disk) == f"{128 << 20}\n"


def test_where_tls_is_allowed_both_ways_lead_to_the_same_disk(
    shm: Path, secured: Callable[..., Server], certificates: Certificates
) -> None:
    server = secured("--tls", "allow")
    plain = server.tcp_uri()
    run("nbdinfo", "--is", "tls", plain, code=NO)
    server.script('h.pwrite(b"hello", 0)', uri=plain)
    copy = shm / "copy"
    secure = f"{plain.replace('nbd:', 'nbds:')}?tls-certificates={certificates.without_client()}"
    run("nbdcopy", secure, copy)
    with copy.open("rb") as file:
        assert file.read(5) == b"hello"


def test_qemu_converts_an_image_through_tls(
    shm: Path, secured: Callable[..., Server], certificates: Certificates
) -> None:
    server = secured(client_ca=True)
    port = uri(server, certificates.directory).rpartition(":")[2].partition("/")[0]
    source, copy = shm / "source.raw", shm / "copy.raw"
    source.write_bytes(random_bytes(4 << 20) + bytes(124 << 20))
    tls = ["--object", f"tls-creds-x509,id=tls,dir={certificates.directory},endpoint=client"]
    disk = f"driver=nbd,host=127.0.0.1,port={port},export=disk,tls-creds=tls,tls-hostname=localhost"
    run(
        "qemu-img",
        "convert",
        *tls,
        "-n",
        "--target-image-opts",
        "-f",
        "raw",
        source,
        f"driver=raw,file.{disk_of(disk)}",
    )
    run("qemu-img", "convert", *tls, "--image-opts", "-O", "raw", f"driver=raw,file.{disk_of(disk)}", copy)
    assert source.read_bytes() == copy.read_bytes()
    run("qemu-img", "info", f"nbd://127.0.0.1:{port}/disk", code=1)


def disk_of(options: str) -> str:
    """Block device options, one level down."""
    return options.replace(",", ",file.")


def test_nbd_client_negotiates_through_tls(secured: Callable[..., Server], certificates: Certificates) -> None:
    server = secured("-v", client_ca=True)
    port = uri(server, certificates.directory).rpartition(":")[2].partition("/")[0]
    there = ["127.0.0.1", port]
    keys = ["-certfile", "client-cert.pem", "-keyfile", "client-key.pem", "-cacertfile", "ca-cert.pem"]
    keys += ["-tlshostname", "localhost", "-enable-tls"]
    run("nbd-client", "-l", *there, code=1)
    listed = run("nbd-client", "-l", *there, *keys, cwd=certificates.directory)
    assert listed.stdout.decode().splitlines() == ["Negotiation: ..", "disk"]
    # It opens the export, and gives up when it finds that this is no block device.
    run("nbd-client", *there, "/dev/null", "-N", "disk", *keys, code=1, cwd=certificates.directory)
    assert "opened export 'disk' (simple replies)" in server.stderr()


def test_our_own_client_goes_through_tls_and_trusts_only_whom_it_should(
    tmp_path: Path, secured: Callable[..., Server], certificates: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    server = secured(client_ca=True)
    disk = uri(server, certificates.directory)
    assert main(["info", disk]) == 0
    assert f"size         {128 << 20}" in capsys.readouterr().out
    assert main(["list", disk]) == 0
    assert main(["map", disk]) == 0
    stranger, empty = Certificates(tmp_path / "stranger"), tmp_path / "empty"
    empty.mkdir()
    plain = disk.partition("?")[0].replace("nbds:", "nbd:")
    for wrong, told in (
        (uri(server, stranger.directory), "the server's certificate can't be trusted: "),
        (disk.replace("127.0.0.1", "localhost") + "&tls-hostname=example.org", "the server's certificate can't be"),
        (uri(server, empty), f"can't use the certificates in {empty}: No such file or directory"),
        (
            uri(server, certificates.without_client()),
            "the server hung up: if it asks for a certificate, put",
        ),
        (plain, "the server refused: this server requires TLS; write nbds:// in place of nbd://"),
        (
            disk.partition("?")[0],
            "the server's certificate can't be trusted: self-signed certificate in",
        ),
    ):
        assert main(["info", wrong]) == 1
        assert capsys.readouterr().err.startswith(f"nbdram: {told}")


def test_certificates_that_are_made_as_the_manual_says_are_good_for_all(tmp_path: Path, serve: Serve) -> None:
    tool("openssl")
    told = (Path(__file__).parents[2] / "docs/security.md").read_text()
    commands = textwrap.dedent(told[told.index("    openssl req -x509") : told.index("    nbdram serve")])
    subprocess.run(["sh", "-euc", commands.replace("HOST", "localhost")], cwd=tmp_path, check=True, capture_output=True)
    ours = ("--tls-cert", tmp_path / "server-cert.pem", "--tls-key", tmp_path / "server-key.pem")
    server = serve("disk=128M", tcp=True, options=[*map(str, ours), "--tls-client-ca", f"{tmp_path}/ca-cert.pem"])
    disk = uri(server, tmp_path).replace("127.0.0.1", "localhost")
    assert output("nbdinfo", "--size", disk) == f"{128 << 20}\n"
    assert main(["info", disk]) == 0
    port = disk.rpartition(":")[2].partition("/")[0]
    image = f"driver=nbd,host=localhost,port={port},export=disk,tls-creds=t"
    run("qemu-img", "info", "--object", f"tls-creds-x509,id=t,dir={tmp_path},endpoint=client", "--image-opts", image)


def test_a_server_without_tls_is_told_from_one_with(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", serve("disk=1M", tcp=True).tcp_uri().replace("nbd:", "nbds:")]) == 1
    assert capsys.readouterr().err == "nbdram: the server offers no TLS: TLS is not set up here\n"
