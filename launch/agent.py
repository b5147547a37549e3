"""Runs torchrun in this process: `agent.py PARENT_PID LOG ARGUMENT...`. A script, not a module.

Workers inherit file descriptor 2 and so write where the user reads. torchrun itself writes through
`sys.stderr`; that goes to LOG, so its report about the workers never buries their own words.
When the parent dies, however it dies, this process gets SIGTERM and passes it to the workers.
"""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, then become torchrun."""
    parent, log, *arguments = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit(1)  # the parent died before the line above
    sys.stderr = open(log, "a", encoding="utf-8", buffering=1)
    sys.path.pop(0)  # this folder, where the files of `launch` would pose as top-level modules
    sys.argv = ["torchrun", *arguments]
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
