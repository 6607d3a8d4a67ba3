"""Log lines as JSON, and their names."""

import ast
import json
import logging
import sys
from pathlib import Path

from nbdram.observe import logs

from ..helpers import running

ROOT = Path(__file__).parents[2]
SERVER = ("server", "memory", "observe", "cli/serve.py", "config.py", "configuration")


def messages() -> set[str]:
    """What the server's code can log, but for debugging."""
    found = set()
    for part in SERVER:
        path = ROOT / "nbdram" / part
        for file in [path] if path.is_file() else path.rglob("*.py"):
            for call in ast.walk(ast.parse(file.read_text())):
                if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("log."):
                    if ast.unparse(call.func) == "log.debug":
                        continue
                    (message, *_) = call.args
                    assert isinstance(message, ast.Constant), f"{file}:{call.lineno}: a message must be a constant"
                    found.add(str(message.value))
    return found


def test_every_message_is_an_event_with_a_name() -> None:
    assert messages() == set(logs.EVENTS), "nbdram/observe/logs.py lists all messages of the server"


def test_each_event_names_all_that_is_filled_in() -> None:
    for message, (event, *names) in logs.EVENTS.items():
        assert message.count("%") == len(names), event


def test_the_reference_is_what_the_code_says() -> None:
    committed = (ROOT / "docs" / "logs.md").read_text()
    assert committed == logs.text(), "run python -m nbdram.observe.logs > docs/logs.md"


def test_a_line_has_the_event_its_fields_and_what_was_raised() -> None:
    try:
        raise ValueError("a reason\nof two lines")
    except ValueError:
        raised = sys.exc_info()
    message = "%s did not finish the handshake in %g s"
    record = logging.LogRecord("nbdram.connection", logging.INFO, "x.py", 1, message, ("a client", 10.0), raised)
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert (told["event"], told["level"], told["client"], told["seconds"]) == ("handshake_late", "info", "a client", 10)
    assert told["message"] == "a client did not finish the handshake in 10 s"
    assert "ValueError: a reason" in told["exception"]


def test_what_others_log_is_a_line_too() -> None:
    record = logging.LogRecord("asyncio", logging.ERROR, "x.py", 1, "100 % strange", None, None)
    assert json.loads(logs.JsonFormatter().format(record))["event"] == "other"


async def test_a_server_logs_one_object_a_line(tmp_path: Path) -> None:
    async with running(tmp_path, "--log-format", "json", "-v") as server:
        async with await server.entered() as client:
            await client.write(0, b"x")
        server.process.terminate()
        done = await server.ended()
    events = [json.loads(line) for line in done.errors.splitlines()]
    names = [line["event"] for line in events]
    assert names.index("export_opened") < names.index("export_closed")
    assert "stopping" in names
    opened = next(line for line in events if line["event"] == "export_opened")
    assert (opened["export"], opened["replies"], opened["level"]) == ("ram", "simple", "info")
