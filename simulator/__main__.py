"""`python -m simulator actors|judge`: stand in for the paid models on a free loopback port.

Prints its address, stops when standard input closes. Reads data/companies/ and the `simulator` section of params.yaml.
It is a simulator and is called so everywhere: nothing it produces is evidence about a real model.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from importlib import import_module
from pathlib import Path

import uvicorn
import yaml
from pydantic import ValidationError

from schemas.company import load_companies
from simulator.server import make_app


def _fault(error: ValidationError | KeyError, role: str) -> str:
    """What is wrong with a role's section; an unknown key before a missing one, since a misspelt key is both."""
    if isinstance(error, KeyError):
        return f"simulator.{role}: missing"
    first = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    key = ".".join(["simulator", role, *map(str, first["loc"])])
    return f"unknown parameter '{key}'" if first["type"] == "extra_forbidden" else f"{key}: {first['msg']}"


def main() -> None:
    # By name, so that an edit to the judge leaves the stage that the teacher plays in up to date.
    role = import_module(f"simulator.{sys.argv[1]}")
    try:
        rates = role.Rates.model_validate(yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["simulator"][sys.argv[1]])
    except (ValidationError, KeyError) as error:
        print(f"error: params.yaml: {_fault(error, sys.argv[1])}")
        return
    app = make_app(role.Player(load_companies(), rates).answer)
    # asyncio turns off Nagle's delay (40 ms an answer) only on sockets that say they are TCP.
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])


if __name__ == "__main__":
    main()
