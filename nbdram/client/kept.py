"""One device that is kept alive: a thread that watches its connections and replaces those that die.

The rules:
1. A duplicate of each socket that the kernel has is watched for hang-up, and never read: bytes are the kernel's.
2. A new socket is given to the kernel only after it was checked to lead to the same device (`dial.check_same`).
3. The kernel takes a socket only if it has noticed that one died, and drops it silently otherwise. So the kernel's
   LINK_DEAD is waited for, for a moment; where it can't be heard, and in any case, the device is read from
   afterwards, and if that does not come back more sockets are given.
4. Sockets first, the size in a message of its own, and never a smaller one.
5. With several connections the kernel gives one up on which a request waits for longer than its timeout, which should
   be short, because requests that a dead server has taken wait for it as well. So it is raised when the server turns
   out to have been there, only slow, and set back when one was really away.
6. With one connection the kernel only looks, when a request's time is up, whether its socket was replaced; if that has
   not happened by then, it looks again more than a second later. So while the server is away, and only then, the device
   is given a timeout: what a dead server has taken then waits for the new socket, as all other requests do.
7. Nothing here allocates much or touches files outside /run, /sys and /dev: the device may be what is swapped on.
"""

import logging
import mmap
import os
import select
import socket
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from nbdram.client import sysfs
from nbdram.client.attachment import Attachment, Notes
from nbdram.client.dial import HANGUP, Link, WrongExport, ask_size, dial, hung_up, redial
from nbdram.client.netlink import DeathWatch, Netlink
from nbdram.config import format_size
from nbdram.errors import NbdramError
from nbdram.protocol.wire import TransmissionFlag

log = logging.getLogger("nbdram.keeper")

_FIRST_RETRY_S: Final = 0.01
_QUICK_RETRY_S: Final = 0.05  # for as long as a restart may take
_SLOW_RETRY_S: Final = 1.0
_QUICK_FOR_S: Final = 15.0
_DEATH_NOTICE_S: Final = 0.3  # it takes milliseconds, or never comes: others have heard it, or it can't be heard
_ANSWER_S: Final = 2.0
_LOOK_FOR_GROWTH_S: Final = 10.0
_RESPAWN_S: Final = 2.0
# How long the kernel lets a request wait before it looks for another connection; for the first request after a rest
# it adds more than a second. With one connection each look costs a line in its log, no more. With several, a server of
# ours answers all that it can at once; others may take seconds to flush, and a request that always takes longer would
# be sent for ever.
_PATIENCE_MS: Final = 200
_PATIENCE_WITH_SEVERAL_MS: Final = 300
_PATIENCE_WITH_SEVERAL_OF_OTHERS_MS: Final = 3000
_MOST_PATIENT_MS: Final = 10_000


class KeptDevice:
    """Keeps one device; made by `attach` or `adopt`, then its own thread works until `detach` or `abandon`."""

    def __init__(self, attachment: Attachment, links: list[socket.socket], watch: DeathWatch, notes: Notes) -> None:
        self.attachment = attachment
        self.trouble = ""  # why there is no connection now
        self.reconnects = 0
        self.last_pause_s: float | None = None
        self._links = links
        self._watch = watch
        self._notes = notes
        self._deaths = watch.deaths.get(attachment.index, 0)  # those that a socket was given for
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._look_now = False
        self._gone = False
        self._patience_ms = attachment.retry_after_ms  # the timeout of the kernel's requests
        self._resending = False if links else None  # whether the device has a timeout (rule 6); None: nobody knows
        self._probe = 0  # the pid of a process that reads from the device
        self._server: subprocess.Popen[bytes] | None = None
        self._spawned_at = 0.0
        self._thread = threading.Thread(target=self._run, name=f"keeper-nbd{attachment.index}", daemon=True)

    # -- what the keeper calls ---------------------------------------------------------------------

    @classmethod
    def attach(cls, wanted: Attachment, notes: Notes) -> "KeptDevice":
        """Dial, make the kernel's device, and keep it. One NbdramError says what is in the way; nothing is left."""
        links: list[Link] = []
        with Netlink() as netlink:
            try:
                links.append(dial(wanted.uri))
                export = links[0].export
                if wanted.connections > 1 and not export.flags & TransmissionFlag.CAN_MULTI_CONN:
                    raise NbdramError("this server's export may have only one connection: leave --connections out")
                if export.size == 0:
                    raise NbdramError("the export has a size of zero: nothing can be attached")
                found = replace(
                    wanted,
                    size=export.size,
                    flags=export.flags,
                    identity=links[0].identity,
                    block_size=_block_size(wanted.block_size, export.size, export.blocks[0]),
                    retry_after_ms=wanted.retry_after_ms or _patience(wanted.connections, links[0].identity),
                )
                while len(links) < wanted.connections:
                    links.append(redial(found))
                watch = netlink.watch_deaths()
                try:
                    index = _connect(netlink, found, links)
                    kept = cls(replace(found, index=index), [link.socket for link in links], watch, notes)
                except BaseException:
                    watch.close()
                    raise
            except BaseException:
                for link in links:
                    link.socket.close()
                raise
            try:
                notes.write(kept.attachment)
                kept._prepare()
            except BaseException:
                netlink.disconnect(index)
                notes.remove(index)
                kept._close()
                raise
        kept._thread.start()
        log.info("nbd%d: attached %s, %s", index, wanted.uri, format_size(found.size))
        return kept

    @classmethod
    def adopt(cls, attachment: Attachment, notes: Notes) -> "KeptDevice":
        """Go on with a device that a keeper before this one attached; its sockets went with that keeper.

        As many new ones are offered as the device has connections: those that the kernel has no use for are
        watched in place of those that it has, because they lead to the same server.
        """
        with Netlink() as netlink:
            kept = cls(attachment, [], netlink.watch_deaths(), notes)
        kept._thread.start()
        log.info("nbd%d: going on with %s", attachment.index, attachment.uri)
        return kept

    def look(self) -> None:
        """Ask the server for the export's size now, not when it is due."""
        self._look_now = True
        os.eventfd_write(self._wake, 1)

    def detach(self) -> None:
        """Take the device from the kernel."""
        self._stop()
        if not self._gone:
            with Netlink() as netlink:
                netlink.disconnect(self.attachment.index)
            sysfs.wait_until_free(self.attachment.index)
        self._notes.remove(self.attachment.index)
        self._close()
        log.info("nbd%d: detached", self.attachment.index)

    @property
    def is_gone(self) -> bool:
        """Somebody else has detached it."""
        return self._gone

    def status(self) -> dict[str, Any]:
        attachment = self.attachment
        alive = len(self._links)
        return {
            "device": str(sysfs.path_of(attachment.index)),
            "uri": attachment.uri,
            "size": attachment.size,
            "connections": attachment.connections,
            "connected": min(alive, attachment.connections),
            "state": "reconnecting" if self.trouble else "connected",
            "trouble": self.trouble,
            "identity": attachment.identity,
            "dead_timeout": attachment.dead_timeout_s,
            "reconnects": self.reconnects,
            "last_pause": self.last_pause_s,
        }

    # -- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        with Netlink() as netlink:
            if not self._links:
                self._repair(netlink, "there was no keeper")
            due = time.monotonic() + _LOOK_FOR_GROWTH_S
            while not self._stopping and not self._gone:
                self._wait(max(due - time.monotonic(), 0))
                if self._stopping:
                    break
                try:
                    if hung_up(self._links):
                        self._repair(netlink, "the server hung up")
                    elif self._unexplained_death():
                        self._replace_unseen(netlink)
                    elif self._look_now or time.monotonic() >= due:
                        due = time.monotonic() + _LOOK_FOR_GROWTH_S
                        self._look_for_growth(netlink)
                except Exception:  # a device without its keeper hangs for good: whatever it was, go on
                    log.exception("nbd%d: unexpected; going on", self.attachment.index)
                    self._pause(_SLOW_RETRY_S)

    def _wait(self, seconds: float) -> None:
        """Until something happens to a connection, somebody wakes us, or `seconds` have passed."""
        epoll = select.epoll()
        try:
            for sock in self._links:
                epoll.register(sock, HANGUP)
            epoll.register(self._watch, select.EPOLLIN)
            epoll.register(self._wake, select.EPOLLIN)
            epoll.poll(seconds)
        finally:
            epoll.close()
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self._watch.read()

    def _pause(self, seconds: float) -> None:
        select.select([self._wake], [], [], seconds)
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _repair(self, netlink: Netlink, reason: str) -> None:
        """Replace the connections that are gone; returns when all are there again, or the device shall not be kept."""
        lost_at = time.monotonic()
        index = self.attachment.index
        self.trouble = reason
        quiet = away = False
        delay = 0.0
        log.warning("nbd%d: %s: connecting again", index, reason)
        if self._resending is not None:  # else its connection may be alive
            self._resend_late_requests(netlink, wanted=True)
        while not self._stopping and not self._forgotten():
            self._drop_dead_links()
            if len(self._links) >= self.attachment.connections:
                if self._answers():
                    break
                log.warning("nbd%d: the device does not answer: more connections are tried", index)
                self._close_links()
            try:
                link = redial(self.attachment)
            except (NbdramError, OSError) as error:
                quiet, away = self._explain(error, quiet), True
                self._resend_late_requests(netlink, wanted=True)
                self._respawn_server()
                waited = time.monotonic() - lost_at
                limit = (
                    _QUICK_RETRY_S if waited < _QUICK_FOR_S and not isinstance(error, WrongExport) else _SLOW_RETRY_S
                )
                delay = min(max(delay * 2, _FIRST_RETRY_S), limit)
                self._pause(delay)
                continue
            self._give(netlink, link, lost_at)
        if self._stopping or self._gone:
            return
        self.trouble = ""
        self.reconnects += 1
        self.last_pause_s = time.monotonic() - lost_at
        log.warning("nbd%d: connected again after %.2f s", index, self.last_pause_s)
        self._learn_patience(away=away)

    def _learn_patience(self, *, away: bool) -> None:
        """Rule 5, after a connection was replaced; `away`: the server was not there for a while."""
        attachment = self.attachment
        asked = attachment.retry_after_ms
        patience = asked if away else max(asked, min(2 * self._patience_ms, _MOST_PATIENT_MS))
        if attachment.connections > 1 and patience != self._patience_ms:
            with suppress(OSError):
                sysfs.set_request_timeout(attachment.index, patience)
                self._patience_ms = patience
                log.info(
                    "nbd%d: requests wait for %.1f s before another connection is tried",
                    attachment.index,
                    patience / 1000,
                )

    def _resend_late_requests(self, netlink: Netlink, *, wanted: bool) -> None:
        """Rule 6, if the kernel is one that can do it: one that shows the identifier (5.14) can."""
        attachment = self.attachment
        identifier = sysfs.identifier_of(attachment.index)
        if attachment.connections > 1 or wanted == self._resending or not (identifier and self._patience_ms):
            return
        with suppress(OSError):  # the kernel has forgotten it: that is seen to elsewhere
            netlink.set_timeout(attachment.index, identifier, 1 if wanted else 0)
            self._resending = wanted
            sysfs.set_request_timeout(attachment.index, self._patience_ms)

    def _drop_dead_links(self) -> None:
        for sock in hung_up(self._links):
            self._links.remove(sock)
            sock.close()

    def _close_links(self) -> None:
        for sock in self._links:
            sock.close()
        self._links.clear()

    def _explain(self, error: Exception, quiet: bool) -> bool:
        """Log why it did not work, once for each reason; True if it was said already."""
        reason = str(error)
        if reason != self.trouble or not quiet:
            log.warning("nbd%d: %s", self.attachment.index, reason)
        self.trouble = reason
        return True

    def _give(self, netlink: Netlink, link: Link, lost_at: float) -> None:
        """Hand a checked connection to the kernel (rule 3), and the size after it (rule 4)."""
        attachment = self.attachment
        self._await_death_notice(lost_at + _DEATH_NOTICE_S)
        self._resend_late_requests(netlink, wanted=False)  # before: while there is no socket, no request is begun
        try:
            netlink.add_socket(attachment.index, sysfs.identifier_of(attachment.index), link.socket.fileno())
        except OSError as error:
            link.socket.close()
            if not self._forgotten():
                self._explain(error, quiet=False)
                self._pause(_QUICK_RETRY_S)
            return
        self._links.append(link.socket)
        self._deaths = min(self._deaths + 1, self._watch.deaths.get(attachment.index, 0))
        if link.export.size > attachment.size:
            self._grow(netlink, link.export.size)

    def _await_death_notice(self, until: float) -> None:
        """Until the kernel has said of one more connection that it is dead, or for long enough."""
        self._watch.read()
        while not self._unexplained_death() and (left := until - time.monotonic()) > 0 and not self._stopping:
            select.select([self._watch.fileno(), self._wake], [], [], left)
            self._watch.read()

    def _unexplained_death(self) -> bool:
        """The kernel has said of a connection that it is dead, and has not been given another one yet."""
        return self._watch.deaths.get(self.attachment.index, 0) > self._deaths

    def _replace_unseen(self, netlink: Netlink) -> None:
        """A connection died that we have no duplicate of: it was made by an earlier keeper."""
        self._pause(0.05)
        if hung_up(self._links):
            return  # it was one of ours: that is seen next
        while len(self._links) >= self.attachment.connections:
            self._links.pop(0).close()
        self._repair(netlink, "a connection died")

    def _answers(self) -> bool:
        """Whether the device can be read from, within a moment."""
        if not self._probe:
            self._probe = _read_a_block(self.attachment.index)
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline:
            if os.waitpid(self._probe, os.WNOHANG)[0]:
                self._probe = 0
                return True
            time.sleep(0.005)
            self._watch.read()
            if self._stopping or hung_up(self._links) or self._unexplained_death():
                return True  # other things are to be seen to first
        return False

    def _forgotten(self) -> bool:
        """Whether somebody else has detached the device, or attached another in its place."""
        attachment = self.attachment
        if sysfs.is_connected(attachment.index) and sysfs.identifier_of(attachment.index) in (
            "",
            attachment.identifier,
        ):
            return False
        if not self._gone:
            self._gone = True
            log.warning("nbd%d: somebody else has detached it: not kept any more", attachment.index)
            self._notes.remove(attachment.index)
        return True

    def _look_for_growth(self, netlink: Netlink) -> None:
        """Tell the kernel if the export is larger now. A server that takes one connection can't be asked."""
        asked, self._look_now = self._look_now, False
        attachment = self.attachment
        if not asked and not attachment.flags & TransmissionFlag.CAN_MULTI_CONN:
            return
        try:
            size = ask_size(attachment.uri)
        except (NbdramError, OSError) as error:
            log.info("nbd%d: %s", attachment.index, error)
            return
        if size > attachment.size:
            self._grow(netlink, size)

    def _grow(self, netlink: Netlink, size: int) -> None:
        attachment = self.attachment
        netlink.set_size(attachment.index, sysfs.identifier_of(attachment.index), size)
        self.attachment = replace(attachment, size=size)
        self._notes.write(self.attachment)
        log.info("nbd%d: grew to %s", attachment.index, format_size(size))

    # -- helpers -----------------------------------------------------------------------------------

    def _prepare(self) -> None:
        attachment = self.attachment
        sysfs.wait_until_ready(attachment.index, attachment.size)
        try:
            sysfs.set_request_timeout(attachment.index, attachment.retry_after_ms)
        except OSError as error:
            log.warning(
                "nbd%d: its request timeout can't be set (%s): after a restart of the server, requests may wait "
                "for up to 30 s",
                attachment.index,
                error,
            )

    def _respawn_server(self) -> None:
        """Start the server again, if that is our task and it is not running."""
        argv = self.attachment.server
        now = time.monotonic()
        if not argv or now - self._spawned_at < _RESPAWN_S:
            return
        if self._server is not None and self._server.poll() is None:
            return
        self._spawned_at = now
        log.warning("nbd%d: starting its server", self.attachment.index)
        try:
            self._server = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", start_new_session=True
            )
        except OSError as error:
            log.error("nbd%d: its server can't be started: %s", self.attachment.index, error)

    def _stop(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()

    def _close(self) -> None:
        self._close_links()
        self._watch.close()
        os.close(self._wake)


def _connect(netlink: Netlink, attachment: Attachment, links: list[Link]) -> int:
    try:
        return netlink.connect(
            [link.socket.fileno() for link in links],
            index=None if attachment.index < 0 else attachment.index,
            size=attachment.size,
            block_size=attachment.block_size,
            flags=attachment.flags,
            dead_timeout_s=attachment.dead_timeout_s,
            identifier=attachment.identifier,
        )
    except PermissionError:
        raise NbdramError("attaching a device needs CAP_SYS_ADMIN: run it as root, or with sudo") from None
    except OSError as error:
        where = "a device" if attachment.index < 0 else str(sysfs.path_of(attachment.index))
        if attachment.index >= 0 and error.errno in (16, 22):
            raise NbdramError(f"{where} is in use: name another one, or none to get one that is free") from error
        raise NbdramError(f"the kernel refused to make {where}: {error.strerror}; `dmesg` may say more") from error


def _block_size(wanted: int, size: int, minimum: int) -> int:
    """The sector size to tell the kernel: 4096 unless the export's size or `wanted` (0: no wish) is smaller."""
    chosen = wanted or (4096 if size % 4096 == 0 else 512)
    if chosen < minimum:
        raise NbdramError(f"the server takes requests of at least {minimum} bytes: choose a --block-size from that on")
    if size % chosen:
        raise NbdramError(
            f"the export's size, {size} bytes, is not a multiple of {chosen}: choose a smaller --block-size"
        )
    return chosen


def _patience(connections: int, identity: str) -> int:
    if connections == 1:
        return _PATIENCE_MS
    return _PATIENCE_WITH_SEVERAL_MS if identity else _PATIENCE_WITH_SEVERAL_OF_OTHERS_MS


def _read_a_block(index: int) -> int:
    """Have a process of its own read the device's first page past the page cache; returns its pid.

    Of its own, because the read may hang for as long as the server is away, and nothing can end it: a thread would
    hold the keeper's lock and sockets for that time, should the keeper be killed.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            os.preadv(os.open(f"/dev/nbd{index}", os.O_RDONLY | os.O_DIRECT), [page], 0)
    finally:  # an error is an answer too
        os._exit(0)
