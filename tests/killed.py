"""A process that runs teacher_gen and is killed: what `python -m stages.teacher_gen` does, in a fork of a process that has imported it."""

import os
import sys


def generate(folder):
    """Run the stage in `folder`, with the cache under it."""
    os.chdir(folder)
    os.environ["TEACHER_KEY"] = "a-long-and-secret-key"
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process

    from agent import endpoint
    from stages import teacher_gen
    from stages._stage import run

    endpoint.RESPONSES = folder / "responses"
    run(teacher_gen.main)
