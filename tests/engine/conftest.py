"""Fixtures of this room: a git server."""

from __future__ import annotations

from tests.support.git_hosts import git_server

__all__ = ["git_server"]
