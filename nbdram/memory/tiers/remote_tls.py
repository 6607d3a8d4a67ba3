"""Certificates for a remote: are ours what they should be, and what is wrong if we do not trust its own."""

import ssl
from typing import Final

from nbdram.errors import NbdramError
from nbdram.memory.tiers.remote_settings import RemoteSettings

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
