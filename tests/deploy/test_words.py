"""Options, commands and metrics that documentation and deployments name exist."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nbdram.observe.logs import EVENTS

from .commands import flags

ROOT: Final = Path(__file__).parents[2]
FILES: Final = sorted(
    path for pattern in ("README.md", "docs/*.md", "deploy/**/*") for path in ROOT.glob(pattern) if path.is_file()
)
# `nbdram serve ...` as one types it, at the start of a line or of what is quoted or run by something else.
_COMMAND = re.compile(r"(?:^|[\s`/\"'(\[])nbdram (?P<command>[a-z]+)(?P<rest>[^`|;#\n]*)", re.MULTILINE)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_METRIC = re.compile(r"(?<![:\w])nbdram_[a-z_]+(?![.:/\w])")
_LISTED = re.compile(r"^\| `(nbdram_[a-z_]+)` \| (\w+) \|", re.MULTILINE)


def text_of(path: Path) -> str:
    """With lines that go on put together."""
    return re.sub(r"\\\n\s*", " ", path.read_text())


def commands() -> Iterator[tuple[Path, str, str]]:
    """Where, which command, and what stands behind it."""
    for path in FILES:
        for found in _COMMAND.finditer(text_of(path)):
            if found["command"] in flags() or "--" in found["rest"]:
                yield path, found["command"], found["rest"]


def test_options_of_commands_that_are_shown_exist() -> None:
    known, seen = flags(), 0
    for path, command, rest in commands():
        assert command in known, f"{path}: there is no `nbdram {command}`"
        for flag in _FLAG.findall(rest):
            assert flag in known[command], f"{path}: `nbdram {command}` has no {flag}"
            seen += 1
    assert seen > 10


def test_options_that_are_named_by_themselves_exist() -> None:
    every = set().union(*flags().values())
    for path in FILES:
        if path.suffix == ".md":
            for flag in re.findall(r"`(--[a-z][a-z-]*)", path.read_text()):
                assert flag in every, f"{path}: nothing has the option {flag}"


def test_metrics_that_are_named_exist() -> None:
    listed = dict(_LISTED.findall((ROOT / "docs/metrics.md").read_text()))
    exist = set(listed)
    exist |= {
        f"{name}_{part}" for name, kind in listed.items() if kind == "histogram" for part in ("bucket", "sum", "count")
    }
    for path in FILES:
        if path.suffix != ".md":  # elsewhere the words are names of other things; grafana/ has its own test
            continue
        for name in _METRIC.findall(path.read_text()):
            assert name in exist, f"{path}: there is no metric {name}"


_LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|srcset|href)="([^"]+)\"""")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What a page's headings are called in links."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(prose))
    return {text.replace(" ", "-") for text in plain}


def test_links_between_pages_lead_somewhere() -> None:
    seen = 0
    for path in FILES:
        if path.suffix != ".md":
            continue
        for link in (one or other for one, other in _LINK.findall(path.read_text())):
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            page = (path.parent / target).resolve() if target else path
            assert page.exists(), f"{path}: {link} leads nowhere"
            assert page.is_relative_to(ROOT), f"{path}: {link} leads out of the project"
            assert not anchor or anchor in anchors(page), f"{path}: {page} has no heading for {link}"
            seen += 1
    assert seen > 20


# What a healthy server logs: nobody looks for a remedy.
_NORMAL: Final = (
    "export_opened export_closed export_taken_up export_made export_resized export_removed reloaded stopping"
)


def test_there_is_a_remedy_for_every_event_that_is_logged() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    explained = {word for word in re.findall(r"`([a-z]+_[a-z_]+)`", text) if not word.startswith("nbdram_")}
    events = {event for event, *_ in EVENTS.values()}
    missing = events - explained - set(_NORMAL.split())
    assert not missing, "docs/troubleshooting.md does not say what to do"
    unknown = explained - events
    assert not unknown, "there are no such events"
