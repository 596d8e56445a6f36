"""User-data: what is in it, and what may not be."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from typing import Any

import pytest

from dstack_core._transport.archive import START
from dstack_core._transport.cloud_init import LIMIT, Boot, first_host_key, user_data
from dstack_core._transport.keys import key_pair

HOST_KEY = key_pair(bytes(32))
SERVER = key_pair(bytes([1]) * 32)
USERS = tuple(key_pair(bytes([number]) * 32).public for number in range(2, 12))


def boot(**fields: Any) -> Boot:
    """A machine."""
    plain = {"instance": "i-1", "server_key": SERVER.public, "host_key": HOST_KEY, "grace": 600.0}
    return Boot(**{**plain, **fields})


FULL = boot(
    public_keys=USERS,
    expires_at=datetime(2030, 1, 1, tzinfo=UTC),
    container_engine=True,
    gpus="nvidia",
)


def files(text: str) -> dict[str, str]:
    """What it writes on the machine's disk."""
    return {file["path"]: file["content"] for file in json.loads(text.partition("\n")[2])["write_files"]}


def test_it_fits_with_everything_in_it() -> None:
    """With ten keys of users, an image, GPUs and a time limit there is room to spare on the strictest cloud."""
    assert len(user_data(FULL).encode()) < LIMIT * 0.75


def test_what_does_not_fit_is_refused() -> None:
    """A thousand keys do not go in, and it is said at once."""
    with pytest.raises(ValueError, match="16384"):
        user_data(boot(public_keys=tuple(f"{SERVER.public} {number}" for number in range(1000))))


def test_only_the_first_host_key_is_secret() -> None:
    """It is the one private key there, and the machine's public one can be read back."""
    text = user_data(FULL)
    assert text.count("PRIVATE KEY-----") == 2
    assert HOST_KEY.private.splitlines()[3] in text
    assert first_host_key(text) == HOST_KEY.public
    assert user_data(FULL) == text


@pytest.mark.parametrize("given", [boot(), FULL, boot(gpus="amd", container_engine=True), boot(gpus="tenstorrent")])
def test_the_scripts_are_shell(given: Boot) -> None:
    """Every script can be read by a plain shell."""
    scripts = [content for content in files(user_data(given)).values() if content.startswith("#!/bin/sh")]
    assert len(scripts) == 3
    for script in scripts:
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_a_container_engine_is_had_only_for_an_image() -> None:
    """A job without an image leaves the machine as it is."""
    plain, image = (
        files(user_data(one))["/usr/local/lib/dstack/setup"] for one in (boot(), boot(container_engine=True))
    )
    assert "docker" not in plain
    assert "nvidia" not in image
    assert "docker" in image


def test_the_start_can_stand_between_quotes() -> None:
    """The unit has it between single quotes, where systemd looks for variables and specifiers."""
    assert not set(START) & set("'$%\\\n")
