"""The process of the console command `una-fast`: how it begins and how it ends.

Until the command listens to signals, Ctrl-C ends the process without a word; the import of this
file is therefore as short as can be.
"""

import signal

if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in the background of a shell
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import sys
import threading

PATIENCE = 10.0  # seconds for threads, such as of a reward function, after the command


def main() -> int:
    """Run the command of the process's arguments; return the exit status."""
    from una_fast.cli import main as run

    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a character
    status = run(sys.argv[1:])
    if status and "TORCHELASTIC_RUN_ID" in os.environ:
        # The launcher ends the other ranks when this one is gone; the end of Python takes seconds.
        sys.stdout.flush()
        os._exit(status)
    watch = threading.Timer(PATIENCE, _end, [status])
    watch.daemon = True  # what ends by itself, ends as ever
    watch.start()
    return status


def _end(status: int) -> None:
    """End the process, even though threads are left that do not end."""
    names = [thread.name for thread in threading.enumerate() if not thread.daemon]
    left = ", ".join(ascii(name) for name in names if name != "MainThread")
    os.write(2, f"una-fast: ended without waiting for the threads {left}\n".encode())
    os._exit(status)
