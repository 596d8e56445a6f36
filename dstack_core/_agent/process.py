"""Starting a process, and the terminal that it writes to."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import sys
import termios

from .lean import signal
from .loop import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import NoReturn

    from .loop import Loop

ON_TERMINAL = {"TERM": "dumb", "PAGER": "cat", "GIT_PAGER": "cat"}
"""Environment of a job, unless it says otherwise: a terminal without abilities, where nobody presses a key."""

_BATCH = 256 << 10
_FLOW = 1 << 10
"""Bytes of one read from which on more is likely to come at once."""
_LOOKS = 60
_NOTHING = bytes(4)
_SIZE = (24, 80)
_CANNOT_START = 127


def spawn(
    argv: Sequence[str],
    env: Mapping[str, str],
    directory: str,
    output: int,
    errors: int | None = None,
    give_way: bool = False,
) -> int:
    """Starts `argv` in a session of its own, and says its process id.

    The agent has one thread, so a plain fork is safe.

    Args:
        argv: the program is looked for on the PATH of `env`.
        env: its whole environment.
        directory: its working directory.
        output: becomes its standard output, and its standard error unless `errors` is given. Its input is empty.
        errors: becomes its standard error.
        give_way: when memory runs out, the kernel is to take this process before us.

    Raises:
        OSError: it could not be started; `filename` says what could not be found or entered.
    """
    report, complaint = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(argv, env, directory, (output, output if errors is None else errors), give_way, complaint)
    os.close(complaint)
    with open(report, "rb") as lines:
        trouble = lines.read().decode(errors="replace")
    if trouble:
        number, _, name = trouble.partition(" ")
        raise OSError(int(number), os.strerror(int(number)), name)
    return pid


def _become(
    argv: Sequence[str],
    env: Mapping[str, str],
    directory: str,
    outputs: tuple[int, int],
    give_way: bool,
    complaint: int,
) -> NoReturn:
    name = directory
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number, source in enumerate((null, *outputs)):
            os.dup2(source, number)
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(ignored, signal.SIG_DFL)
        if give_way:
            _offer_to_oom_killer()
        os.chdir(directory)
        name = argv[0]
        os.execvpe(argv[0], list(argv), dict(env))  # noqa: S606 - that is what this is for
    except (OSError, ValueError) as error:
        # A ValueError: a NUL in an argument, or a variable without a name.
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
        os.write(complaint, ("%d %s" % (number, name)).encode(errors="replace"))
    finally:
        os._exit(_CANNOT_START)


def _offer_to_oom_killer() -> None:
    try:
        with open("/proc/self/oom_score_adj", "r+") as score:
            score.write(str(min(1000, int(score.read()) + 300)))
    except (OSError, ValueError):
        pass


class Terminal:
    """A pseudo-terminal that changes no byte: programs see a terminal and do not hold their output back.

    It is nobody's controlling terminal. It is read in large batches, each handed to `sink`.
    """

    def __init__(self, loop: Loop, sink: Callable[[memoryview], None]) -> None:
        self._loop, self._sink = loop, sink
        master, self.slave = os.openpty()
        _make_raw(self.slave)
        os.set_blocking(master, False)
        self._master = io.FileIO(master, "r+")
        self._buffer = memoryview(bytearray(_BATCH))
        self._ended: Callable[[], None] | None = None
        # While we hold the slave, too, a job may close it and open it again.
        self._held = True
        loop.watch(master, READ, self._readable)

    @property
    def path(self) -> str:
        """Its name in the file system."""
        return os.ttyname(self.slave)

    def release(self, ended: Callable[[], None]) -> None:
        """Calls `ended` once nobody has the terminal open any more and all that was written has been read."""
        self._ended = ended
        if self._held:
            self._held = False
            os.close(self.slave)
        self._read()

    def close(self) -> None:
        """Reads what is left, and no more."""
        self._ended = None
        if self._held:
            self._held = False
            os.close(self.slave)
        if not self._master.closed:
            while self._read():
                pass
        self._shut()

    def _readable(self, _: int) -> None:
        self._read()

    def _shut(self) -> None:
        if not self._master.closed:
            self._loop.unwatch(self._master.fileno())
            self._master.close()

    def _read(self) -> bool:
        """One batch; whether there may be more at once."""
        size, more = self._fill()
        if size:
            self._sink(self._buffer[:size])
        if more is None:
            self._shut()
            ended, self._ended = self._ended, None
            if ended:
                ended()
        return bool(more)

    def _fill(self) -> tuple[int, bool | None]:
        """Fills the buffer; true: there may be more, false: not now, `None`: nobody has the terminal open any more."""
        size = 0
        while size < _BATCH:
            try:
                count = self._master.readinto(self._buffer[size:])
            except OSError:
                return size, None
            if not count:
                return size, False if count is None else None
            size += count
            if count >= _FLOW:
                self._expect_more()
        return size, True

    def _expect_more(self) -> None:
        """Looks for more, for some ten microseconds.

        The kernel moves at most 4 KiB at a time from the job to us, on another processor, and a read that comes too
        early sleeps until it has done so. Going to sleep and waking up for every 4 KiB would halve the speed.
        """
        file = self._master.fileno()
        for _ in range(_LOOKS):
            if fcntl.ioctl(file, termios.FIONREAD, _NOTHING) != _NOTHING:
                return


def _make_raw(fd: int) -> None:
    attributes = termios.tcgetattr(fd)
    attributes[0] = attributes[1] = attributes[3] = 0
    attributes[2] = attributes[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    termios.tcsetattr(fd, termios.TCSANOW, attributes)
    size = b"".join(number.to_bytes(2, sys.byteorder) for number in (*_SIZE, 0, 0))
    fcntl.ioctl(fd, termios.TIOCSWINSZ, size)
