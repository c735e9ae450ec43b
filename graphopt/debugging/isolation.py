"""Work done in child processes, so that a runtime that ends its process does not end ours.

A server is started as a process of its own, and forks a child for each call before any runtime is at work in it: that
takes milliseconds, and whatever a child does to itself is told in the reply.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from graphopt.errors import GraphoptError, UsageError, in_words

# How often the server looks whether a child that may take a limited time is done, in seconds.
_POLL_SECONDS = 0.005
# How long the server may take to end its child and itself, in seconds.
_PATIENCE_SECONDS = 5.0
# The last bytes of what a child says on stderr are enough for its last line.
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Died:
    """What is left of a child that gave no reply.

    Attributes:
        how: How it ended, in a few words that are the same each time.
        last_words: The last line it wrote to stderr, or nothing.
    """

    how: str
    last_words: str = ""


class Isolation:
    """A server that makes calls in children; to be closed, or used in a ``with`` statement.

    Args:
        timeout: Seconds after which a child is ended; None waits for ever.
    """

    def __init__(self, timeout: float | None = None) -> None:
        if not hasattr(os, "fork"):
            raise UsageError("candidates cannot be isolated on this system: it cannot fork", hint="leave it out")
        self._timeout = timeout
        # A child that dies leaves its files behind, which go with this folder.
        self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        path = os.pathsep.join(folder for folder in sys.path if folder)
        environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": self._folder.name}
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from graphopt.debugging.isolation import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # an interrupt is for us alone
        )

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return what a function of a module returns, or a `Died`.

        Raises:
            GraphoptError: What the function raised; or it, or what it takes, cannot be sent to another process.
        """
        try:
            message = pickle.dumps((function, args, self._timeout))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(
                f"this cannot be asked in another process: {in_words(error)}",
                hint="name passes and checks instead of giving objects, or go without isolation",
            ) from error
        assert self._server.stdin is not None, "opened as a pipe"
        assert self._server.stdout is not None, "opened as a pipe"
        try:
            _send(self._server.stdin, message)
            kind, content, _ = pickle.loads(_receive(self._server.stdout))
        except (OSError, EOFError) as error:
            raise GraphoptError("the process that isolates candidates is gone", hint="run it again") from error
        if kind == "error":
            raise content
        return content

    def close(self) -> None:
        """End the server, and a child that is at work."""
        self._server.terminate()
        try:
            self._server.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        for pipe in (self._server.stdin, self._server.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._folder.cleanup()

    def __enter__(self) -> Isolation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(8, "little") + message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    head = pipe.read(8)
    length = int.from_bytes(head, "little")
    message = pipe.read(length) if len(head) == 8 else b""
    if len(head) < 8 or len(message) < length:
        raise EOFError
    return message


def serve() -> None:
    """Answer calls until nobody asks any more."""
    asked = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    with contextlib.suppress(BrokenPipeError):  # who asked is gone
        for message in _messages(asked):
            _send(replies, _reply(message))


def _messages(pipe: IO[bytes]) -> Iterator[bytes]:
    while True:
        try:
            yield _receive(pipe)
        except EOFError:
            return


def _reply(message: bytes) -> bytes:
    with tempfile.TemporaryFile() as result, tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)  # so that it can be ended with the processes it starts
            _run(message, result, said)
        with _ended_with_us(child):
            status = _wait(child, pickle.loads(message)[2])
        if status == 0:
            result.seek(0)
            reply = result.read()
            _load(pickle.loads(reply)[2])
            return reply
        return pickle.dumps(("died", Died(_how(status), _last_line(said)), ()))


@contextlib.contextmanager
def _ended_with_us(child: int) -> Iterator[None]:
    """End a child when this process is asked to end."""

    def end(*_: object) -> None:
        _end(child)
        os._exit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(child: int) -> None:
    """End a child, and what it has started."""
    for end in (os.killpg, os.kill):  # it may not have come to have a group of its own
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(child, signal.SIGKILL)


def _run(message: bytes, result: IO[bytes], said: IO[bytes]) -> None:
    """Make a call, write down what came of it, and end this process."""
    os.dup2(said.fileno(), 2)
    before = frozenset(sys.modules)
    function, args, _ = pickle.loads(message)
    reply: tuple[str, Any]
    try:
        reply = ("result", function(*args))
    except GraphoptError as error:
        error.__cause__ = None
        reply = ("error", error)
    except Exception as error:
        reply = ("error", GraphoptError(f"the candidate could not be tried: {in_words(error)}", hint="report it"))
    loaded = tuple(name for name in sys.modules if name not in before)
    result.write(pickle.dumps((*reply, loaded)))
    result.flush()
    os._exit(0)


def _load(modules: Iterable[str]) -> None:
    """Load what a child had to load, so that the next one finds it there."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _wait(child: int, timeout: float | None) -> int | None:
    """Return the status a child ended with, or None where it took too long and was ended."""
    if timeout is None:
        return os.waitpid(child, 0)[1]
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(_POLL_SECONDS)
    _end(child)
    os.waitpid(child, 0)
    return None


def _how(status: int | None) -> str:
    if status is None:
        return "does not end in time"
    if os.WIFSIGNALED(status):
        return f"is ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ends its process with {os.WEXITSTATUS(status)}"


def _last_line(said: IO[bytes]) -> str:
    size = said.seek(0, os.SEEK_END)
    said.seek(max(0, size - _TAIL_BYTES))
    lines = said.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
