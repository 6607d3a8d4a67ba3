"""One target under atheris, in a process of its own: `python -m tests.fuzz.child TARGET [libFuzzer's arguments]`."""

import importlib
import sys

import atheris

from .targets import TARGETS


def main() -> None:
    target = TARGETS[sys.argv[1]]
    with atheris.instrument_imports(include=list(target.modules)):
        for module in target.modules:
            importlib.import_module(module)
        one = target.one()
    atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
