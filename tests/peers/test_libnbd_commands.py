"""Every command and flag of the transmission phase, asked by libnbd's Python module.

The scripts run under Debian's Python; debian/prelude.py says what they find in scope.
"""

import pytest

from .conftest import Serve
from .running import Server, output

# -- READ ----------------------------------------------------------------------------------------------


def test_nbdsh_writes_and_reads_back(server: Server) -> None:
    commands = "h.pwrite(b'hello', 4093); print(h.pread(7, 4092))"
    assert output("nbdsh", "-u", server.uri(), "-c", commands) == "bytearray(b'\\x00hello\\x00')\n"


def test_a_read_tells_holes_and_data_in_chunks_of_pages(server: Server) -> None:
    server.script("""
        h.pwrite(b"a" * PAGE, PAGE)
        h.pwrite(b"b", 5 * PAGE + 7)
        data, seen = chunks(h, 6 * PAGE, 100)
        assert data == bytes(PAGE - 100) + b"a" * PAGE + bytes(3 * PAGE + 7) + b"b" + bytes(PAGE - 8 + 100)
        assert seen == [
            ("hole", 100, PAGE - 100),
            ("data", PAGE, PAGE),
            ("hole", 2 * PAGE, 3 * PAGE),
            ("data", 5 * PAGE, PAGE),
            ("hole", 6 * PAGE, 100),
        ]
    """)


def test_a_read_of_resident_pages_is_one_chunk_and_of_holes_has_no_data(server: Server) -> None:
    server.script("""
        data, seen = chunks(h, 32 * MIB, 0)
        assert data == bytes(32 * MIB) and {kind for kind, _, _ in seen} == {"hole"}
        data = noise(3 * MIB)
        h.pwrite(data, 40 * MIB + 1)
        for offset, length in (0, 3 * MIB), (70000, 2 * MIB), (5, 4097), (4094, 1), (65535, 2):
            at = 40 * MIB + 1 + offset
            assert chunks(h, length, at) == (data[offset : offset + length], [("data", at, length)])
    """)


def test_a_df_read_is_one_chunk_even_over_holes(server: Server) -> None:
    server.script("""
        for page in range(0, 8192, 2):
            h.pwrite(b"x" * PAGE, page * PAGE)
        content = (b"x" * PAGE + bytes(PAGE)) * 4096
        for length in 2 * PAGE, 65536, MIB + 1, 32 * MIB:
            data, seen = chunks(h, length, 0, nbd.CMD_FLAG_DF)
            assert data == content[:length]
            assert seen == [("data", 0, length)]
    """)


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_32_mib_of_scattered_pages_are_read_in_one_request(server: Server, structured: bool) -> None:
    server.script(f"""
        for page in range(0, 8192, 2):
            h.pwrite(b"x" * PAGE, page * PAGE)
        peer = connect(structured={structured})
        assert peer.pread(32 * MIB, 0) == (b"x" * PAGE + bytes(PAGE)) * 4096
        assert peer.pread(2, PAGE - 1) == b"x\\0"
    """)


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_many_reads_of_scattered_pages_in_flight(server: Server, structured: bool) -> None:
    server.script(f"""
        length = 256 << 10
        for page in range(0, 64, 2):
            h.pwrite(b"x" * PAGE, page * PAGE)
        peer = connect(structured={structured})
        buffers = [nbd.Buffer(length) for _ in range(100)]
        finish(peer, [peer.aio_pread(buffer, 0) for buffer in buffers])
        for buffer in buffers:
            assert buffer.to_bytearray() == (b"x" * PAGE + bytes(PAGE)) * 32
    """)


def test_reading_holes_allocates_nothing(server: Server) -> None:
    server.script("""
        for peer in h, connect(structured=False):
            for length in 1, PAGE, 65536, 65537, 32 * MIB:
                assert peer.pread(length, 12345) == bytes(length)
    """)
    assert server.allocated_bytes() == 0


def test_pages_that_are_trimmed_behind_a_read_are_not_allocated_again(server: Server) -> None:
    """READ and TRIM of the same pages in one segment: the reply's views must not outlive the pages."""
    server.script("""
        import socket, struct
        def request(command, offset, length):
            return struct.pack(">IHHQQI", 0x25609513, 0, command, 0, offset, length)
        h.pwrite(b"x" * MIB, 0)
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(uri.partition("socket=")[2])
        peer.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 4) + b"disk")
        peer.sendall(b"".join(request(0, at, 65536) + request(4, at, 65536) for at in range(0, MIB, 65536)))
        left = 18 + 10 + 16 * (16 + 65536 + 16)
        while left:
            left -= len(peer.recv(min(left, MIB)))
    """)
    assert server.allocated_bytes() == 0


# -- WRITE, WRITE_ZEROES, TRIM ---------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_unaligned_changes_agree_with_a_model(server: Server, structured: bool) -> None:
    server.script(f"""
        peer = connect(structured={structured})
        chance, model = random.Random(11), bytearray(MIB)
        lengths = 1, 2, 511, 512, 513, 4095, 4096, 4097, 8191, 65535, 65536, 65537, 300001
        for number in range(1500):
            length = chance.choice(lengths)
            start = chance.choice((chance.randrange(MIB - length), chance.randrange(3) * 65536))
            end = start + length
            action = chance.randrange(5)
            if action < 2:
                model[start:end] = noise(length, number)
                peer.pwrite(model[start:end], start, chance.choice((0, nbd.CMD_FLAG_FUA)))
            elif action == 2:
                model[start:end] = bytes(length)
                peer.zero(length, start, chance.choice((0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO)))
            elif action == 3:  # whole pages become holes, the rest stays
                peer.trim(length, start)
                first, after = -(-start // PAGE) * PAGE, end // PAGE * PAGE
                if first < after:
                    model[first:after] = bytes(after - first)
            start = chance.randrange(MIB - length)
            assert peer.pread(length, start) == model[start : start + length], number
        assert peer.pread(MIB, 0) == model
    """)


def test_requests_of_32_mib_at_any_offset(server: Server) -> None:
    server.script("""
        for offset in 0, 1, 4095, 65537, h.get_size() - 32 * MIB:
            data = noise(32 * MIB, offset)
            h.pwrite(data, offset)
            assert h.pread(32 * MIB, offset) == data
    """)


def test_zeros_are_holes_unless_they_must_stay_allocated(server: Server) -> None:
    server.script("""
        h = connect(nbd.CONTEXT_BASE_ALLOCATION)
        h.pwrite(b"x" * MIB, 0)
        h.zero(MIB, 0)
        assert extents(h, MIB, 0) == [(MIB, nbd.STATE_HOLE | nbd.STATE_ZERO)]
        h.zero(MIB, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
        assert extents(h, MIB, 0)[0][1] & nbd.STATE_HOLE == 0
        assert h.pread(MIB, 0) == bytes(MIB)
    """)
    assert server.allocated_bytes() == (1 << 20) + 4096


def test_fast_zero_is_refused_only_where_it_would_not_be_fast(server: Server) -> None:
    server.script("""
        h.pwrite(b"x" * MIB, 0)
        h.zero(MIB - 1, 1, nbd.CMD_FLAG_FAST_ZERO)
        assert h.pread(MIB, 0) == b"x" + bytes(MIB - 1)
        refused(errno.ENOTSUP, h.zero, MIB, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
        assert h.pread(1, 0) == b"x"
    """)


@pytest.mark.parametrize("command", ["trim", "zero"])
def test_almost_4_gib_are_cleared_in_one_request(serve: Serve, command: str) -> None:
    server = serve("disk=8G")
    server.script(f"""
        length = 2**32 - 1
        for at in range(0, 8 << 30, 64 * MIB):
            h.pwrite(noise(65537, at), at)
        h.{command}(length, 65536)
        assert h.pread(65537, 0) == noise(65536, 0)[:65536] + b"\\0"
        for at in range(64 * MIB, 4 << 30, 64 * MIB):
            assert h.pread(65537, at) == bytes(65537)
        for at in range((4 << 30) + 64 * MIB, 8 << 30, 64 * MIB):
            assert h.pread(65537, at) == noise(65537, at)
    """)


def test_trim_gives_memory_back_at_once(server: Server) -> None:
    server.script("""
        h.pwrite(noise(32 * MIB), 0)
        h.trim(32 * MIB - 4096, 0, nbd.CMD_FLAG_FUA)
    """)
    assert server.allocated_bytes() == 2 * 4096  # the last page, and its page of the index


# -- BLOCK_STATUS, CACHE, FLUSH --------------------------------------------------------------------------


def test_block_status_answers_for_every_context(server: Server) -> None:
    server.script("""
        h = connect("base:allocation", "x-nbdram:tier")
        h.pwrite(b"x" * PAGE, 2 * PAGE)
        assert extents(h, MIB, 0) == [(2 * PAGE, 3), (PAGE, 0), (MIB - 3 * PAGE, 3)]
        assert extents(h, MIB, 0, "x-nbdram:tier") == [(2 * PAGE, 0), (PAGE, 1), (MIB - 3 * PAGE, 0)]
        assert extents(h, 3, 3 * PAGE - 1) == [(1, 0), (2, 3)]
    """)


def test_req_one_is_one_extent_within_the_request(server: Server) -> None:
    server.script("""
        h = connect("base:allocation", "x-nbdram:tier")
        h.pwrite(b"x" * PAGE, 2 * PAGE)
        for context, hole, data in ("base:allocation", 3, 0), ("x-nbdram:tier", 0, 1):
            assert extents(h, MIB, 0, context, nbd.CMD_FLAG_REQ_ONE) == [(2 * PAGE, hole)]
            assert extents(h, MIB, 2 * PAGE + 9, context, nbd.CMD_FLAG_REQ_ONE) == [(PAGE - 9, data)]
            assert extents(h, 5, 2 * PAGE, context, nbd.CMD_FLAG_REQ_ONE) == [(5, data)]
    """)


def test_block_status_of_almost_4_gib_is_answered_in_parts(serve: Serve) -> None:
    server = serve("disk=8G")
    server.script("""
        h = connect(nbd.CONTEXT_BASE_ALLOCATION)
        length = 2**32 - 1
        assert extents(h, length, 1) == [(length, 3)]
        for page in range(0, 40000, 2):
            h.pwrite(b"x", page * PAGE)
        at, states = 0, []
        while at < 40000 * PAGE:
            for size, state in extents(h, 40000 * PAGE - at, at):
                states.append((at, size, state))
                at += size
        assert states == [(page * PAGE, PAGE, 3 * (page % 2)) for page in range(40000)]
    """)


def test_cache_and_flush_succeed_and_allocate_nothing(server: Server) -> None:
    server.script("""
        h.cache(64 * MIB, 1)
        h.flush()
    """)
    assert server.allocated_bytes() == 0


def test_fua_is_accepted_on_every_command(server: Server) -> None:
    server.script("""
        h = connect(nbd.CONTEXT_BASE_ALLOCATION, strict=False)
        fua = nbd.CMD_FLAG_FUA
        h.pwrite(b"x" * PAGE, 0, fua)
        assert h.pread_structured(PAGE, 0, lambda *_: 0, fua) == b"x" * PAGE
        h.zero(10, 0, fua)
        h.trim(PAGE, PAGE, fua)
        h.cache(PAGE, 0, fua)
        h.flush(fua)
        assert extents(h, PAGE, 0, flags=fua) == [(PAGE, 0)]
    """)


# -- requests that must be refused, and nothing else -----------------------------------------------------


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_past_the_end_is_an_error_and_the_connection_lives(server: Server, structured: bool) -> None:
    server.script(f"""
        h = connect(structured={structured}, strict=False)
        size = h.get_size()
        for offset, length in (size - 1, 2), (size, 1), (0, size + 1), (2**63, 65536), (2**64 - 4096, 4096):
            refused(errno.EINVAL, h.trim, length, offset)
            refused(errno.EINVAL, h.cache, length, offset)
            refused(errno.ENOSPC, h.zero, length, offset)
            if length <= 32 * MIB:
                refused(errno.EINVAL, h.pread, length, offset)
                refused(errno.ENOSPC, h.pwrite, bytes(length), offset)
        h.pwrite(b"end", size - 3)
        assert h.pread(3, size - 3) == b"end"
    """)


def test_block_status_is_refused_past_the_end_and_without_contexts(server: Server) -> None:
    server.script("""
        with_contexts = connect(nbd.CONTEXT_BASE_ALLOCATION, strict=False)
        size = with_contexts.get_size()
        for length, offset in (2, size - 1), (1, size), (0xFFFFFFFF, 0), (1, 2**64 - 1), (0, 0):
            refused(errno.EINVAL, with_contexts.block_status, length, offset, lambda *_: 0)
        assert extents(with_contexts, size, 0) == [(size, 3)]
        without = connect(strict=False)
        refused(errno.EINVAL, without.block_status, 1, 0, lambda *_: 0)
        without.flush()
    """)


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_more_than_32_mib_is_refused_and_its_payload_drained(server: Server, structured: bool) -> None:
    server.script(f"""
        h = connect(structured={structured}, strict=False)
        for length in 32 * MIB + 1, 64 * MIB:
            refused(errno.EINVAL, h.pwrite, bytes(length), 0)
            refused(errno.EINVAL, h.pread, length, 0)
        h.pwrite(b"alive", 0)
        assert h.pread(5, 0) == b"alive"
    """)


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
def test_requests_of_no_bytes_do_not_disconnect(server: Server, structured: bool) -> None:
    server.script(f"""
        h = connect(structured={structured}, strict=False)
        for offset in 0, 1, 65536, h.get_size():
            assert h.pread(0, offset) == b""
            h.pwrite(b"", offset)
            h.zero(0, offset)
            h.trim(0, offset)
            h.cache(0, offset)
        assert h.pread(PAGE, 0) == bytes(PAGE)
    """)
    assert server.allocated_bytes() == 0


def test_flags_that_a_command_does_not_take_are_refused(server: Server) -> None:
    server.script("""
        h = connect(nbd.CONTEXT_BASE_ALLOCATION, strict=False)
        no_hole, df, req_one, fast = nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO
        for flags in no_hole, df, req_one, fast, 32, 0x8000:
            refused(errno.EINVAL, h.pwrite, b"x" * 100, 0, flags)
            refused(errno.EINVAL, h.pwrite, b"x" * MIB, 0, flags)
            refused(errno.EINVAL, h.trim, PAGE, 0, flags)
            refused(errno.EINVAL, h.flush, flags)
            refused(errno.EINVAL, h.cache, PAGE, 0, flags)
            if flags != df:
                refused(errno.EINVAL, h.pread, PAGE, 0, flags)
            if flags not in (no_hole, fast):
                refused(errno.EINVAL, h.zero, PAGE, 0, flags)
            if flags != req_one:
                refused(errno.EINVAL, h.block_status, PAGE, 0, lambda *_: 0, flags)
        refused(errno.EINVAL, connect(structured=False, strict=False).pread, PAGE, 0, df)
        assert h.pread(PAGE, 0) == bytes(PAGE)
    """)


def test_a_read_only_export_refuses_every_change(serve: Serve) -> None:
    server = serve("rom=1M,ro")
    server.script(
        """
        h = connect(strict=False)
        assert h.is_read_only()
        for length in 1, PAGE, MIB:
            refused(errno.EPERM, h.pwrite, b"x" * length, 0)
            refused(errno.EPERM, h.zero, length, 0)
            refused(errno.EPERM, h.trim, length, 0)
        h.flush()
        assert h.pread(MIB, 0) == bytes(MIB)
        """,
        export="rom",
    )
    assert server.allocated_bytes() == 0
