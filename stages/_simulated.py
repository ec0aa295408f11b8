"""Start the bundled simulator for the time of a stage, if any of its endpoints asks for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from agent.endpoint import SIMULATOR, EndpointParams
from schemas.errors import InputError


@contextmanager
def simulator_for(role: str, *endpoints: EndpointParams) -> Iterator[str | None]:
    """The address of a running simulator of `actors` or `judge`, or None where no endpoint needs one. It stops with the block, or with us.

    Raises:
        InputError: it does not start.
    """
    if all(endpoint.base_url != SIMULATOR for endpoint in endpoints):
        yield None
        return
    # It ends when its standard input closes, so it cannot outlive this process even if that is killed.
    with subprocess.Popen([sys.executable, "-m", "simulator", role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            address = process.stdout.readline().strip()
            if not address.startswith("http"):
                raise InputError(address.removeprefix("error: ") or "the simulator did not start", f"python -m simulator {role} shows why")
            yield address
        finally:
            process.stdin.close()
            process.wait(timeout=10)
