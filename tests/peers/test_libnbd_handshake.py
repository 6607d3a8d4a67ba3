"""The handshake phase as libnbd plays it: option mode, old style, metadata, TLS that is not there."""

import socket
import struct

import pytest

from .conftest import Serve
from .running import Server


def test_option_mode_lists_informs_and_goes_on_one_connection(serve: Serve) -> None:
    server = serve("disk=1M,description=the first", "big=1T", "rom=2M,ro")
    server.script("""
        h = unconnected()
        h.set_opt_mode(True)
        h.set_full_info(True)
        h.connect_uri(uri)
        listed = []
        assert h.opt_list(lambda name, description: listed.append((name, description))) == 3
        assert listed == [("disk", "the first"), ("big", ""), ("rom", "")]
        for name, size, read_only in ("rom", 2 * MIB, True), ("big", 1 << 40, False), ("disk", MIB, False):
            h.set_export_name(name)
            h.opt_info()
            assert (h.get_size(), h.is_read_only(), h.get_canonical_export_name()) == (size, read_only, name)
        assert h.get_export_description() == "the first"
        assert [h.get_block_size(kind) for kind in range(3)] == [1, 4096, 32 * MIB]
        h.set_export_name("big")
        h.opt_go()
        h.pwrite(b"x", (1 << 40) - 1)
    """)


def test_an_unknown_name_is_refused_in_option_mode_and_the_haggling_goes_on(server: Server) -> None:
    server.script("""
        h = unconnected()
        h.set_opt_mode(True)
        h.connect_uri(uri)
        for name in "nobody", "x" * 257, "x" * 4096, "Größe":
            h.set_export_name(name)
            refused(errno.ENOENT, h.opt_info)
            refused(errno.ENOENT, h.opt_go)
            refused(errno.ENOTSUP, h.opt_list_meta_context, lambda _: 0)  # libnbd says so of any refusal here
        h.set_export_name("disk")
        h.opt_go()
        assert h.pread(1, 0) == b"\\0"
    """)


def test_meta_contexts_are_listed_by_namespace_and_by_name(server: Server) -> None:
    server.script("""
        h = unconnected()
        h.set_opt_mode(True)
        h.connect_uri(uri)
        def listed(*queries):
            h.clear_meta_contexts()
            for query in queries:
                h.add_meta_context(query)
            names = []
            h.opt_list_meta_context(names.append)
            return sorted(name.partition("=")[0] for name in names)
        assert listed() == ["base:allocation", "x-nbdram:id", "x-nbdram:tier"]
        assert listed("base:") == listed("base:allocation") == ["base:allocation"]
        assert listed("x-nbdram:", "qemu:dirty-bitmap:b") == ["x-nbdram:id", "x-nbdram:tier"]
        assert listed("base:", "x-nbdram:tier") == ["base:allocation", "x-nbdram:tier"]
        assert listed("nobody:") == listed("base:allocatio") == listed("") == []
        h.opt_abort()
    """)


def test_contexts_that_do_not_exist_are_not_selected(server: Server) -> None:
    server.script("""
        h = connect("x-nbdram:tier", "base:", "base:nothing", "qemu:dirty-bitmap:b")
        assert h.can_meta_context("x-nbdram:tier")
        for context in "base:", "base:nothing", "qemu:dirty-bitmap:b", "base:allocation":
            assert not h.can_meta_context(context)
        assert extents(h, MIB, 0, "x-nbdram:tier") == [(MIB, 0)]
    """)


@pytest.mark.parametrize("flags", [0, 1, 2, 3], ids=["neither", "fixed", "no-zeroes", "both"])
@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_every_pair_of_handshake_flags_leads_to_the_export(server: Server, flags: int, structured: bool) -> None:
    """Without FIXED_NEWSTYLE libnbd uses EXPORT_NAME, which has 124 zeroes behind it unless NO_ZEROES."""
    server.script(f"""
        h = unconnected(structured={structured})
        h.set_handshake_flags({flags})
        h.connect_uri(uri)
        fixed = {flags} & nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE
        assert h.get_protocol() == ("newstyle-fixed" if fixed else "newstyle")
        assert bool(h.get_structured_replies_negotiated()) == bool(fixed and {structured})
        assert h.get_size() == 128 * MIB
        h.pwrite(b"through the old door", 4090)
        assert h.pread(20, 4090) == b"through the old door"
    """)


def test_without_structured_replies_everything_but_df_is_offered(server: Server) -> None:
    server.script("""
        assert h.can_df()
        old = unconnected()
        old.set_handshake_flags(0)
        old.connect_uri(uri)
        for peer in connect(structured=False), old:
            assert not peer.can_df()
            for ability in "can_flush can_fua can_trim can_zero can_fast_zero can_cache can_multi_conn".split():
                assert getattr(peer, ability)(), ability
    """)


def test_the_flags_behind_export_name_do_not_claim_df(server: Server) -> None:
    """libnbd hides this mistake of a server, so the bytes are looked at."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.socket))
        client.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 4) + b"disk")
        answer = client.recv(18 + 10, socket.MSG_WAITALL)
    size, flags = struct.unpack(">QH", answer[18:])
    assert (size, flags) == (128 << 20, 0b1101_0110_1101)


def test_export_name_of_nobody_ends_only_that_connection(server: Server) -> None:
    server.script("""
        for name in "nobody", "x" * 4096:
            stranger = unconnected()
            stranger.set_handshake_flags(0)
            stranger.set_export_name(name)
            try:
                stranger.connect_unix(uri.partition("socket=")[2])
            except nbd.Error:
                assert stranger.aio_is_dead() or stranger.aio_is_closed()
            else:
                raise AssertionError("there is no such export")
        assert h.pread(1, 0) == b"\\0"
    """)


def test_a_name_of_any_letters_and_length_is_served(serve: Serve) -> None:
    names = ["Größe 1/2", "日本", "n" * 255]
    server = serve(*(f"{name}=1M" for name in names))
    for number, name in enumerate(names):
        server.script(f"h.pwrite(b'{number}', 0)\nassert h.get_export_name() == {name!r}", export=name)
    for number, name in enumerate(names):
        server.script(f"assert h.pread(1, 0) == b'{number}'", export=name)


def test_a_client_that_may_use_tls_gets_plaintext_and_one_that_must_leaves(server: Server) -> None:
    server.script("""
        may = unconnected()
        may.set_tls(nbd.TLS_ALLOW)
        may.connect_uri(uri)
        assert not may.get_tls_negotiated() and may.pread(1, 0) == b"\\0"
        must = unconnected()
        must.set_tls(nbd.TLS_REQUIRE)
        try:
            must.connect_uri(uri)
        except nbd.Error:
            pass
        else:
            raise AssertionError("this server has no certificate")
        assert h.pread(1, 0) == b"\\0"
    """)
