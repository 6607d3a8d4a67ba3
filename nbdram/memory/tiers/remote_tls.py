"""TLS with a remote: are our certificates what they should be, and what is wrong if it does not come about."""

import socket
import ssl
from contextlib import suppress
from typing import Final

from nbdram.errors import NbdramError
from nbdram.memory.tiers.remote_settings import Address, RemoteSettings, address_text

_PROBE_S: Final = 1.0
_HINT: Final = "; if it asks for a certificate, give one with cert=FILE and key=FILE"


def check_files(settings: RemoteSettings) -> None:
    """NbdramError if a file can't be used."""
    for path in (settings.ca, settings.certificate, settings.key):
        try:
            if path:
                path.read_bytes()
        except OSError as error:
            raise NbdramError(f"can't read {path}: {error.strerror}") from error
    try:
        context = ssl.create_default_context(cafile=settings.ca)
    except ssl.SSLError as error:
        raise NbdramError(f"{settings.ca} has no certificate in it") from error
    if settings.certificate:
        try:
            # Without a function the library below us would ask for a password on the terminal.
            context.load_cert_chain(settings.certificate, settings.key, password=lambda: "")
        except ssl.SSLError as error:
            key = settings.key or settings.certificate
            raise NbdramError(
                f"{settings.certificate} has no certificate in it, or {key} not its key, without a password"
            ) from error
    elif settings.key:
        raise NbdramError(f"{settings.key} is of no use without its certificate: give that with cert=FILE")


def distrust(settings: RemoteSettings, error: BaseException) -> str:
    """What is wrong with a server's certificate, in a sentence; "" if the error is another one."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, ssl.SSLCertVerificationError):
            why = cause.verify_message.rstrip(".")
            return (
                f"{settings} shows a certificate that is not trusted ({why}): give the authority that has signed it "
                "with ca=FILE, and the name that it is for as HOST"
            )
        cause = cause.__cause__ or cause.__context__
    return ""


def hint(settings: RemoteSettings) -> str:
    """What else may be wrong if a server hangs up on us."""
    return _HINT if settings.tls and not settings.certificate else ""


def wrong_port(settings: RemoteSettings) -> str:
    """The sentence for who asks for TLS at a port that has none, or the other way round; "" if that is not it."""
    for address in settings.addresses:
        where = address_text(address)
        if settings.tls and _answers_without_tls(address):
            return f"{where} answers without TLS: name the port that it has for TLS, or write redis://"
        if not settings.tls and _takes_tls(address):
            return f"{where} takes TLS only: write rediss://, or name its port without TLS"
    return ""


def _answers_without_tls(address: Address) -> bool:
    with suppress(OSError), socket.create_connection(address, _PROBE_S) as sock:
        sock.sendall(b"PING\r\n")
        return sock.recv(1) in (b"+", b"-")
    return False


def _takes_tls(address: Address) -> bool:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with suppress(OSError), socket.create_connection(address, _PROBE_S) as sock, context.wrap_socket(sock):
        return True
    return False
