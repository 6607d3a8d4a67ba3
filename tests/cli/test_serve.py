"""`nbdram serve` as a user starts it: what it prints, what it refuses, and that a refusal changes nothing."""

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import stat
import sys
from pathlib import Path

import pytest

from nbdram.cli import main
from nbdram.config import format_size, parse_nbd_uri
from nbdram.memory.available import most_memory
from tests.helpers import CLUSTER, GIB, MIB, PAGE, TIB, Finished, command_line, dial, run, run_command, running, u32

SOMEWHERE = ("--metrics", "off", "--memory", "64M")


async def refused(directory: Path, *arguments: str) -> Finished:
    """Run a server that must not start."""
    listen = () if "--listen" in arguments else ("--listen", f"unix:{directory / 'nbd.sock'}")
    return await run("serve", *listen, "--control", str(directory / "control"), *SOMEWHERE, *arguments)


def sentence(ended: Finished, code: int) -> str:
    """The one line of an error."""
    assert ended.code == code, ended
    assert ended.output == ""
    (line,) = ended.errors.splitlines()
    assert line.startswith("nbdram: ")
    return line.removeprefix("nbdram: ")


# -- what it prints ----------------------------------------------------------------------------------


async def test_the_uris_and_commands_that_are_printed_can_be_pasted(tmp_path: Path) -> None:
    path = tmp_path / "a b.sock"
    listen = ("--listen", f"unix:{path}", "--listen", "tcp://127.0.0.1:0", "--listen", "tcp://[::1]:0")
    exports = ("--export", "one=1G", "--export", "it's two=2G,ro")
    async with running(tmp_path, *listen, *exports, uris=6) as here:
        found = [parse_nbd_uri(uri) for uri in here.uris]
        assert [name for _, name in found] == ["one"] * 3 + ["it's two"] * 3
        assert {endpoint.path or endpoint.host for endpoint, _ in found} == {str(path), "127.0.0.1", "::1"}
        for uri in here.uris:
            told = await run("info", uri)
            assert told.code == 0, told


async def test_the_command_that_attaches_is_quoted_for_a_shell(tmp_path: Path) -> None:
    path = tmp_path / "a b.sock"
    command = command_line("serve", "--listen", f"unix:{path}", "--export", "it's=1G", "--control", f"{tmp_path}/c")
    process = await asyncio.create_subprocess_exec(*command, *SOMEWHERE, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    lines = [(await process.stdout.readline()).decode() for _ in range(2)]
    process.terminate()
    await process.communicate()
    assert shlex.split(lines[1]) == ["nbd-client", "-unix", str(path), "/dev/nbd0", "-N", "it's"]


async def test_nobody_needs_to_listen_to_what_is_printed(tmp_path: Path) -> None:
    command = command_line(
        "serve", "--listen", f"unix:{tmp_path / 'nbd.sock'}", "--control", f"{tmp_path}/c", *SOMEWHERE
    )
    reader, writer = os.pipe()
    os.close(reader)
    process = await asyncio.create_subprocess_exec(*command, stdout=writer, stderr=asyncio.subprocess.PIPE)
    os.close(writer)
    while not (tmp_path / "nbd.sock").exists():
        await asyncio.sleep(0.01)
    async with await dial(tmp_path / "nbd.sock") as client:
        await client.enter()
        assert client.size == TIB
    process.terminate()
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")


# The defaults need the real runtime directory and port 10809, which others may use: a network and a file system of its
# own for each run.
ALONE = "ip link set lo up; mount -t tmpfs none /run; exec "


async def test_the_defaults_are_one_export_of_1_tib_on_a_private_socket_and_loopback(tmp_path: Path) -> None:
    script = f"""{ALONE} {sys.executable} - <<'END'
import os, signal, stat, subprocess, sys
server = subprocess.Popen([sys.executable, "-m", "nbdram", "serve"], stdout=subprocess.PIPE, text=True)
for _ in range(4):
    print(server.stdout.readline(), end="")
print(oct(stat.S_IMODE(os.stat("/run/nbdram.sock").st_mode)), oct(stat.S_IMODE(os.stat("/run/nbdram.control").st_mode)))
for uri in "nbd://127.0.0.1", "nbd+unix:///?socket=/run/nbdram.sock":
    subprocess.run([sys.executable, "-m", "nbdram", "list", uri], check=True)
subprocess.run([sys.executable, "-m", "nbdram", "stats"], check=True, stdout=subprocess.DEVNULL)
server.terminate()
print(server.wait(), os.listdir("/run"))
END"""
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--net", "--mount", "sh", "-c", script),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    output, _ = await process.communicate()
    assert output.decode().splitlines() == [
        "nbd+unix:///ram?socket=/run/nbdram.sock",
        "    nbd-client -unix /run/nbdram.sock /dev/nbd0 -N ram",
        "nbd://127.0.0.1/ram",
        "    nbd-client 127.0.0.1 10809 /dev/nbd0 -N ram",
        "0o600 0o600",
        "ram",
        "ram",
        "0 []",
    ]


# -- what it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--export", "scratch"), "--export 'scratch': write NAME=MAXSIZE, as in scratch=16G"),
        (("--export", "a=many"), "'many' is not a size"),
        (("--export", "a=1G", "--export", "a=2G"), "there are two exports called 'a': give each a name of its own"),
        (("--listen", "127.0.0.1:10809"), "write unix:PATH, tcp://HOST:PORT or fd"),
        (("--listen", "tcp://0.0.0.0"), "allow it with --allow-plaintext"),
        (
            ("--memory", "lots"),
            "--memory 'lots' is not a size: write a whole number and K, M, G or T, as in 16G, or auto",
        ),
        (("--write-wait", "-1"), "--write-wait '-1' is not a time of at most 3600 s"),
        (("--memory", "16M"), "--memory must be at least 32 MiB"),
        (("--swap", "/var/swap"), "write disk:PATH or disk:PATH,max=SIZE"),
        (("--swap", "disk:/x/y", "--swap", "disk:/x/../x/y/"), "--swap: /x/../x/y is named twice: name each"),
        (("--metrics", "x"), "write ADDRESS:PORT"),
    ],
)
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    code = main(["serve", *arguments])
    assert told in sentence(Finished(code, *capsys.readouterr()), 2)


@pytest.mark.parametrize("option", ["--state-dir", "--swap"])
def test_a_file_where_a_directory_belongs_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    (tmp_path / "file").touch()
    path = f"{tmp_path}/file"
    code = main(["serve", option, f"disk:{path}" if option == "--swap" else path, *SOMEWHERE])
    assert "it is not a directory, name one" in sentence(Finished(code, *capsys.readouterr()), 1)


@pytest.mark.parametrize(
    "arguments",
    [(), ("bogus",), ("serve", "x"), ("serve", "--exprt", "a=1G"), ("serve", "--log-format", "x"), ("list",)],
)
def test_a_malformed_command_line_gets_one_sentence_too(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    command = " ".join(("nbdram", *(word for word in arguments[:1] if word != "bogus")))
    assert line.startswith(f"{command}: ")
    assert line.endswith(f"`{command} --help`")


async def test_a_port_in_use_is_a_failure_that_leaves_nothing_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        listen = ("--listen", f"unix:{tmp_path / 'nbd.sock'}", "--listen", f"tcp://127.0.0.1:{port}")
        told = sentence(await refused(tmp_path, *listen), 1)
    assert told == (
        f"can't listen on tcp://127.0.0.1:{port}: Address already in use; stop what uses the port or choose another"
    )
    assert list(tmp_path.iterdir()) == []


async def test_a_second_server_on_a_live_socket_fails_and_the_first_one_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path) as here, await here.entered() as client:
        await client.write(0, b"precious")
        told = sentence(await refused(tmp_path, "--control", str(tmp_path / "other")), 1)
        assert told == f"another server listens on unix:{here.path}: stop it or choose another path"
        assert await client.read(0, 8) == b"precious"
        async with await here.entered() as late:
            assert await late.read(0, 8) == b"precious"


async def test_a_control_socket_in_use_is_a_failure_if_it_was_asked_for(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        listen = f"unix:{tmp_path / 'other.sock'}"
        told = sentence(await refused(tmp_path, "--listen", listen), 1)
        assert told == f"another server listens on unix:{tmp_path / 'control'}: stop it or choose another path"
        assert not (tmp_path / "other.sock").exists()
        assert here.process.returncode is None


async def test_a_socket_that_a_killed_server_left_is_taken_over(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        here.process.kill()
        await here.ended()
    assert (tmp_path / "nbd.sock").is_socket()
    async with running(tmp_path) as here, await here.entered() as client:
        assert await client.read(0, 1) == b"\0"


async def test_a_file_in_the_place_of_the_socket_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "nbd.sock").write_text("precious")
    told = sentence(await refused(tmp_path), 1)
    assert told.endswith("exists and is not a socket: choose another path or move it away")
    assert (tmp_path / "nbd.sock").read_text() == "precious"


async def test_too_many_open_files_at_the_start_are_told_so(tmp_path: Path) -> None:
    exports = [word for number in range(9) for word in ("--export", f"e{number}=1G")]
    command = ["prlimit", "--nofile=24", *command_line("serve", "--listen", f"unix:{tmp_path}/s", *exports)]
    process = await asyncio.create_subprocess_exec(*command, *SOMEWHERE, stderr=asyncio.subprocess.PIPE)
    errors = (await process.communicate())[1].decode()
    assert (process.returncode, errors) == (
        1,
        "nbdram: too many open files: allow this process more of them (ulimit -n)\n",
    )
    assert list(tmp_path.iterdir()) == []


async def test_more_memory_than_there_is_is_cut_to_that(tmp_path: Path) -> None:
    most, why = most_memory()
    async with running(tmp_path, "--memory", "1000T") as here:
        told = await run("stats", "--json", "--control", str(tmp_path / "control"))
        assert f'"limit": {most // PAGE * PAGE}' in told.output
        here.process.terminate()
        warned = (await here.ended()).errors
    assert f"--memory 1000 TiB is more than {why}: using {format_size(most)}" in warned


# -- what it allows ----------------------------------------------------------------------------------


async def test_an_address_for_others_is_served_if_that_is_allowed(tmp_path: Path) -> None:
    async with running(tmp_path, "--listen", "tcp://0.0.0.0:0", "--allow-plaintext") as here:
        port = re.sub(r".*:(\d+)/.*", r"\1", here.uris[0])
        assert (await run("list", f"nbd://127.0.0.1:{port}")).output == "ram\n"


async def test_sockets_of_a_service_manager_are_served_and_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "activated.sock"
    command = command_line("serve", "--listen", "fd", "--control", str(tmp_path / "control"), *SOMEWHERE)
    script = f"""
import os, socket, sys
unix, tcp = socket.socket(socket.AF_UNIX), socket.socket()
unix.bind({str(path)!r})
tcp.bind(("127.0.0.1", 0))
for number, sock in enumerate((unix, tcp), 3):
    sock.listen()
    moved = os.dup2(sock.fileno() if sock.fileno() > 9 else os.dup2(sock.fileno(), 10 + number), number)
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, {command!r})
"""
    async with running(tmp_path, command=[sys.executable, "-c", script], uris=2) as here:
        assert here.uris[0].endswith(f"?socket={path}")
        for uri in here.uris:
            assert (await run("list", uri)).output == "ram\n"
        here.process.terminate()
        assert (await here.ended()).code == 0
    assert stat.S_ISSOCK(path.stat().st_mode)


async def test_connections_are_logged_if_that_is_asked_for(tmp_path: Path) -> None:
    async with running(tmp_path, "--verbose") as here:
        async with await here.entered():
            pass
        async with await dial(here.path) as rude:
            await rude.send(u32(0xFFFFFFFF))
            await rude.rest()
        here.process.terminate()
        logged = (await here.ended()).errors
    for what in ("opened export 'ram' (simple replies)", "closed export 'ram'", "left in the handshake", "stopping"):
        assert what in logged


async def test_a_write_waits_for_memory_only_as_long_as_it_is_told(tmp_path: Path) -> None:
    """Noise does not compress, so that there is nothing to wait for, and the rest goes on."""
    async with running(tmp_path, "--memory", "48M", "--write-wait", "0.1") as here, await here.entered() as client:
        errors = set()
        for number in range(64):
            await client.send(client.request(1, number * MIB, payload=os.urandom(MIB)))
            errors.add((await client.replies(1))[client.last_cookie].error)
        assert errors == {0, 28}
        assert (await client.call(4, 0, GIB)).error == 0
        await client.write(0, b"x" * CLUSTER)


_LOOK_INTO = """if True:
    import json, os, sys
    theirs = set(sys.modules)  # of who measures coverage
    from nbdram.cli import main
    from nbdram.memory.malloc import give_back_what_is_free
    from nbdram.memory.reclaim import anonymous_bytes
    from nbdram.server import server
    def announce(_):
        modules, before = list(set(sys.modules) - theirs), anonymous_bytes()
        give_back_what_is_free()
        print(json.dumps([modules, before - anonymous_bytes()]), flush=True)
        os._exit(0)
    server.announce = announce
    main(sys.argv[1:])
"""


async def looked_into(directory: Path, *arguments: str) -> tuple[set[str], int]:
    """The modules that a server which is up has loaded, and how much memory it could give back."""
    sockets = ("--listen", f"unix:{directory / 'nbd.sock'}", "--control", str(directory / "control"))
    ended = await run_command([sys.executable, "-c", _LOOK_INTO, "serve", *sockets, *SOMEWHERE, *arguments])
    assert ended.code == 0, ended
    modules, free = json.loads(ended.output)
    return set(modules), free


async def test_a_server_that_is_up_has_given_back_what_its_start_took(tmp_path: Path) -> None:
    _, free = await looked_into(tmp_path)
    assert free < MIB // 2


# They would take 4 MiB, beside the 20 of the rest.
NOT_FOR_ALL = {
    *("cryptography", "redis", "secrets", "tomllib", "difflib", "stringprep", "importlib.resources"),
    *("nbdram.memory.statedir", "nbdram.memory.tiers.seal", "nbdram.memory.tiers.remote", "nbdram.server.tls"),
}


async def test_only_what_the_settings_ask_for_is_loaded(tmp_path: Path) -> None:
    modules, _ = await looked_into(tmp_path, "--metrics", "127.0.0.1:0")
    assert modules & NOT_FOR_ALL == set()


async def test_what_seals_is_loaded_before_anything_is_swapped(tmp_path: Path) -> None:
    """And not when somebody waits for it."""
    modules, _ = await looked_into(tmp_path, "--swap", f"disk:{tmp_path / 'swap'}")
    assert {"nbdram.memory.tiers.seal", "cryptography.hazmat.primitives.ciphers.aead"} <= modules


async def test_an_interrupt_before_all_is_set_up_ends_it_without_a_trace(tmp_path: Path) -> None:
    for delay in (0.02, 0.1, 0.2):
        command = command_line("serve", "--listen", f"unix:{tmp_path}/s", "--control", f"{tmp_path}/c", *SOMEWHERE)
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        await asyncio.sleep(delay)
        process.send_signal(signal.SIGTERM)
        errors = (await process.communicate())[1]
        assert process.returncode in (0, -signal.SIGTERM)
        assert errors == b""
