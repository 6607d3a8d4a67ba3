"""Writes docs/configuration.md out of the table of keys: python -m nbdram.configuration.reference"""

from typing import Final

from nbdram.configuration.keys import EXPORT_FLAG, EXPORT_KEYS, KEYS, Key
from nbdram.configuration.loader import DEFAULT_FILE

_HEAD: Final = f"""\
# Configuration

<!-- Made by `python -m nbdram.configuration.reference`; a test holds it against the code. -->

`nbdram serve` takes its settings from flags, from variables of the environment, and from a file in TOML: the one that
`-c FILE` or `NBDRAM_CONFIG` names, or `{DEFAULT_FILE}` if it is there. Flags come before variables, and those
before the file. [deploy/nbdram.toml](../deploy/nbdram.toml) is a file with every key, to start from.

    nbdram config check [-c FILE]    # tells every mistake at once, with the line, the key and what was expected
    nbdram reload                    # applies what can change while running (so does SIGHUP), and says what can't

Sizes are text with a unit, as in `"64M"`, `"16G"` or `"1T"` (powers of 1024), or a number of bytes. Times are text
with a unit (`ms`, `s`, `min`, `h`, `d`), or a number of seconds. A variable has a list's members with spaces between.

## Keys

| key | variable | flag | default | meaning |
|-----|----------|------|---------|---------|
"""

_EXPORTS: Final = f"""
## Exports

Each export is a table, `[exports.NAME]`. The first one is what clients get that ask for no name. `--export
NAME=MAXSIZE[,OPTION]...`, and `{EXPORT_FLAG.variable}` with the same, add exports. Options are `ro`, `density`, rules
as below (`network=`, `user=`, `group=` and `certificate=`, each as often as needed, `iops=` and `bandwidth=`), and last
`description=TEXT`. Where the file has the name too, what the flag says counts, and rules of the file that the flag has
none for. If there is no export at all, `ram=1T` is made, unless a state directory has some.

| key | default | meaning |
|-----|---------|---------|
"""

_TAIL: Final = """
Who may use an export, and what that means, is in [security.md](security.md).

## Reloading

`nbdram reload` and SIGHUP have a running server read the file and the certificates again. If anything is wrong in them,
nothing changes, and the mistakes are told: by `nbdram reload`, or in the log. Otherwise, keys with * are applied:

- An export that is new is made. One whose size has changed is resized, to less only above all of its data. What else is
  said of it holds at once, also for connections that are open: who may not use it any more is hung up on.
- An export that has left the file is removed if it is empty and nobody is connected. With data in it, it is kept,
  unless `nbdram reload --remove` was said. What could not be done is tried again by the next reload.
- New certificates are for new connections; those that are open go on.

For the others, `nbdram reload` says that a restart is needed; until then the server goes on as it was. It exits with 0
only if everything in the file is in force.

Exports that were made with `nbdram create` are not touched by a reload; those without rules have those of `[access]`.
"""


def text() -> str:
    """All of docs/configuration.md."""
    rows = "".join(
        f"| `{key.name}`{_star(key)} | `{key.variable}` | {_flag(key)} | {key.default} | {key.help} |\n" for key in KEYS
    )
    exports = "".join(f"| `{key.name}`{_star(key)} | {key.default} | {key.help} |\n" for key in EXPORT_KEYS)
    return f"{_HEAD}{rows}\n\\* A reload applies it.\n{_EXPORTS}{exports}{_TAIL}"


def _flag(key: Key) -> str:
    return f"`{key.flag}`" if key.flag else ""


def _star(key: Key) -> str:
    return " *" if key.running else ""


if __name__ == "__main__":
    print(text(), end="")
