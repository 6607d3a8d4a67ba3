"""How the campaigns (`make soak`, `make chaos`, `make crash`, `make fuzz`) end as programs."""

import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int]) -> NoReturn:
    """End with the status of `main`; interrupted, in a sentence and with 130: what it had started has ended by then."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; nothing that was started is left", file=sys.stderr)
        sys.exit(130)
