"""--swap: directories, and at most one remote; user and password of it from the environment or a file only."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl

from nbdram.config import SwapSettings, parse_swap_size, split_uri
from nbdram.errors import UsageError
from nbdram.memory.tiers.remote_settings import Address, RemoteSettings

USER_VARIABLE: Final = "NBDRAM_REMOTE_USER"
PASSWORD_VARIABLE: Final = "NBDRAM_REMOTE_PASSWORD"
_DEFAULT_PORT: Final = 6379
_FORM: Final = "write redis://HOST:PORT,HOST:PORT/?max=SIZE"
_OPTIONS: Final = ("max", "replicas", "wait", "auth-file", "ca", "cert", "key")
_MOST_WAIT_S: Final = 600.0


def parse_swap(texts: Sequence[str]) -> tuple[tuple[SwapSettings, ...], RemoteSettings | None, bool]:
    """The directories, the remote, and whether the remote comes first."""
    swap: list[SwapSettings] = []
    remote: RemoteSettings | None = None
    remote_first = False
    for text in texts:
        if not text.startswith(("redis:", "rediss:")):
            swap.append(SwapSettings.parse(text))
            continue
        if remote is not None:
            raise UsageError(f"--swap {text!r}: there can be one remote; name more nodes of it as HOST:PORT,HOST:PORT")
        remote = parse_remote(text)
        remote_first = not swap
    return tuple(swap), remote, remote_first and bool(swap)


def parse_remote(text: str, where: str = "--swap") -> RemoteSettings:
    """From redis[s]://HOST[:PORT][,HOST[:PORT]...][/?OPTION=VALUE&...]."""
    shown = text.rpartition("@")[2] if "@" in text else text
    try:
        parts = split_uri(text)
        if parts.scheme not in ("redis", "rediss"):
            raise UsageError(_FORM)
        if "@" in parts.netloc:
            raise UsageError(
                f"everybody could read the password in the list of processes: put it in {PASSWORD_VARIABLE}, "
                "or in a file, with auth-file=FILE"
            )
        addresses = tuple(_address(one) for one in parts.netloc.split(","))
        if parts.path.strip("/") or parts.fragment:
            raise UsageError(_FORM)
        return _with_login(_with_options(RemoteSettings(addresses, parts.scheme == "rediss"), parts))
    except (UsageError, ValueError) as error:
        raise UsageError(f"{where} {shown!r}: {error}") from None


def _address(text: str) -> Address:
    parts = split_uri(f"//{text}")
    if not parts.hostname:
        raise UsageError(_FORM)
    try:
        return parts.hostname, _DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        raise UsageError(f"the port of {text!r} is not a number from 0 to 65535") from None


def _with_options(settings: RemoteSettings, parts: SplitResult) -> RemoteSettings:
    try:
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise UsageError("write options as in ?max=1G&replicas=1") from None
    for name in options:
        if name not in _OPTIONS:
            raise UsageError(f"there is no option {name!r}; known are {', '.join(_OPTIONS)}")
    files = {name: Path(options[name]) if name in options else None for name in ("ca", "cert", "key", "auth-file")}
    if not settings.tls and any(files[name] for name in ("ca", "cert", "key")):
        raise UsageError("ca, cert and key are for rediss://")
    user, password = _login_of(files["auth-file"])
    return replace(
        settings,
        max_bytes=parse_swap_size(options["max"]) if "max" in options else 0,
        replicas=_number(options.get("replicas", "0"), "replicas", 10),
        wait_s=float(_number(options["wait"], "wait", _MOST_WAIT_S)) if "wait" in options else settings.wait_s,
        ca=files["ca"],
        certificate=files["cert"],
        key=files["key"],
        user=user,
        password=password,
    )


def _number(text: str, name: str, most: float) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= most):
        raise UsageError(f"{name} must be a whole number, at most {most:g}")
    return int(text)


def _login_of(path: Path | None) -> tuple[str, str]:
    """USER:PASSWORD, or PASSWORD alone, in the first line of a file."""
    if path is None:
        return "", ""
    try:
        line = path.read_text().partition("\n")[0].strip()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"can't read {path}: {getattr(error, 'strerror', 'it is no text')}") from None
    user, colon, password = line.partition(":")
    if not line:
        raise UsageError(f"{path} is empty: write USER:PASSWORD or PASSWORD there")
    return (user, password) if colon else ("", user)


def _with_login(settings: RemoteSettings) -> RemoteSettings:
    if settings.password:
        return settings
    return replace(settings, user=os.environ.get(USER_VARIABLE, ""), password=os.environ.get(PASSWORD_VARIABLE, ""))
