"""Puts settings together: defaults, then a file, then variables, then flags, each over those before it.

All of it is checked, and every mistake told at once with its place. Exports of flags and variables are added to those
of the file; where both have a name, those of the flag count; the rules of the file, if the flag has none.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdram.access import OPEN, Rules
from nbdram.config import (
    DEFAULT_METRICS,
    Endpoint,
    ExportSettings,
    Limits,
    ServeSettings,
    TlsSettings,
    check_name,
    default_listen,
    limited_memory,
)
from nbdram.config_remote import PASSWORD_VARIABLE, USER_VARIABLE, parse_swap
from nbdram.configuration.keys import EXPORT_FLAG, EXPORT_KEYS, KEYS, RULE_NAMES, Key
from nbdram.errors import NbdramError, UsageError
from nbdram.memory.available import default_budget

if TYPE_CHECKING:
    from nbdram.configuration.document import Document, Keys

DEFAULT_FILE: Final = Path("/etc/nbdram/nbdram.toml")
FILE_VARIABLE: Final = "NBDRAM_CONFIG"

# Variables that are not ours to read here: others of this program, and what Kubernetes tells of services.
_FOREIGN: Final = re.compile(
    rf"{FILE_VARIABLE}|{USER_VARIABLE}|{PASSWORD_VARIABLE}|NBDRAM_OPTIONS|NBDRAM_TEST_.*"
    r"|.*_SERVICE_(HOST|PORT)(_.*)?|.*_PORT(_\d+_(TCP|UDP)(_.*)?)?"
)

Place = Callable[[str], str]  # from what is wrong with a value to the whole message


class Mistakes(UsageError):
    """All that is wrong, in the order in which it was found."""

    def __init__(self, found: Iterable[str]) -> None:
        self.found = tuple(found)
        one = len(self.found) == 1
        lines = [f"{len(self.found)} mistakes in the configuration:", *self.found]
        super().__init__(self.found[0] if one else "\n  ".join(lines))


def find_file(chosen: Path | None, environment: Mapping[str, str]) -> Path | None:
    """The file that was asked for, or the usual one if it exists."""
    if chosen is not None:
        return chosen
    if named := environment.get(FILE_VARIABLE):
        return Path(named)
    return DEFAULT_FILE if os.path.lexists(DEFAULT_FILE) else None


def load(
    file: Path | None,
    environment: Mapping[str, str],
    flags: Mapping[str, Any],
    running: ServeSettings | None = None,
) -> ServeSettings:
    """Settings that are in order, or Mistakes. `flags` by the names of keys.

    With `running`, these are for a server that runs: what it was given of memory by default, it keeps.
    """
    return _Loader(file, environment, flags).settings(running)


class _Loader:
    def __init__(self, file: Path | None, environment: Mapping[str, str], flags: Mapping[str, Any]) -> None:
        self._mistakes: list[str] = []
        self._values: dict[str, Any] = {}
        self._places: dict[str, Place] = {}
        self._exports: dict[str, ExportSettings] = {}
        self._has_rules: set[str] = set()
        if file is not None:
            from nbdram.configuration.document import Document  # whose library is only for those who have a file

            with self._noting(str):
                self._take_document(Document.read(file))
        self._take_variables(environment)
        for key in (*KEYS, EXPORT_FLAG):
            if flags.get(key.name) is not None:
                self._take(key, flags[key.name], _flag_place(key))

    @contextmanager
    def _noting(self, place: Place) -> Iterator[None]:
        """A mistake in here is written down."""
        try:
            yield
        except NbdramError as error:
            self._mistakes.append(place(str(error)))

    def _take(self, key: Key, raw: Any, place: Place) -> None:
        with self._noting(place):
            value = key.parse(raw)
            if key is EXPORT_FLAG:
                self._take_exports(value)
            else:
                self._values[key.name], self._places[key.name] = value, place

    # -- the file ----------------------------------------------------------------------------------

    def _take_document(self, document: "Document") -> None:
        values = dict(document.values)
        exports = values.pop("exports", {})
        self._take_table(document, (), values)
        if not isinstance(exports, dict):
            self._mistakes.append(f"{document.place(('exports',))}: exports: write a table for each, [exports.NAME]")
            return
        for name, table in exports.items():
            self._take_export(document, name, table)

    def _take_table(self, document: "Document", above: "Keys", values: dict[str, Any]) -> None:
        known = {key.name: key for key in KEYS}
        tables = {name.rpartition(".")[0] for name in known}
        for last, value in values.items():
            keys = (*above, last)
            name = ".".join(keys)
            place = _file_place(document, keys, known.get(name))
            if name in known:
                self._take(known[name], value, place)
            elif name in tables and isinstance(value, dict):
                self._take_table(document, keys, value)
            elif name in tables:
                self._mistakes.append(place(f"it is a table: write [{name}]"))
            else:
                here = [known_name for known_name in (*known, "exports") if known_name.startswith(".".join(above))]
                self._mistakes.append(place(f"there is no such key{_suggestion(name, here)}"))

    def _take_export(self, document: "Document", name: str, table: Any) -> None:
        known = {key.name: key for key in EXPORT_KEYS}
        keys = ("exports", name)
        place = _file_place(document, keys)
        if not isinstance(table, dict):
            self._mistakes.append(place(f'it is a table: write [exports.{name}] and size = "16G" below'))
            return
        parsed: dict[str, Any] = {}
        before = len(self._mistakes)
        with self._noting(place):
            if not check_name(name):
                raise UsageError("an export needs a name")
        for last, value in table.items():
            key = known.get(last)
            inner = _file_place(document, (*keys, last), key)
            if key is None:
                self._mistakes.append(inner(f"there is no such key{_suggestion(last, list(known))}"))
                continue
            with self._noting(inner):
                parsed[last] = key.parse(value)
        if "size" not in table:
            self._mistakes.append(place('its size is missing: write size = "16G"'))
        if len(self._mistakes) == before:
            rules = Rules(**{key: parsed.pop(key) for key in (*RULE_NAMES, "iops", "bandwidth") if key in parsed})
            dense = parsed.pop("density", False)
            self._exports[name] = ExportSettings(name, dense=dense, rules=rules, **parsed)
            if table.keys() & set(RULE_NAMES):
                self._has_rules.add(name)
            self._places.setdefault("exports", place)

    # -- variables and flags -----------------------------------------------------------------------

    def _take_variables(self, environment: Mapping[str, str]) -> None:
        known = {key.variable: key for key in (*KEYS, EXPORT_FLAG)}
        for name, value in sorted(environment.items()):
            if not name.startswith("NBDRAM_") or (_FOREIGN.fullmatch(name) and name not in known):
                continue
            key = known.get(name)
            if key is None:
                near = _suggestion(name.removeprefix("NBDRAM_"), [other.removeprefix("NBDRAM_") for other in known])
                self._mistakes.append(f"{name}: there is no such variable{near.replace('mean ', 'mean NBDRAM_')}")
            elif value:
                self._take(key, value.split() if key.many else value, _variable_place(key))

    def _take_exports(self, given: tuple[ExportSettings, ...]) -> None:
        names = [export.name for export in given]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"there are two exports called {name!r}: give each a name of its own")
        for export in given:
            before = self._exports.get(export.name)
            rules = export.rules
            if rules.plain().keys() & set(RULE_NAMES):
                self._has_rules.add(export.name)
            elif before:
                rules = replace(before.rules, iops=rules.iops, bandwidth=rules.bandwidth)
            if before:
                caps = before.rules
                rules = replace(rules, iops=rules.iops or caps.iops, bandwidth=rules.bandwidth or caps.bandwidth)
            self._exports[export.name] = replace(export, rules=rules)

    # -- all together ------------------------------------------------------------------------------

    def settings(self, running: ServeSettings | None) -> ServeSettings:
        values = self._values
        default_rules = Rules(**{name: values.get(f"access.{name}", ()) for name in RULE_NAMES})
        swap = remote = None
        remote_first = False
        with self._noting(self._place_of("swap")):
            swap, remote, remote_first = parse_swap(values.get("swap", ()))
        asked = values.get("memory")
        settings = ServeSettings(
            exports=tuple(self._with_rules(export, default_rules) for export in self._exports.values()),
            listen=values.get("listen") or default_listen(),
            memory=self._memory(asked, running),
            asked_memory=asked,
            follow_pressure="memory" in values and asked is None,
            allow_plaintext=values.get("allow_plaintext", False),
            swap=swap or (),
            remote=remote,
            remote_first=remote_first,
            write_wait_s=values.get("write_wait", ServeSettings.write_wait_s),
            control=values.get("control"),
            metrics=self._metrics(),
            metrics_required="metrics" in values,
            state_dir=values.get("state_dir"),
            tls=self._tls(),
            limits=self._limits(),
            default_rules=default_rules,
            verbose=values.get("verbose", False),
            log_format=values.get("log_format", "text"),
            same_host=values.get("same_host", False),
        )
        for key, told in settings.mistakes():
            self._mistakes.append(self._place_of(key)(told))
        if self._mistakes:
            raise Mistakes(self._mistakes)
        return settings

    def _place_of(self, name: str) -> Place:
        """Where a key was given; if it was not, its flag says what is meant."""
        key = next((key for key in KEYS if key.name == name), None)
        return self._places.get(name) or (_flag_place(key) if key and key.flag else str)

    def _with_rules(self, export: ExportSettings, default: Rules) -> ExportSettings:
        if export.name in self._has_rules or default == OPEN:
            return export
        rules = replace(default, iops=export.rules.iops, bandwidth=export.rules.bandwidth)
        return replace(export, rules=rules)

    def _memory(self, asked: int | None, running: ServeSettings | None) -> int:
        if running is not None and asked == running.asked_memory:
            return running.memory
        return default_budget() if asked is None else limited_memory(asked)

    def _metrics(self) -> Endpoint | None:
        metrics: Endpoint | None = self._values.get("metrics", DEFAULT_METRICS)
        return metrics

    def _limits(self) -> Limits:
        seconds = ("handshake_timeout", "idle_timeout", "stall_timeout")
        given = {key.removeprefix("limits."): value for key, value in self._values.items() if key.startswith("limits.")}
        return Limits(**{f"{key}_s" if key in seconds else key: value for key, value in given.items()})

    def _tls(self) -> TlsSettings | None:
        certificate, key = self._values.get("tls.certificate"), self._values.get("tls.key")
        client_ca = self._values.get("tls.client_ca")
        if certificate and key:
            tls = TlsSettings(certificate, key, client_ca, self._values.get("tls.mode", "require") == "require")
            self._check_tls(tls)
            return tls
        for name in ("tls.certificate", "tls.key", "tls.client_ca", "tls.mode"):
            if name in self._values and self._values[name] != "allow":
                told = "TLS takes both a certificate and its key: give both (--tls-cert FILE --tls-key FILE)"
                self._mistakes.append(self._place_of(name)(told))
                break
        return None

    def _check_tls(self, tls: TlsSettings) -> None:
        from nbdram.server.tls import authorities, load, own_certificate, private_key  # costs time, and few need it

        before = len(self._mistakes)
        for name, path, read in (
            ("tls.certificate", tls.certificate, own_certificate),
            ("tls.key", tls.key, private_key),
            ("tls.client_ca", tls.client_ca, authorities),
        ):
            if path:
                with self._noting(self._place_of(name)):
                    read(path)
        if len(self._mistakes) == before:
            with self._noting(self._place_of("tls.certificate")):
                load(tls)


def _file_place(document: "Document", keys: "Keys", key: Key | None = None) -> Place:
    def message(told: str) -> str:
        if key and key.flag:  # parsers speak of their flags
            told = told.removeprefix(f"{key.flag} ")
        return f"{document.place(keys)}: {'.'.join(map(_quoted, keys))}: {told}"

    return message


def _quoted(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else f'"{key}"'


def _variable_place(key: Key) -> Place:
    return lambda told: f"{key.variable}: {told.removeprefix(f'{key.flag} ') if key.flag else told}"


_QUOTES: Final = ("'", '"')


def _flag_place(key: Key) -> Place:
    def place(told: str) -> str:
        if told.startswith(f"{key.flag} "):
            return told
        return f"{key.flag}{' ' if told.startswith(('must ', *_QUOTES)) else ': '}{told}"

    return place


def _suggestion(name: str, known: list[str]) -> str:
    import difflib  # only for those who mistype

    near = difflib.get_close_matches(name, known, 1, 0.7)
    return f": do you mean {near[0]}?" if near else ""
