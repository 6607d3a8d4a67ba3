"""Settings from a file, variables and flags: which one counts, and what a mistake is told."""

import argparse
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbdram.access import Rules
from nbdram.cli import main
from nbdram.cli import serve as serve_command
from nbdram.config import Endpoint, ExportSettings, Limits, ServeSettings, TlsSettings
from nbdram.configuration import reference
from nbdram.configuration.keys import EXPORT_FLAG, EXPORT_KEYS, KEYS
from nbdram.configuration.loader import DEFAULT_FILE, find_file, load
from nbdram.errors import UsageError
from tests.certificates import Certificates
from tests.helpers import GIB, MIB

ROOT = Path(__file__).parents[2]


class Loader:
    """Loads what a test wrote down."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "nbdram.toml"

    def __call__(
        self, text: str | None = None, environment: Mapping[str, str] | None = None, **flags: Any
    ) -> ServeSettings:
        if text is not None:
            self.path.write_text(text)
        return load(self.path if text is not None else None, environment or {}, flags)

    def refused(self, text: str, environment: Mapping[str, str] | None = None, **flags: Any) -> list[str]:
        """The mistakes, without the name of the file."""
        with pytest.raises(UsageError) as raised:
            self(text, environment, **flags)
        lines = str(raised.value).splitlines()
        if len(lines) > 1:
            assert lines.pop(0) == f"{len(lines)} mistakes in the configuration:"
            assert all(line.startswith("  ") for line in lines)
        return [line.strip().removeprefix(f"{self.path}:") for line in lines]


@pytest.fixture
def loading(tmp_path: Path) -> Loader:
    return Loader(tmp_path)


def test_everything_can_be_said_in_the_file(loading: Loader, tmp_path: Path) -> None:
    made = Certificates(tmp_path / "certificates")
    settings = loading(f"""
        listen = ["unix:/run/x", "tcp://[::]:1234"]
        memory = "64M"
        swap = ["disk:/var/x,max=1G"]
        state_dir = "/dev/shm/x"
        write_wait = "1.5s"
        control = "/run/control"
        metrics = "off"
        same_host = true
        log_format = "json"
        verbose = true
        [tls]
        certificate = "{made.server}"
        key = "{made.server_key}"
        client_ca = "{made.ca}"
        [limits]
        connections = 10
        handshakes = 5
        handshake_timeout = 2
        requests_in_flight = 7
        idle_timeout = "2h"
        stall_timeout = "off"
        newcomers = 8
        [access]
        networks = ["10.0.0.0/8"]
        [exports.one]
        size = "1G"
        iops = 5
        [exports."two words"]
        size = 4096
        read_only = true
        description = "for builds"
        density = true
        users = [0]
        bandwidth = "10M"
    """)
    networks = Rules.parse({"networks": ["10.0.0.0/8"]})
    assert settings.listen == (Endpoint(path="/run/x"), Endpoint(host="::", port=1234))
    assert (settings.memory, settings.asked_memory, settings.follow_pressure) == (64 * MIB, 64 * MIB, False)
    assert [(swap.path, swap.max_bytes) for swap in settings.swap] == [(Path("/var/x"), GIB)]
    assert (settings.state_dir, settings.control) == (Path("/dev/shm/x"), Path("/run/control"))
    assert (settings.write_wait_s, settings.metrics, settings.metrics_required) == (1.5, None, True)
    assert (settings.same_host, settings.log_format, settings.verbose) == (True, "json", True)
    assert settings.tls == TlsSettings(made.server, made.server_key, made.ca)
    assert settings.limits == Limits(10, 5, 2.0, 7, 7200.0, 0.0, 8)
    assert settings.default_rules == networks
    one, two = settings.exports
    assert one == ExportSettings("one", GIB, rules=Rules(networks=networks.networks, iops=5))
    assert two == ExportSettings("two words", 4096, True, "for builds", True, Rules(users=(0,), bandwidth=10 * MIB))


def test_without_anything_settings_are_the_defaults(loading: Loader) -> None:
    settings = loading("")
    for others in (loading(), load(None, {}, {"verbose": None}), load(None, {}, {}, settings)):
        assert replace(others, memory=settings.memory) == settings, "the memory that is available changes all the time"
    assert (settings.exports, settings.limits, settings.tls, settings.asked_memory) == ((), Limits(), None, None)
    assert settings.memory > 0


def test_flags_come_before_variables_and_those_before_the_file(loading: Loader) -> None:
    text = 'memory = "64M"\nwrite_wait = 1\ncontrol = "/file"\nlisten = ["unix:/file"]'
    variables = {"NBDRAM_MEMORY": "65M", "NBDRAM_WRITE_WAIT": "2s", "NBDRAM_LISTEN": "unix:/v fd"}
    settings = loading(text, variables, memory="66M")
    assert (settings.memory, settings.write_wait_s, settings.control) == (66 * MIB, 2.0, Path("/file"))
    assert settings.listen == (Endpoint(path="/v"), Endpoint(inherited=True))


def test_auto_and_the_default_are_left_to_the_server(loading: Loader) -> None:
    assert loading('memory = "auto"').follow_pressure
    assert not loading("").follow_pressure
    running = loading('memory = "100M"')
    assert load(None, {}, {"memory": "100M"}, running).memory == 100 * MIB


def test_exports_of_flags_are_added_and_do_not_take_rules_away(loading: Loader) -> None:
    text = '[exports.a]\nsize = "1G"\nusers = [0]\n[exports.b]\nsize = "1G"'
    settings = loading(text, {"NBDRAM_EXPORT": "b=2G,ro c=1M"}, export=["a=3G", "d=1M"])
    assert [(export.name, export.size) for export in settings.exports] == [
        ("a", 3 * GIB),
        ("b", 2 * GIB),
        ("c", MIB),
        ("d", MIB),
    ]
    assert settings.exports[0].rules == Rules(users=(0,))
    assert settings.exports[1].read_only


def test_every_mistake_is_told_at_once_with_its_place(loading: Loader) -> None:
    text = """memory = "lots"
listen = ["unix:/run/x",
          "127.0.0.1"]
wirte_wait = 5
metrics = 9810
swap = "disk:/x"
state_dir = 5
verbose = "perhaps"
[tls]
mode = "maybe"
[limits]
handshakes = 0
idle_timeout = "soon"
[exports.a]
size = "64X"
networks = ["10.0.0.1/8"]
[exports."b c"]
readonly = true
"""
    assert loading.refused(
        text, {"NBDRAM_MEMROY": "1G", "NBDRAM_SAME_HOST": "so", "NBDRAM_TYPO": "1"}, export=["x"]
    ) == [
        "1: memory: 'lots' is not a size: write a whole number and K, M, G or T, as in 16G, or auto",
        "2: listen: '127.0.0.1': write unix:PATH, tcp://HOST:PORT or fd",
        "4: wirte_wait: there is no such key: do you mean write_wait?",
        '5: metrics: 9810 is not what is expected: text in quotes, as in "text"',
        '6: swap: \'disk:/x\' is not a list of texts: write ["ONE", "ANOTHER"]',
        '7: state_dir: 5 is not a path: write it in quotes, as in "/run/nbdram"',
        "8: verbose: 'perhaps' is neither true nor false",
        "10: tls.mode: 'maybe' is not one of require, allow",
        "12: limits.handshakes: 0 is not a whole number from 1 to 1000000",
        '13: limits.idle_timeout: \'soon\' is not a time: write seconds, or a unit too, as in "90s", "5min" or '
        '"2h", or "off"',
        "15: exports.a.size: '64X' is not a size: write a whole number and K, M, G or T, as in 16G",
        "16: exports.a.networks: '10.0.0.1/8' is not a network: write 10.0.0.0/8, or an address, as in 10.0.0.0/8 or "
        "192.0.2.7",
        '18: exports."b c".readonly: there is no such key: do you mean read_only?',
        '17: exports."b c": its size is missing: write size = "16G"',
        "NBDRAM_MEMROY: there is no such variable: do you mean NBDRAM_MEMORY?",
        "NBDRAM_SAME_HOST: 'so' is neither true nor false",
        "NBDRAM_TYPO: there is no such variable",
        "--export 'x': write NAME=MAXSIZE, as in scratch=16G",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("memory = 1000", "1: memory: must be at least 32 MiB: the server itself needs half of it"),
        ('\nlisten = ["tcp://0.0.0.0"]', "2: listen: tcp://0.0.0.0:10809 can be reached by others and would be served"),
        ("tls = true", "1: tls: it is a table: write [tls]"),
        ("exports = 1", "1: exports: write a table for each, [exports.NAME]"),
        ('exports.a = "1G"', '1: exports.a: it is a table: write [exports.a] and size = "16G" below'),
        ('[exports.""]\nsize = 4096', '1: exports."": an export needs a name'),
        ("[exports.a]\nsize = 4097", "2: exports.a.size: the size must be a multiple of 4096 bytes, above 0"),
        ("[exports.a]\nsize = true", "2: exports.a.size: true is not a size: write it with a unit and in quotes"),
        ("[exports.a]\nsize = 4096\ndescription = ''", "3: exports.a.description: '' is not what is expected"),
        ('[tls]\nkey = "/x"', "2: tls.key: TLS takes both a certificate and its key: give both"),
        ('[tls]\nmode = "require"', "2: tls.mode: TLS takes both a certificate and its key: give both"),
        ('swap = ["disk:"]', "1: swap: 'disk:': write disk:PATH or disk:PATH,max=SIZE"),
        ('swap = ["redis://u:p@h"]', "1: swap: 'h': everybody could read the password"),
        ("write_wait = 3601", "1: write_wait: 3601 is not a time of at most 3600 s"),
        ("log_format = '" + "x" * 99 + "'", "1: log_format: 'xxxxxxxxx"),
        ("[limits]\nfoo = 1", "2: limits.foo: there is no such key"),
        ("[access]\nusers = ['nobody-of-this-name']", "2: access.users: there is no user called"),
    ],
)
def test_a_mistake_is_told_with_what_was_expected(loading: Loader, text: str, told: str) -> None:
    (mistake,) = loading.refused(text)
    assert mistake.startswith(told)


def test_each_file_of_tls_is_told_by_its_own_key(loading: Loader) -> None:
    assert loading.refused('[tls]\ncertificate = "/x"\nkey = "/y"\nclient_ca = "/z"') == [
        "2: tls.certificate: can't read /x: No such file or directory",
        "3: tls.key: can't read /y: No such file or directory",
        "4: tls.client_ca: can't read /z: No such file or directory",
    ]


def test_a_mistake_in_flags_is_told_with_the_flag(loading: Loader) -> None:
    assert loading.refused("", None, **{"tls.mode": "require"}) == [
        "--tls: TLS takes both a certificate and its key: give both (--tls-cert FILE --tls-key FILE)"
    ]
    assert loading.refused("", memory="1M") == ["--memory must be at least 32 MiB: the server itself needs half of it"]
    assert loading("", None, **{"tls.mode": "allow"}).tls is None


def test_what_others_mean_by_our_prefix_is_let_alone(loading: Loader) -> None:
    kubernetes = {"NBDRAM_SERVICE_HOST": "x", "NBDRAM_METRICS_PORT_9810_TCP_ADDR": "x", "NBDRAM_PORT": "tcp://x"}
    others = {**kubernetes, "NBDRAM_OPTIONS": "x", "NBDRAM_CONFIG": "x", "NBDRAM_MEMORY": ""}
    assert loading("memory = '1G'", others) == loading("memory = '1G'")


def test_rules_of_variables_may_be_numbers(loading: Loader) -> None:
    assert loading("", {"NBDRAM_ACCESS_USERS": "0 root"}).default_rules == Rules(users=(0, 0))


def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "-c", str(tmp_path / "missing")]) == 2
    assert capsys.readouterr().err == f"nbdram: can't read {tmp_path / 'missing'}: No such file or directory\n"


def test_the_file_is_the_one_asked_for_or_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdram.configuration.loader.DEFAULT_FILE", tmp_path / "usual")
    assert find_file(None, {}) is None
    (tmp_path / "usual").touch()
    assert find_file(None, {}) == tmp_path / "usual"
    assert find_file(None, {"NBDRAM_CONFIG": "/x"}) == Path("/x")
    assert find_file(Path("/y"), {"NBDRAM_CONFIG": "/x"}) == Path("/y")


# -- nbdram config check -----------------------------------------------------------------------------


def test_config_check_says_what_a_server_would_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "nbdram.toml"
    path.write_text('memory = "64M"\nlisten = ["unix:/run/x"]\n[exports.a]\nsize = "1G"')
    assert main(["config", "check", "-c", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path} is in order",
        "exports   a",
        "memory    64 MiB",
        "listen    unix:/run/x",
        "TLS       no",
    ]
    path.write_text("a = 1\nb = 2")
    assert main(["config", "check", "-c", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"nbdram: 2 mistakes in the configuration:\n  {path}:1: a: there is no such key\n"
        f"  {path}:2: b: there is no such key\n"
    )
    monkeypatch.setattr("nbdram.configuration.loader.DEFAULT_FILE", tmp_path / "usual")
    assert main(["config", "check"]) == 2
    assert "name another file with -c FILE" in capsys.readouterr().err


# -- the table of keys, and what is made from it -----------------------------------------------------


def test_every_flag_has_a_key_and_every_key_that_says_so_a_flag() -> None:
    parser = argparse.ArgumentParser()
    serve_command.add(parser.add_subparsers())
    (serve,) = parser._subparsers._group_actions[0].choices.values()  # type: ignore[union-attr]
    flags = {option for action in serve._actions for option in action.option_strings if option.startswith("--")}
    assert flags - {"--help", "--config"} == {key.flag for key in (*KEYS, EXPORT_FLAG) if key.flag}


def test_the_reference_of_keys_is_up_to_date() -> None:
    told = (ROOT / "docs/configuration.md").read_text()
    assert told == reference.text(), "run python -m nbdram.configuration.reference > docs/configuration.md"


def test_the_sample_is_in_order_and_has_every_key(tmp_path: Path) -> None:
    sample = (ROOT / "deploy/nbdram.toml").read_text()
    tomllib.loads(sample)
    load(ROOT / "deploy/nbdram.toml", {}, {})
    everything = re.sub(r"^#(?=[a-z_]+ = |\[)", "", sample, flags=re.MULTILINE)
    values = tomllib.loads(everything)
    known = {key.name for key in KEYS} | {f"exports.scratch.{key.name}" for key in EXPORT_KEYS}
    assert {".".join(keys) for keys in _leaves(values)} == known
    made = Certificates(tmp_path)
    for name, path in (("cert", made.server), ("key", made.server_key), ("clients", made.ca)):
        everything = everything.replace(f"/etc/nbdram/{name}.pem", str(path))
    (tmp_path / "all.toml").write_text(everything)
    load(tmp_path / "all.toml", {}, {})


def _leaves(values: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in values.items():
        keys = (*above, key)
        found += _leaves(value, keys) if isinstance(value, dict) else [keys]
    return found


def test_the_usual_file_is_where_the_documentation_says() -> None:
    assert str(DEFAULT_FILE) in (ROOT / "deploy/nbdram.toml").read_text()
