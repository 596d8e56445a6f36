"""The real local server, for the command line."""

from tests.support.homes import client, home

__all__ = ["client", "home"]
