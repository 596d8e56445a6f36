"""The core of dstack: client, server, engine and the contract of backends.

Users import `dstack.api`; authors of backends import `dstack_core.plugin`, `dstack_core.testing` and
`dstack_core.errors`. Everything else is private.
"""

__version__ = "0.1.0"
"""Version of the distribution `dstack-core`; equals the one in its metadata."""
