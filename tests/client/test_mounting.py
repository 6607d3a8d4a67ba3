"""What `nbdram mount` says to mistakes before it begins, and how it goes back when it has begun."""

import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from nbdram import cli
from nbdram.cli import mount as cli_mount
from nbdram.cli import mount_helper
from nbdram.client import attachment, filesystems, mount_notes, mountinfo, mounting
from nbdram.client.mount_notes import MountNote, Place, name_for, note_of
from nbdram.client.mountinfo import Mounted, users_of
from nbdram.client.undoing import all_or_nothing, run, uninterrupted
from nbdram.config import format_size
from nbdram.errors import NbdramError
from nbdram.memory.available import most_memory
from tests.helpers import MIB


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Notes are in a directory of the test's own."""
    monkeypatch.setattr(attachment, "runtime_directory", lambda: tmp_path / "run")
    return tmp_path / "run/nbdram/mounts"


@pytest.fixture
def point(tmp_path: Path) -> Path:
    path = tmp_path / "scratch"
    path.mkdir()
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Exit code and the one sentence of `nbdram mount` (or what comes instead)."""
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("nbdram: ")
    assert said.err.count("\n") == 1
    return code, said.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["0", "DIR"], "above 0"),
        (["65T", "DIR"], "at most 64 TiB"),
        (["much", "DIR"], "'much' is not a size"),
        (["1G"], "say what to mount, and where"),
        (["1G", "DIR/missing"], "does not exist: make it"),
        (["1G", "/etc/passwd"], "is not a directory"),
        (["1G", "/etc"], "/etc is not empty"),
        (["1G", "/proc"], "is mounted at /proc: unmount it"),
        (["1G", "DIR", "--fs", "ntfs"], "nbdram can't make 'ntfs': choose one of ext4, xfs, btrfs"),
        (["1G", "DIR", "--fs", "ufs"], "attach the device with --block-size 512 and copy an image to it"),
        (["1G", "DIR", "--fs", "xfs", "--journal"], "--journal is for ext4"),
        (["1G", "DIR", "--memory", "1M"], "--memory must be at least 32 MiB"),
        (["1G", "DIR", "--memory", "lots"], "--memory 'lots' is not a size"),
        (["1G", "DIR", "--name", "a/b"], "'a/b' can't be a mount's name"),
        (["1G", "DIR", "--uid", "nobody-here"], "there is no user called 'nobody-here'"),
        (["1G", "DIR", "--gid", "nobody-here"], "there is no group called 'nobody-here'"),
        (["1G", "DIR", "--mode", "rwx"], "write permissions in octal"),
        (["1G", "DIR", "--mode", "77777"], "write permissions in octal"),
        (["1G", "DIR", "--device", "/dev/sda"], "is not a network block device"),
        (["1G", "DIR", "--connections", "17"], "--connections must be 1 to 16"),
        (["1G", "DIR", "--swap", "tape:/x"], "write disk:PATH"),
        (["1G", "DIR", "--metrics", "here"], "write ADDRESS:PORT"),
        (["nbd://host/x", "DIR", "--keep"], "are for a SIZE"),
        (["http://host/x", "DIR"], "is not an NBD URI"),
    ],
)
def test_a_mistake_gets_one_sentence_and_nothing_is_begun(
    capsys: pytest.CaptureFixture[str], runtime: Path, point: Path, arguments: list[str], sentence: str
) -> None:
    code, said = refusal(capsys, "mount", *(word.replace("DIR", str(point)) for word in arguments))
    assert code == 2
    assert sentence in said
    assert not runtime.exists()


def test_more_memory_than_there_is_is_cut_to_that(caplog: pytest.LogCaptureFixture) -> None:
    most, why = most_memory()
    assert cli_mount._memory("1000T") == most
    assert caplog.messages == [f"--memory 1000 TiB is more than {why}: using {format_size(most)}"]
    assert cli_mount._memory("64M") == 64 * MIB
    assert len(caplog.messages) == 1


def test_who_can_not_mount_ufs_is_told_what_it_takes(point: Path) -> None:
    with pytest.raises(NbdramError, match=r"mount failed: .*; ufs takes --block-size 512 and -o ufstype=44bsd"):
        filesystems.mount("ufs", "noatime", Path("/dev/null"), point)
    with pytest.raises(NbdramError, match=r"mount failed: [^;]*$"):
        filesystems.mount("ext4", "noatime", Path("/dev/null"), point)


def test_a_kernel_without_the_module_is_told_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, point: Path
) -> None:
    monkeypatch.setattr(mounting, "MODULE", point / "no-module")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert refusal(capsys, "mount", "1G", point) == (
        1,
        "nbdram: this kernel has no network block devices: load the module with `modprobe nbd`\n",
    )


def test_names_are_made_of_mount_points_and_differ_where_these_do() -> None:
    assert name_for(Path("/scratch")) == "scratch"
    assert name_for(Path("/mnt/build")) == "mnt-build"
    odd = [Path("/mnt-build"), Path("/mnt build"), Path("/mnt\nbuild"), Path("/"), Path("/ü"), Path("/" + "x/" * 100)]
    names = [name_for(path) for path in odd]
    assert len({*names, "mnt-build"}) == len(odd) + 1
    for name in names:
        mount_notes.check_mount_name(name)


def test_notes_are_found_by_mount_point_and_by_name(runtime: Path, point: Path) -> None:
    assert note_of("scratch") is None
    kept = MountNote("old", str(point), "nbd://host/old", keep=True, server=("x", "y"))
    now = MountNote("scratch", str(point), "nbd://host/x", device="/dev/nbd0")
    for note in (kept, now):
        Place(note.name).make()
        Place(note.name).write(note)
    assert note_of(str(point)) == note_of("scratch") == now
    assert note_of("old") == kept
    (runtime / "old/mount.json").write_text("{")
    assert note_of("old") is None
    Place("scratch").remove()
    assert note_of("scratch") is None


def test_one_name_is_mounted_by_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_notes, "PATIENCE_S", 0.1)
    place = Place("scratch")
    right_now = pytest.raises(NbdramError, match="'scratch' is being mounted or unmounted right now")
    with place.locked(), right_now, place.locked():
        pass
    with place.locked():
        pass


def test_steps_are_undone_backwards_though_some_fail(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    def fail() -> None:
        raise NbdramError("the disk is stuck")

    def work() -> None:
        with all_or_nothing() as steps:
            steps.undo_with(done.append, "first")
            steps.undo_with(fail)
            steps.undo_with(done.append, "second")
            raise ValueError("third")

    with pytest.raises(ValueError, match="third"):
        work()
    assert done == ["second", "first"]
    assert "could not undo all of it: the disk is stuck" in capsys.readouterr().err


def test_a_signal_waits_for_a_step_of_which_nobody_could_tell_how_far_it_came() -> None:
    before = signal.getsignal(signal.SIGTERM)
    done: list[str] = []

    def work() -> None:
        with all_or_nothing() as steps:
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGTERM)
                steps.undo_with(done.append, "undone")
            done.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["undone"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_way_back_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def undo(what: str) -> None:
        run(["true"])  # as all that starts a child, it hears of signals that waited
        os.kill(os.getpid(), signal.SIGTERM)
        done.append(what)

    def work(*, waits: bool) -> None:
        with all_or_nothing() as steps:
            steps.undo_with(undo, "first")
            steps.undo_with(undo, "second")
            with uninterrupted() if waits else nullcontext():
                os.kill(os.getpid(), signal.SIGTERM)

    for waits in (True, False):
        with pytest.raises(KeyboardInterrupt):
            work(waits=waits)
        assert done == ["second", "first"]
        done.clear()


def test_a_signal_that_comes_when_all_is_done_comes_too_late() -> None:
    before = signal.getsignal(signal.SIGTERM)
    undone: list[str] = []
    try:
        with all_or_nothing() as steps:
            steps.undo_with(undone.append, "all that was done")
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert not undone
    finally:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.signal(signal.SIGTERM, before)


def test_what_fails_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NbdramError, match=r"can't read .*nothing: No such file"):
        filesystems.found_on(tmp_path / "nothing")
    with pytest.raises(NbdramError, match=r"umount failed: .*not mounted$"):
        filesystems.unmount(tmp_path)
    with pytest.raises(NbdramError, match=r"mkfs\.nothing is not installed: apt-get install e2fsprogs"):
        filesystems.program("mkfs.nothing", "e2fsprogs")


def test_who_keeps_a_file_system_busy_is_named(tmp_path: Path, shm: Path) -> None:
    here = Mounted("x", tmp_path, "x", os.makedev(4000, 1))
    assert users_of(here) == ""
    with (shm / "file").open("w"):
        there = os.stat(shm).st_dev
        assert os.getpid() in [int(process.name) for process in mountinfo.processes_on(there)]
        assert "(process " in users_of(replace(here, device=there))
    assert users_of(replace(here, point=Path("/"))).startswith("what is mounted at /")


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("scratch", "rw,size=64g", ["--name=scratch", "--options=rw", "--", "64g", "/x"]),
        ("none", "size=1g,keep,uid=7,x-a.b=c,_netdev,nofail", ["--keep", "--uid=7", "--", "1g", "/x"]),
        ("nbd://h/n", "nosuid,ro,dead-timeout=9", ["--dead-timeout=9", "--options=nosuid,ro", "--", "nbd://h/n", "/x"]),
    ],
)
def test_options_of_fstab_become_those_of_the_command(source: str, options: str, words: list[str]) -> None:
    assert mount_helper.translate(source, "/x", options) == ["mount", *words]


def test_a_name_that_mount_took_for_a_path_is_a_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, point: Path
) -> None:
    options = ["-o", "size=1g,device=/dev/nbd99999999"]
    assert mount_helper.mount([str(point), str(point), *options]) == 1
    assert f"'{point}' can't be a mount's name" in capsys.readouterr().err
    monkeypatch.chdir(point.parent)
    assert mount_helper.mount([str(point), str(point), "-f", *options]) == 0
    asked: list[str] = []
    monkeypatch.setattr(mount_helper, "main", asked.extend)
    mount_helper.mount([str(point), str(point), "-o", "size=1g"])
    assert asked == ["mount", "--name=scratch", "--", "1g", str(point)]


def test_what_is_mounted_already_is_no_mistake_in_fstab(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, point: Path
) -> None:
    monkeypatch.setattr(mount_notes, "mounted_at", lambda path: Mounted("/dev/nbd7", path, "ext4", 0))
    Place("work").make()
    Place("work").write(MountNote("work", str(point), "nbd://h/n", "/dev/nbd7"))
    assert mount_helper.mount(["nbd://h/n", str(point)]) == 0
    assert capsys.readouterr().err == f"mount.nbdram: nbd://h/n is mounted at {point} already\n"
    monkeypatch.setattr(mount_helper, "main", lambda words: 1)
    assert mount_helper.mount(["nbd://h/other", str(point)]) == 32
    assert mount_helper.mount(["work", str(point), "-o", "size=1g"]) == 32
    Place("work").write(MountNote("work", str(point), "nbd+unix:///work", "/dev/nbd7", server=("serve",)))
    assert mount_helper.mount(["work", str(point), "-o", "size=1g"]) == 0


def test_the_helper_speaks_mounts_exit_codes(capsys: pytest.CaptureFixture[str], point: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        mount_helper.mount(["work", str(point), "-o", "nosuid"])
    assert ended.value.code == 1
    assert "say how large it is" in capsys.readouterr().err
    assert mount_helper.mount(["work", str(point), "-f", "-o", "size=1g"]) == 0
    assert mount_helper.mount(["work", str(point), "-s", "-o", "size=0"]) == 1
    assert mount_helper.mount(["work", str(point), "-o", "size=1g,name=taken,device=/dev/nbd99999999"]) == 1
