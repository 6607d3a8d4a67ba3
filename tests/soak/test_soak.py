"""A short soak; `make soak` has the long one."""

from pathlib import Path

from .running import soak


async def test_mixed_clients_find_what_they_wrote_in_every_tier_and_leave_nothing_behind(tmp_path: Path) -> None:
    report = await soak(tmp_path, 120.0, 0.05)
    for client in ("simple", "structured", "extended", "came and went", "export made and removed", "nbdcopy"):
        assert f"{client} " in report
