"""Nimbus: a small REST cloud over real HTTP, for the tests of a backend and for the tutorial.

It is what a plain cloud is: a bearer token, regions and zones, a catalogue, servers with labels, pages, disks that
outlive their servers, and errors with a code and a message.

    GET    /v1/account                              whose token this is
    GET    /v1/regions                              regions and their zones
    GET    /v1/types                                machine types, with prices by zone
    POST   /v1/servers                              makes a server; with `Idempotency-Key` only one
    GET    /v1/servers?region=R&label=K:V&page=N    the servers of a region, 50 a page, all labels must match
    GET    /v1/servers/ID                           one server, for a while after its end as well
    DELETE /v1/servers/ID?delete_disks=true         ends it; with its disk, if asked

_cloud       what there is, and how it changes with time
_catalogue   what is sold
_faults      what goes wrong by order
_hosts       servers that really run, as processes of this computer
_http        the way in
"""

from __future__ import annotations

from dstack_core.testing.nimbus._server import NimbusServer

__all__ = ["NimbusServer"]
