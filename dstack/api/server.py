"""The low-level client: one method per request, with the server's own models."""

from dstack_core._client.api import APIClient

APIClient.__module__ = __name__

__all__ = ["APIClient"]
