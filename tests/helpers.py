"""What tests say to a server and how they read its answers: bytes, laid out by hand.

The layouts here are written down a second time, from the specification, so that they do not agree with
`nbdram.protocol.wire` by construction. Numbers that only name things (options, commands, flags) come from
there; `test_wire.py` holds them against the specification.
"""

import asyncio
import os
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nbdram.config import Endpoint, ExportSettings, ServeSettings, parse_size
from nbdram.memory.budget import Budget
from nbdram.memory.device import Device
from nbdram.memory.reclaim import anonymous_bytes
from nbdram.protocol.handshake import ReplyMode
from nbdram.protocol.wire import Command, CommandFlag, Option, OptionReply, ReplyType
from nbdram.server.connection import Connection
from nbdram.server.server import Server

PAGE = 4096
CLUSTER = 65536
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

NBDMAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
GREETING = NBDMAGIC + IHAVEOPT + b"\0\x03"
REPLY_MAGIC = bytes.fromhex("0003e889045565a9")
FIXED, NO_ZEROES = 1, 2

ALL_MODES = (ReplyMode.SIMPLE, ReplyMode.STRUCTURED, ReplyMode.EXTENDED)
CHUNK_MODES = (ReplyMode.STRUCTURED, ReplyMode.EXTENDED)

# No test waits for this long unless it fails.
PATIENCE_S = 60.0


# -- handshake phase, in bytes -----------------------------------------------------------------------


def u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


def string(text: str | bytes) -> bytes:
    """A string with its length in front."""
    raw = text.encode() if isinstance(text, str) else text
    return u32(len(raw)) + raw


def client_flags(flags: int = FIXED | NO_ZEROES) -> bytes:
    return u32(flags)


def option(number: int, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """An option; `length` lies about the payload's."""
    return IHAVEOPT + u32(number) + u32(len(payload) if length is None else length) + payload


def info_payload(name: str | bytes, wanted: Sequence[int] = ()) -> bytes:
    return string(name) + u16(len(wanted)) + b"".join(map(u16, wanted))


def go(name: str | bytes = "ram", wanted: Sequence[int] = ()) -> bytes:
    return option(Option.GO, info_payload(name, wanted))


def meta_payload(name: str | bytes, queries: Iterable[str | bytes]) -> bytes:
    listed = [string(query) for query in queries]
    return string(name) + u32(len(listed)) + b"".join(listed)


def option_reply(number: int, kind: int, payload: bytes = b"") -> bytes:
    """What the server is expected to answer."""
    return REPLY_MAGIC + u32(number) + u32(kind) + u32(len(payload)) + payload


@dataclass(frozen=True)
class OptionAnswer:
    option: int
    kind: int
    payload: bytes = b""


def parse_option_answers(data: bytes) -> list[OptionAnswer]:
    """All option replies in `data`, which must be whole."""
    answers = []
    while data:
        magic, number, kind, length = struct.unpack_from(">8sIII", data)
        assert magic == REPLY_MAGIC
        assert len(data) >= 20 + length, "an option reply is cut short"
        answers.append(OptionAnswer(number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return answers


# -- transmission phase, in bytes --------------------------------------------------------------------


def request(
    mode: ReplyMode,
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    flags: int = 0,
    cookie: int = 1,
    payload: bytes = b"",
) -> bytes:
    """One request. With extended headers a payload sets PAYLOAD_LEN, as the specification wants it."""
    if mode is ReplyMode.EXTENDED:
        if payload:
            flags |= CommandFlag.PAYLOAD_LEN
        return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + payload
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload


@dataclass(frozen=True)
class Chunk:
    """One reply message. `error` and `data` of a simple reply; all else of chunks."""

    cookie: int
    kind: int = -1
    done: bool = True
    offset: int = 0
    error: int = 0
    body: bytes = b""


@dataclass
class Answer:
    """All that a server said to one request."""

    error: int = 0
    message: str = ""
    data: bytes = b""
    chunks: list[Chunk] = field(default_factory=list)
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def kinds(self) -> list[int]:
        return [chunk.kind for chunk in self.chunks]


@dataclass(frozen=True)
class _Pending:
    command: int
    offset: int
    length: int


class Client:
    """A raw client: it sends any bytes, and takes replies apart. An async context manager that hangs up."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.mode = ReplyMode.SIMPLE
        self.size = 0
        self.flags = 0
        self.contexts: dict[str, int] = {}
        self.patience_s = PATIENCE_S
        self._cookie = 0
        self._pending: dict[int, _Pending] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """Hang up at once, whatever is on its way."""
        self.writer.transport.abort()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send_in_pieces(self, data: bytes, cuts: Iterable[int]) -> None:
        """Send `data` cut at `cuts`; the server gets to see each piece by itself."""
        start = 0
        for end in (*cuts, len(data)):
            self.writer.write(data[start:end])
            await self.writer.drain()
            await asyncio.sleep(0)
            start = end

    async def receive(self, length: int) -> bytes:
        async with asyncio.timeout(self.patience_s):
            return await self.reader.readexactly(length)

    async def rest(self) -> bytes:
        """All that comes until the server hangs up."""
        received = b""
        async with asyncio.timeout(PATIENCE_S):
            try:
                while piece := await self.reader.read(1 << 16):
                    received += piece
            except ConnectionError:
                pass
        return received

    # -- handshake ---------------------------------------------------------------------------------

    async def greet(self, flags: int = FIXED | NO_ZEROES) -> None:
        assert await self.receive(18) == GREETING
        await self.send(client_flags(flags))

    async def answers(self) -> list[OptionAnswer]:
        """The replies to one option, up to ACK or an error."""
        found: list[OptionAnswer] = []
        while not found or found[-1].kind in (OptionReply.SERVER, OptionReply.INFO, OptionReply.META_CONTEXT):
            magic, number, kind, length = struct.unpack(">8sIII", await self.receive(20))
            assert magic == REPLY_MAGIC
            found.append(OptionAnswer(number, kind, await self.receive(length)))
        return found

    async def ask(self, number: int, payload: bytes = b"") -> list[OptionAnswer]:
        await self.send(option(number, payload))
        return await self.answers()

    async def agree(self, mode: ReplyMode) -> None:
        if mode is not ReplyMode.SIMPLE:
            wanted = Option.STRUCTURED_REPLY if mode is ReplyMode.STRUCTURED else Option.EXTENDED_HEADERS
            answers = await self.ask(wanted)
            assert answers == [OptionAnswer(wanted, OptionReply.ACK)]
        self.mode = mode

    async def select(self, name: str, *queries: str) -> None:
        for answer in await self.ask(Option.SET_META_CONTEXT, meta_payload(name, queries)):
            if answer.kind == OptionReply.META_CONTEXT:
                self.contexts[answer.payload[4:].decode()] = int.from_bytes(answer.payload[:4], "big")

    async def enter(self, name: str = "ram", mode: ReplyMode = ReplyMode.SIMPLE, contexts: Sequence[str] = ()) -> None:
        """The whole handshake."""
        await self.greet()
        await self.agree(mode)
        if contexts:
            await self.select(name, *contexts)
        answers = await self.ask(Option.GO, info_payload(name))
        assert answers[-1].kind == OptionReply.ACK, answers
        _, self.size, self.flags = struct.unpack(">HQH", answers[0].payload)

    # -- requests ----------------------------------------------------------------------------------

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        cookie: int | None = None,
    ) -> bytes:
        """The bytes of a request, whose answer `replies` will understand."""
        if cookie is None:
            self._cookie += 1
            cookie = self._cookie
        if payload and command == Command.WRITE and not length:
            length = len(payload)
        self._pending[cookie] = _Pending(command, offset, length)
        return request(self.mode, command, offset, length, flags=flags, cookie=cookie, payload=payload)

    @property
    def last_cookie(self) -> int:
        return self._cookie

    async def chunk(self) -> Chunk:
        """The next reply message, of whatever request."""
        magic = int.from_bytes(await self.receive(4), "big")
        if magic == 0x67446698:
            assert self.mode is not ReplyMode.EXTENDED, "a simple reply in spite of extended headers"
            error, cookie = struct.unpack(">IQ", await self.receive(12))
            pending = self._pending[cookie]
            body = b""
            if pending.command == Command.READ and not error:
                assert self.mode is ReplyMode.SIMPLE, "a READ was answered by a simple reply"
                body = await self.receive(pending.length)
            return Chunk(cookie, error=error, body=body)
        if self.mode is ReplyMode.EXTENDED:
            assert magic == 0x6E8A278C, f"{magic:#x}"
            flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", await self.receive(28))
            assert offset == self._pending[cookie].offset, "the reply does not echo the request's offset"
        else:
            assert self.mode is ReplyMode.STRUCTURED
            assert magic == 0x668E33EF, f"{magic:#x}"
            flags, kind, cookie, length = struct.unpack(">HHQI", await self.receive(16))
        assert flags in (0, 1)
        return Chunk(cookie, kind, bool(flags), body=await self.receive(length))

    async def replies(self, count: int) -> dict[int, Answer]:
        """The whole answers to `count` requests, by cookie; chunks of different ones may be mixed."""
        answers: dict[int, Answer] = {}
        finished: dict[int, Answer] = {}
        buffers: dict[int, bytearray] = {}
        while len(finished) < count:
            chunk = await self.chunk()
            answer = answers.setdefault(chunk.cookie, Answer())
            pending = self._pending[chunk.cookie]
            answer.chunks.append(chunk)
            if chunk.kind == -1:
                answer.error, answer.data = chunk.error, chunk.body
            elif pending.command == Command.READ and chunk.kind in (ReplyType.OFFSET_DATA, ReplyType.OFFSET_HOLE):
                buffer = buffers.setdefault(chunk.cookie, bytearray(b"?" * pending.length))
                self._place(chunk, pending, buffer)
                answer.data = bytes(buffer)
            else:
                self._interpret(chunk, answer)
            if chunk.done:
                finished[chunk.cookie] = answers.pop(chunk.cookie)
                del self._pending[chunk.cookie]
        assert not answers, "a reply lacks its last chunk"
        return finished

    @staticmethod
    def _place(chunk: Chunk, pending: _Pending, buffer: bytearray) -> None:
        start = int.from_bytes(chunk.body[:8], "big") - pending.offset
        if chunk.kind == ReplyType.OFFSET_DATA:
            piece = chunk.body[8:]
        else:
            assert len(chunk.body) == 12
            piece = bytes(int.from_bytes(chunk.body[8:], "big"))
        assert piece, "a chunk without content"
        assert 0 <= start <= start + len(piece) <= pending.length, "a chunk outside of what was asked for"
        buffer[start : start + len(piece)] = piece

    @staticmethod
    def _interpret(chunk: Chunk, answer: Answer) -> None:
        match chunk.kind:
            case ReplyType.NONE:
                assert not chunk.body
            case ReplyType.ERROR:
                answer.error, length = struct.unpack_from(">IH", chunk.body)
                assert answer.error
                assert len(chunk.body) == 6 + length
                answer.message = chunk.body[6:].decode()
            case ReplyType.BLOCK_STATUS:
                context = int.from_bytes(chunk.body[:4], "big")
                assert context not in answer.status
                answer.status[context] = list(struct.iter_unpack(">II", chunk.body[4:]))
            case ReplyType.BLOCK_STATUS_EXT:
                context, count = struct.unpack_from(">II", chunk.body)
                assert context not in answer.status
                answer.status[context] = list(struct.iter_unpack(">QQ", chunk.body[8:]))
                assert len(answer.status[context]) == count
            case _:
                raise AssertionError(f"a chunk of type {chunk.kind}")

    async def call(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b""
    ) -> Answer:
        """One request and its whole answer."""
        await self.send(self.request(command, offset, length, flags=flags, payload=payload))
        (answer,) = (await self.replies(1)).values()
        return answer

    async def read(self, offset: int, length: int) -> bytes:
        answer = await self.call(Command.READ, offset, length)
        assert answer.error == 0, answer
        return answer.data

    async def write(self, offset: int, data: bytes) -> None:
        answer = await self.call(Command.WRITE, offset, payload=data)
        assert answer.error == 0, answer


async def dial(path: Path | str) -> Client:
    return Client(*await asyncio.open_unix_connection(str(path)))


# -- a server in this process ------------------------------------------------------------------------


@dataclass
class Served:
    """A server that shares this test's event loop."""

    server: Server
    path: Path

    async def client(self) -> Client:
        """Connected, and no more."""
        return await dial(self.path)

    async def entered(
        self, name: str = "ram", mode: ReplyMode = ReplyMode.SIMPLE, contexts: Sequence[str] = ()
    ) -> Client:
        """Connected, and in the transmission phase."""
        client = await self.client()
        await client.enter(name, mode, contexts)
        return client

    def device(self, name: str = "ram") -> Device:
        export = self.server.exports.get(name)
        assert export
        return export.device

    @property
    def connections(self) -> set[Connection]:
        return self.server.service.connections

    def connection(self) -> Connection:
        """The server's end of the only connection."""
        (connection,) = self.connections
        return connection

    async def all_gone(self) -> None:
        """Wait until the server has noticed that its clients hung up."""
        await eventually(lambda: not self.connections)

    async def still_answers(self, name: str = "ram") -> None:
        """Another client can do all that it could before."""
        async with await self.entered(name) as client:
            offset = client.size - PAGE
            await client.write(offset, b"still here")
            assert await client.read(offset, 10) == b"still here"
            assert (await client.call(Command.TRIM, offset, PAGE)).error == 0


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what the server does by itself and nobody reports."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


lone_devices: list[Device] = []  # that tests have made, and that are closed when these end


def lone_device(size: int, budget_bytes: int) -> Device:
    """A device without a server."""
    lone_devices.append(Device("disk", size, Budget(budget_bytes)))
    return lone_devices[-1]


def hot_pages(device: Device) -> int:
    """How many pages of `hot` the kernel says exist."""
    return os.fstat(device.backing.hot_fd).st_blocks * 512 // PAGE


def index_pages(device: Device) -> int:
    return os.fstat(device.backing.index_fd).st_blocks * 512 // PAGE


@asynccontextmanager
async def served(directory: Path, *exports: str, memory: str = "256M", **others: Any) -> AsyncIterator[Served]:
    """A server on a Unix socket in `directory`. Nothing may escape it, and no page may be lost.

    `others`: other fields of ServeSettings.
    """
    path = directory / "nbd.sock"
    settings = ServeSettings(
        exports=tuple(ExportSettings.parse(text) for text in exports or ("ram=1T",)),
        listen=(Endpoint(path=str(path)),),
        memory=parse_size(memory) + anonymous_bytes(),  # what this process has taken already counts too
        control=directory / "control",
    )
    settings = replace(settings, **others)
    escaped: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: escaped.append(context))
    server = Server(settings)
    await server.start()
    try:
        yield Served(server, path)
        for connection in list(server.service.connections):
            connection.abort()
        await eventually(lambda: not server.service.connections)
        for export in server.exports:
            assert hot_pages(export.device) == export.device.resident_pages, "pages that nobody accounts for"
    finally:
        await server.stop()
    assert not escaped, escaped


# -- a server, or another command, in a process of its own -------------------------------------------


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nbdram", *arguments]


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    output: str
    errors: str


async def run(*arguments: str, environment: Mapping[str, str] | None = None) -> Finished:
    """Run `nbdram ARGUMENTS` to its end."""
    return await run_command(command_line(*arguments), environment=environment)


async def run_command(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Finished:
    async with _process(command, environment) as process:
        output, errors = await process.communicate()
        assert process.returncode is not None
        return Finished(process.returncode, output.decode(), errors.decode())


@dataclass
class Running:
    """`nbdram serve` in a process of its own; `uris` is what it printed."""

    process: asyncio.subprocess.Process
    uris: list[str]
    directory: Path

    @property
    def path(self) -> Path:
        return self.directory / "nbd.sock"

    async def entered(
        self, name: str = "ram", mode: ReplyMode = ReplyMode.SIMPLE, contexts: Sequence[str] = ()
    ) -> Client:
        client = await dial(self.path)
        try:
            await client.enter(name, mode, contexts)
        except BaseException:
            client.kill()
            raise
        return client

    async def ended(self) -> Finished:
        """Wait for the end; what it printed after its URIs."""
        async with asyncio.timeout(PATIENCE_S):
            output, errors = await self.process.communicate()
        assert self.process.returncode is not None
        return Finished(self.process.returncode, output.decode(), errors.decode())

    def memory_kib(self, what: str) -> int:
        """A line of /proc/PID/status, such as RssAnon."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(what + ":"):
                return int(line.split()[1])
        raise AssertionError(f"no {what}")


@asynccontextmanager
async def running(
    directory: Path,
    *arguments: str,
    uris: int = 1,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Running]:
    """`nbdram serve` that has printed as many URIs as told; its sockets are in `directory` unless told otherwise."""
    if command is None:
        sockets = {"--listen": f"unix:{directory / 'nbd.sock'}", "--control": f"{directory / 'control'}"}
        settings = {**sockets, "--metrics": "off"}
        chosen = [word for pair in settings.items() if pair[0] not in arguments for word in pair]
        command = command_line("serve", *chosen, *arguments)
    async with _process(command, environment) as process:
        assert process.stdout
        printed: list[str] = []
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(uris):
                line = (await process.stdout.readline()).decode()
                if not line:
                    errors = (await process.communicate())[1].decode()
                    raise AssertionError(f"the server did not start: {errors}")
                printed.append(line.rstrip("\n"))
                hint = (await process.stdout.readline()).decode()
                assert hint.startswith("    nbd-client "), hint
        yield Running(process, printed, directory)


@asynccontextmanager
async def _process(
    command: Sequence[str], environment: Mapping[str, str] | None
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await process.communicate()
            except TimeoutError:
                process.kill()
                await process.communicate()
