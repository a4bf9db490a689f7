"""Multi-host runs: how processes join, agree with each other, and end together.

All processes run the same program with the same config. They compute through XLA's collectives;
this module communicates through the key-value store of `jax.distributed`, which process 0 serves.
It needs no devices, so it works before the first array and after the last.
"""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Protocol, runtime_checkable

import jax
import numpy as np
from jax._src import distributed, xla_bridge  # no public way to the store's client; as in Orbax
from jax.experimental import multihost_utils

from robust_ft import errors
from robust_ft.errors import UserError

# Exit statuses. LOST (EX_PROTOCOL): another process is lost; when all are started again, the run
# resumes from its newest checkpoint.
LOST = 76
MISTAKE, BUG = 2, 1  # a UserError, and any other error
START_SECONDS = 300
# A process may wait for hours for one that builds a cache; `_Watch` notices if that one is lost.
_PATIENCE_MS = 7 * 24 * 3600 * 1000
_STATES = "robust_ft/states/"
_AGAIN = "start all again to go on from the newest checkpoint."
_FIRST_GONE = f"Process 0 is gone; {_AGAIN}"


@dataclasses.dataclass(frozen=True)
class Processes:
    """The flags about a run's processes; None is detected from the cluster.

    Attributes:
        coordinator_address: HOST:PORT of process 0, with a port that is free there.
        num_processes: Number of processes; with 1, no cluster is detected.
        process_id: The index of this process.
        timeout: Seconds without a heartbeat after which a process counts as lost.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: float = 100

    def __post_init__(self) -> None:
        given = (self.coordinator_address, self.num_processes, self.process_id)
        if self.num_processes != 1 and None in given and given != (None, None, None):
            raise UserError(
                "--coordinator_address, --num_processes and --process_id are given together, or "
                "not at all where the cluster tells."
            )
        count, index = self.num_processes, self.process_id
        if count is not None and index is not None and not 0 <= index < count:
            raise UserError(
                f"--process_id={index} must be at least 0 and less than --num_processes={count}."
            )
        if self.coordinator_address and not self.coordinator_address.rpartition(":")[2].isdigit():
            raise UserError(
                f"--coordinator_address={self.coordinator_address} must be HOST:PORT, such as "
                "10.0.0.2:8476."
            )
        if self.timeout <= 0:
            raise UserError(f"--process_timeout={self.timeout:g} must be more than 0 seconds.")


@contextlib.contextmanager
def joined(processes: Processes, stops: bool = False) -> Iterator[None]:
    """Joins this process to the others of a run, and watches over them inside the block.

    An error inside the block ends this process, and all others with the same message. If a process
    is lost, all others end with a message and the exit status `LOST`, in about `processes.timeout`
    seconds. Without a cluster nothing happens.

    Args:
        processes: The flags.
        stops: Whether `stop_on_sigterm` handles SIGTERM; otherwise it ends the process.

    Raises:
        UserError: The other processes cannot be reached.
    """
    if not _initialize(processes, stops):
        yield
        return
    watch = _Watch(processes.timeout)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.end_with(error)
    watch.stop()


def _initialize(processes: Processes, stops: bool) -> bool:
    """Starts `jax.distributed` and returns True if there is more than one process."""
    explicit = processes.process_id is not None
    # If JAX is in use already, as in a notebook, no cluster started this process for the run.
    alone = _alone(os.environ) or xla_bridge.backends_are_initialized()
    if processes.num_processes == 1 or (alone and not explicit):
        return False
    address = processes.coordinator_address
    if address and processes.process_id == 0:
        _check_free(int(address.rpartition(":")[2]))
    jax.config.update("jax_enable_preemption_service", stops)
    where = f"at {address}" if address else "at the address that the cluster tells"
    previous = _on_abort(
        lambda: _quit(
            f"The processes of this run have not all met {where} within {START_SECONDS} s; check "
            "that all were started, and can reach it."
        )
    )
    try:
        jax.distributed.initialize(
            address,
            processes.num_processes,
            processes.process_id,
            initialization_timeout=START_SECONDS,
            # Later than the watch's: JAX ends processes by aborting, with a stack trace.
            heartbeat_timeout_seconds=int(2 * processes.timeout) + 10,
        )
    except ValueError as error:
        if not explicit and "coordinator_address" in str(error):  # no cluster that JAX knows
            ctypes.CDLL(None).signal(signal.SIGABRT, previous)
            return False
        raise
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"What the cluster tells of this run's processes is of no use "
            f"({_first_line(error)}); give --coordinator_address, --num_processes and "
            "--process_id, or --num_processes=1 to run without others."
        ) from error
    several: bool = jax.process_count() > 1
    return several


def _check_free(port: int) -> None:
    # JAX would abort the process.
    with contextlib.closing(socket.socket(socket.AF_INET6)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("::", port))
        except OSError as error:
            raise UserError(
                f"Port {port} of --coordinator_address cannot be used ({error.strerror}); choose "
                "another one."
            ) from None


def _alone(environment: Mapping[str, str]) -> bool:
    """Returns whether a cluster's variables say that it started only this process.

    JAX would then initialize a run of one process, and under Slurm give it only one of the node's
    GPUs. For Kubernetes JAX supports indexed jobs; any other pod is like a machine of its own.
    """
    for count in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if count in environment:
            return environment[count] == "1"
    return (
        "KUBERNETES_SERVICE_HOST" in environment
        and "JOB_COMPLETION_INDEX" not in environment
        and "TPU_WORKER_HOSTNAMES" not in environment
    )


class _Watch(threading.Thread):
    """Sends heartbeats, and ends this process when another one has failed or is lost.

    A process's state is ["alive", heartbeat number], ["done"], or ["failed", exit status, message].
    """

    def __init__(self, timeout: float):
        super().__init__(name="watch over other processes", daemon=True)
        self._client = _client()
        self._timeout = timeout
        self._interval = min(2.0, timeout / 5)
        self._stopped = threading.Event()
        self._ending, self._writing = threading.Lock(), threading.Lock()
        self._final = False  # whether the last state has been written
        self._status = LOST
        _on_abort(self._aborted)

    def run(self) -> None:
        """Exchanges states until stopped."""
        # When each process's state last changed, and that state.
        last_change = dict.fromkeys(range(jax.process_count()), (time.monotonic(), ""))
        for beat in itertools.count():
            try:
                self._write("alive", beat)
                states = self._states()
            except (RuntimeError, ValueError):
                self._end(LOST, _FIRST_GONE)
            for process, state in states.items():
                if state != last_change[process][1]:
                    last_change[process] = (time.monotonic(), state)
                if state[:1] == "[" and (failed := json.loads(state))[0] == "failed":
                    self._end(failed[1], f"Process {process} ended: {failed[2]}")
            for process, (when, state) in last_change.items():
                if state != '["done"]' and time.monotonic() - when > self._timeout:
                    self._end(
                        LOST,
                        f"Process {process} of {jax.process_count()} has given no sign of life for "
                        f"{self._timeout:g} s; {_AGAIN}",
                    )
            if self._stopped.wait(self._interval):
                return

    def stop(self) -> None:
        """Stops the heartbeats; the others no longer wait for them."""
        self._stopped.set()
        self.join()
        self._write("done")

    def end_with(self, error: BaseException) -> NoReturn:
        """Ends this process, and with it the others, because of its own error."""
        if isinstance(error, KeyboardInterrupt):
            self._end(errors.INTERRUPTED, errors.INTERRUPTION)
        if not isinstance(error, UserError):
            if _may_come_from_others(error):
                # A collective breaks at once when a process dies; the watch notices later, and
                # then ends this process with the right message.
                self.join(self._timeout + 3 * self._interval)
            traceback.print_exception(error)
            self._end(BUG, f"{type(error).__name__}: {_first_line(error)}")
        self._end(MISTAKE, str(error))

    def _end(self, status: int, message: str) -> NoReturn:
        """Prints the message and ends the process, whatever its main thread waits for."""
        if not self._ending.acquire(blocking=False):
            time.sleep(60)  # the other thread ends the process
        self._status = status
        print(f"Error: {message}", file=sys.stderr)
        with contextlib.suppress(RuntimeError, ValueError):
            self._write("failed", status, message)
            # Process 0 serves the store, and JAX aborts processes that lose it: it ends last.
            deadline = time.monotonic() + (3 * self._interval if status == LOST else self._timeout)
            while jax.process_index() == 0 and time.monotonic() < deadline:
                states = [state for state in self._states().values() if "alive" not in state]
                if len(states) == jax.process_count():
                    break
                time.sleep(self._interval / 10)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _aborted(self) -> None:
        """Adds a message to the stack trace with which JAX aborts when process 0 is gone."""
        address = distributed.global_state.coordinator_address or ""
        host, _, port = address.rpartition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port)), timeout=5).close()
            return  # process 0 is there, so this abort has another cause
        if self._ending.acquire(blocking=False):
            _quit(_FIRST_GONE)
        os._exit(self._status)  # `_end` has printed its message

    def _write(self, *state: str | int) -> None:
        with self._writing:
            if not self._final:
                key = f"{_STATES}{jax.process_index()}"
                self._client.key_value_set(key, json.dumps(state), allow_overwrite=True)
                self._final = state[0] != "alive"

    def _states(self) -> dict[int, str]:
        entries = self._client.key_value_dir_get(_STATES)
        return {int(key.rpartition("/")[2]): state for key, state in entries}


def is_first() -> bool:
    """Returns whether this process is process 0, which writes files and prints."""
    first: bool = jax.process_index() == 0
    return first


@runtime_checkable
class Stop(Protocol):
    """Whether to save a checkpoint and stop; asked once before every step."""

    def is_set(self) -> bool: ...

    def set(self) -> None: ...


class _AgreedStop:
    """Set before the same step on all processes, soon after any of them got SIGTERM.

    JAX broadcasts the signal in the background and agrees on the first step that no process has
    reached yet, so asking does not block.
    """

    def __init__(self) -> None:
        self._steps = itertools.count(1)

    def is_set(self) -> bool:
        reached: bool = multihost_utils.reached_preemption_sync_point(next(self._steps))
        return reached

    def set(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """Lets SIGTERM set a `Stop` inside the block; the step in flight is finished and saved."""
    if jax.process_count() > 1:
        yield _AgreedStop()
        return
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def stop_on_ctrl_c(stop: Stop) -> Iterator[None]:
    """Lets a first Ctrl-C set `stop` inside the block, as SIGTERM does; a second one interrupts."""
    previous = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or previous is signal.SIG_IGN:  # in a background job of a shell
        yield
        return

    def first(*_: object) -> None:
        signal.signal(signal.SIGINT, previous)
        # Not by `print`, which the signal may have come into.
        os.write(2, b"\nCtrl-C: saving after this step; press it again to end at once.\n")
        stop.set()

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


_rounds = itertools.count()


def gathered(text: str) -> list[str]:
    """Returns the texts of all processes, by process index. All processes must call it."""
    if jax.process_count() == 1:
        return [text]
    client, folder = _client(), f"robust_ft/{next(_rounds)}"
    client.key_value_set(f"{folder}/{jax.process_index()}", text)
    return [
        client.blocking_key_value_get(f"{folder}/{process}", _PATIENCE_MS)
        for process in range(jax.process_count())
    ]


def barrier() -> None:
    """Waits until all processes have called it."""
    gathered("")


def check_same(what: str, text: str) -> None:
    """Raises a UserError on all processes unless all have the text of process 0.

    Args:
        what: What the text is, for the error message.
        text: This process's text.
    """
    first, *others = gathered(text)
    for process, other in enumerate(others, start=1):
        if other == first:
            continue
        lines = [set(t.splitlines()) for t in (first, other)]
        differing = [  # the first line of each text that the other lacks
            next((line.strip() for line in t.splitlines() if line not in others_lines), "less")
            for t, others_lines in ((first, lines[1]), (other, lines[0]))
        ]
        raise UserError(
            f"Process {process} has another {what} than process 0: '{differing[1]}', not "
            f"'{differing[0]}'; give all processes the same."
        )


def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Places an array that all processes have on the mesh; each process places its shards."""
    is_global = isinstance(array, jax.Array) and not array.is_fully_addressable
    placed: jax.Array
    if sharding.is_fully_addressable or is_global:
        placed = jax.device_put(array, sharding)
    else:
        # `jax.device_put` would send the whole array to all processes, to check that all agree.
        placed = jax.make_array_from_callback(
            array.shape, sharding, lambda index: np.asarray(array[index])
        )
    return placed


def whole(tree: Any) -> Any:
    """Returns a tree of arrays that this process can read, gathered where processes shard them."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


_abort_handler: Any = None


def _on_abort(action: Callable[[], None]) -> ctypes.c_void_p:
    """Calls `action` when the process aborts, in any thread; returns C's previous handler.

    The handler is C's: Python runs its own later, in the main thread, when the process is gone.
    """
    global _abort_handler  # must live as long as the process: C calls it
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: action())
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    return ctypes.c_void_p(libc.signal(signal.SIGABRT, _abort_handler))


def _quit(message: str) -> None:
    print(f"Error: {message}", file=sys.stderr, flush=True)
    os._exit(LOST)


def _client() -> Any:
    """Returns the client of process 0's key-value store."""
    return distributed.global_state.client


def _may_come_from_others(error: BaseException) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
