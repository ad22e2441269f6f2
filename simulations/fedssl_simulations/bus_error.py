"""What the process says where a file that it has mapped is cut short, or its disk fails: a line, and not the signal alone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_SAYS = (
    b"error: a file that was being read is cut short, or its disk fails (SIGBUS): a store that another program changed? "
    b"Nothing of this round was kept: put the store back as it was and do the same again (a run: --resume)\n"
)


def _leave(number: int) -> None:
    os.write(2, _SAYS)
    os._exit(1)


_LEAVE = ctypes.CFUNCTYPE(None, ctypes.c_int)(_leave)


def say_bus_errors() -> None:
    """From here on this process ends with a line and exit code 1 where it would end by SIGBUS."""
    # Not signal.signal: Python runs its handlers between instructions, and the one that failed would be tried again for ever.
    if sys.platform != "win32":
        set_handler = ctypes.CDLL(None).signal
        set_handler.restype = ctypes.c_void_p
        set_handler(signal.SIGBUS, _LEAVE)
