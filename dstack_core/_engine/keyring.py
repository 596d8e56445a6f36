"""With which keys servers and machines know each other.

All servers of a database have one key: whichever of them goes on with a run can log in to its machine. The key is a
file of the server's; the database remembers which one it is, so that a server with another one is found out before it
takes every machine for silent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from sqlalchemy import select
from sqlalchemy.orm import Session

from dstack_core._engine.seams import Seams
from dstack_core._engine.transitions import InstanceStatus
from dstack_core._store.tables import InstanceRow, MetaRow
from dstack_core._transport.keys import KeyPair, key_pair
from dstack_core.errors import ConfigurationError

_KNOWN = "ssh-key"
_OVER = [status.value for status in InstanceStatus if status.is_final]


class Keyring:
    """The keys of one server.

    Args:
        seams: chance comes from there.
        server_key: the server's own pair, made when it is first asked for.
    """

    def __init__(self, seams: Seams, server_key: Callable[[], KeyPair]) -> None:
        self._rng = seams.rng
        self._server_key = server_key

    def server_key(self) -> str:
        """The public key that machines let in."""
        return self._server_key().public

    def new_host_key(self) -> KeyPair:
        """With which a machine proves itself when it is first spoken to."""
        return key_pair(self._rng.getrandbits(256).to_bytes(32, "big"))

    def check(self, session: Session, booting: Collection[str]) -> None:
        """Remembers the server's key. `booting`: the backends with machines that let it in.

        Raises:
            ConfigurationError: there are machines that let another one in.
        """
        mine, known = self.server_key(), session.get(MetaRow, _KNOWN)
        if known is None:
            session.add(MetaRow(key=_KNOWN, value=mine))
        elif known.value != mine:
            alive = select(InstanceRow.name).where(InstanceRow.backend.in_(booting), InstanceRow.status.not_in(_OVER))
            names = list(session.scalars(alive))
            if names:
                raise ConfigurationError(_other_key(names))
            known.value = mine


def _other_key(names: list[str]) -> str:
    return (
        f"{len(names)} machines let in another server's SSH key than this server's ({', '.join(sorted(names)[:3])}). "
        "All servers of a database use one key: copy the first server's file server/ssh/id_ed25519 to this one's home, "
        "or name it in DSTACK_SSH_KEY_FILE."
    )
