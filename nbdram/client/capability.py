"""Whether this process may do what it is asked to, said before anything is begun."""

import re
from pathlib import Path
from typing import Final

from nbdram.errors import NbdramError

_SYS_ADMIN: Final = 21


def need_sys_admin(what: str) -> None:
    """NbdramError unless this process has CAP_SYS_ADMIN, which `what` takes."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match and not int(match[1], 16) >> _SYS_ADMIN & 1:
        raise NbdramError(f"{what} needs CAP_SYS_ADMIN: run it as root, or with sudo")
