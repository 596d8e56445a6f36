"""Work that runs other programs, written as generators: `code, output = yield Command(argv)`."""

from __future__ import annotations

import os

from .lean import quiet
from .loop import READ
from .process import spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from .loop import Loop

    Steps = Generator["Command", tuple[int, str], None]
    Flags = Generator["Command", tuple[int, str], bool]
    Codes = Generator["Command", tuple[int, str], int]
    Looks = Generator["Command", tuple[int, str], tuple[float, float]]

_KEPT = 64 << 10


def which(name: str) -> str | None:
    """Where the PATH has this program."""
    for directory in os.get_exec_path():
        path = os.path.join(directory, name)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return None


class Command:
    """A program to run to its end: argv, environment (ours unless given), and seconds it may take."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None = None, limit: float = 60.0) -> None:
        self.argv, self.env, self.limit = argv, os.environ if env is None else env, limit


class Work:
    """Drives one generator; each command's exit code and output (both streams, the last 64 KiB) go back into it.

    Args:
        failed: gets what the generator raises.
    """

    def __init__(self, loop: Loop, steps: Steps, failed: Callable[[Exception], None]) -> None:
        self._loop, self._steps, self._failed = loop, steps, failed
        self._pid = 0
        self._go(None)

    def cancel(self) -> None:
        """No further step; the program that runs now is killed."""
        # In this order: what the steps remove at their end, the program must not make again.
        self._kill()
        self._steps.close()

    def _go(self, result: tuple[int, str] | None) -> None:
        self._pid = 0
        try:
            # The type of the first `send` is `None` by definition.
            command = self._steps.send(result)  # type: ignore[arg-type]
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 - handed on
            self._failed(error)
            return
        self._run(command)

    def _run(self, command: Command) -> None:
        output, writer = os.pipe()
        try:
            self._pid = spawn(command.argv, command.env, "/", writer)
        except OSError as error:
            os.close(output)
            message = "%s: %s" % (error.filename, error.strerror)
            self._loop.later(0, lambda: self._go((127, message)))
            return
        finally:
            os.close(writer)
        kept = bytearray()
        os.set_blocking(output, False)
        self._loop.watch(output, READ, lambda _: self._read(output, kept))
        limit = self._loop.later(command.limit, self._kill)

        def ended(code: int) -> None:
            limit.cancel()
            self._read(output, kept)
            self._loop.unwatch(output)
            os.close(output)
            self._go((code, kept.decode(errors="replace").strip()))

        self._loop.on_exit(self._pid, ended)

    def _read(self, output: int, kept: bytearray) -> None:
        with quiet:
            while True:
                data = os.read(output, _KEPT)
                if not data:
                    self._loop.unwatch(output)
                    return
                kept += data
                del kept[:-_KEPT]

    def _kill(self) -> None:
        if self._pid:
            with quiet:
                os.killpg(self._pid, 9)
