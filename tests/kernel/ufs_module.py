"""The guest's own `ufs` module, built with write support, which Debian's is without.

User-mode Linux comes without headers, but Debian has the source of just that kernel, and the package the configuration
it was built with. What building one module takes of it is unpacked; the result is kept in build/.

Debian's makefs puts the superblock of UFS2 at 8 KiB, the last place but one where FreeBSD looks. Linux looks at 64 KiB
only; the module that is built here looks at 8.
"""

import gzip
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tests.kernel.guest import CHECKOUT, GuestError, require_tools

TOOLS: Final = {"gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "bc": "bc", "xz": "xz-utils"}
_CONFIGURATION: Final = Path("/usr/share/doc/user-mode-linux/config.gz")
_NEEDED: Final = (
    *("Makefile", "Kbuild", "*Kconfig*", "arch/um", "arch/x86", "include", "scripts", "fs/ufs"),
    *("kernel/bounds.c", "kernel/time/timeconst.bc", "security/selinux/include"),
    *("tools/include", "tools/scripts", "tools/build"),
)


def ufs_module() -> Path:
    """The module; built if it has not been built yet for this kernel. GuestError if it can't be."""
    require_tools(TOOLS)
    release = subprocess.run(["linux.uml", "--version"], check=True, capture_output=True, text=True).stdout.strip()
    module = CHECKOUT / "build" / f"ufs-{release}.ko"
    if not module.exists():
        module.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(prefix="nbdram-ufs-") as directory:
            built = _build(Path(directory), _unpack(Path(directory), release))
            draft = module.with_suffix(".new")
            shutil.copy(built, draft)
            os.replace(draft, module)
    return module


def _unpack(directory: Path, release: str) -> Path:
    """The source of this release, as far as it is needed."""
    known = _run(["apt-cache", "madison", "linux-source-6.1"], directory)
    versions = [line.split("|")[1].strip() for line in known.splitlines()]
    version = next((found for found in versions if found.startswith(f"{release}-")), None)
    if version is None:
        raise GuestError(f"Debian has no linux-source-6.1 of {release} (but {', '.join(versions)}): apt-get update")
    _run(["apt-get", "download", "-q", f"linux-source-6.1={version}"], directory)
    (package,) = directory.glob("*.deb")
    _run(["dpkg-deb", "--extract", str(package), "package"], directory)
    source = directory / "source"
    source.mkdir()
    tarball = directory / "package/usr/src/linux-source-6.1.tar.xz"
    members = [f"linux-source-6.1/{name}" for name in _NEEDED]
    _run(["tar", "-xf", str(tarball), "--strip-components=1", "--wildcards", *members], source)
    return source


def _build(directory: Path, source: Path) -> Path:
    (source / ".config").write_bytes(gzip.decompress(_CONFIGURATION.read_bytes()))
    make = ["make", "ARCH=um", f"-j{os.cpu_count()}"]
    _run([*make, "olddefconfig"], source)
    _run([*make, "modules_prepare"], source)
    # A copy, because within the tree the kernel's configuration would say what is built.
    module = directory / "ufs"
    shutil.copytree(source / "fs/ufs", module)
    header = module / "ufs_fs.h"
    text, count = re.subn(r"(#define SBLOCK_UFS2)\s+65536", r"\1 8192", header.read_text())
    if count != 1:
        raise GuestError("the superblock's place is not where it was in ufs_fs.h")
    header.write_text(text)
    settings = ["CONFIG_UFS_FS=m", "KCFLAGS=-DCONFIG_UFS_FS_WRITE=1", "KBUILD_MODPOST_WARN=1"]
    _run([*make, f"M={module}", *settings, "modules"], source)
    return module / "ufs.ko"


def _run(argv: Sequence[str], directory: Path) -> str:
    done = subprocess.run(argv, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GuestError(f"{' '.join(argv[:3])} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout
