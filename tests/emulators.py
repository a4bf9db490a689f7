"""Storages with buckets, served by this machine: `with served("gs") as environment`."""

import contextlib
import os
import socket
import subprocess
import sys
import time

import fsspec
import pytest

BUCKET = "bucket"


@contextlib.contextmanager
def served(scheme, log):
    """Serves an empty bucket to this process and the ones it starts.

    Args:
        scheme: "gs" or "s3".
        log: A file for what the server says.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}"
    script = os.path.join(os.path.dirname(__file__), "gcs_emulator.py")
    command, environment = {
        "gs": (
            [sys.executable, script, str(port), BUCKET],
            {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address},
        ),
        "s3": (
            [sys.executable, "-m", "moto.server", "-H", "localhost", "-p", str(port)],
            {
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
            },
        ),
    }[scheme]
    with open(log, "wb") as file, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            _wait(server, port)
            if scheme == "s3":
                fsspec.filesystem("s3").mkdir(BUCKET)
            yield
        finally:
            server.kill()
            server.wait()


def _wait(server, port):
    for _ in range(300):
        assert server.poll() is None, "the server has ended; see its log"
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
            return
        time.sleep(0.1)
    raise TimeoutError("the server does not start")
