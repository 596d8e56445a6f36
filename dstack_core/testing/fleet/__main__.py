"""Builds the machines' images, if they are not there yet, and says where they are kept."""

from __future__ import annotations

import os
import time

from dstack_core.testing.fleet._daemon import find_or_start
from dstack_core.testing.fleet._image import folder, image


def main() -> None:
    """Both images: without a container engine, and with one."""
    daemon = find_or_start()
    for container_engine in (False, True):
        began = time.monotonic()
        name = image(daemon.engine, container_engine=container_engine)
        print(f"{name}: {time.monotonic() - began:.1f} s")  # noqa: T201  # for people
    for file in sorted(folder().glob("*.tar")):
        print(f"{file}: {file.stat().st_size / 1e6:.0f} MB")  # noqa: T201  # for people
    if daemon.holder is not None:
        os.close(daemon.holder)


if __name__ == "__main__":
    main()
