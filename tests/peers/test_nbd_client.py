"""nbd-client -l: all that it can do without a kernel that has nbd. tests/kernel has the rest."""

import pytest

from .conftest import Serve
from .running import output, run, tool


def test_nbd_client_lists_exports_and_descriptions(serve: Serve) -> None:
    server = serve("disk=16G,description=for builds", "rom=1M,ro", tcp=True)
    listed = output("nbd-client", "-l", "127.0.0.1", server.port)
    assert listed.splitlines() == ["Negotiation: ..", "disk: for builds", "rom"]


def test_listing_does_not_disturb_those_who_are_connected(serve: Serve) -> None:
    server = serve("disk=1M", tcp=True)
    script = f"""
        import subprocess
        h.pwrite(b"before", 0)
        subprocess.run([{tool("nbd-client")!r}, "-l", "127.0.0.1", "{server.port}"], check=True)
        assert h.pread(6, 0) == b"before"
    """
    server.script(script)


def test_a_missing_client_fails_with_the_name_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(pytest.fail.Exception, match="fio is not installed: apt-get install fio"):
        run("fio")
