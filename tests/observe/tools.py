"""Programs that the tests need. A missing one is a failure that names its package, never a skip."""

import shutil

import pytest

_PACKAGE_OF = {"promtool": "prometheus", "chromedriver": "chromium-driver"}


def tool(name: str) -> str:
    """The path of a program."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is not installed: apt-get install {_PACKAGE_OF.get(name, name)}")
    return path
