"""Keeps tensorflow's log off the terminal."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator

# Lines of its C++ log. TF_CPP_MIN_LOG_LEVEL no longer suppresses those written during its import.
_LOG_LINE = re.compile(rb"WARNING: All log messages before absl::|[IWE]\d{4} \d\d:\d\d:")


@contextlib.contextmanager
def without_native_log() -> Iterator[None]:
    """Drops C++ log lines written to stderr within the context; other lines come out after it.

    Warnings of a tensorflow that is imported within the context stay off for good: for an exception
    in a task's Python code, whose sentence we show, it would write the traceback several times.

    The log goes to file descriptor 2, past `sys.stderr`, so the descriptor is redirected.
    """
    # Whatever is set already: JAX sets it to 1 for itself, so it is no wish of the user's.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            log.seek(0)
            for line in log:
                if not _LOG_LINE.match(line):
                    os.write(2, line)
