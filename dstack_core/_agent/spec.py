"""What a job is asked to be."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Failed(Exception):
    """The job could not be started. The text is for people, with the cure."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Spec:
    """The fields of `AgentJobSpec`, which the server's `agent_protocol` describes."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        if not (document.get("argv") or document.get("shell") is not None or document.get("image")):
            raise ValueError("it needs `argv`, `shell` or `image`")
        self.argv: list[str] = document.get("argv") or []
        self.shell: str | None = document.get("shell")
        self.env: dict[str, str] = document.get("env") or {}
        self.image: str | None = document.get("image")
        self.entrypoint: list[str] | None = document.get("entrypoint")
        self.user: str | None = document.get("user")
        self.privileged = bool(document.get("privileged"))
        self.registry: dict[str, str] | None = document.get("registry")
        self.python: str | None = document.get("python")
        self.working_dir: str | None = document.get("working_dir")
        self.ports: list[int] = document.get("ports") or []
        self.gpus: str | list[int] | None = document.get("gpus")
        self.shm_mib: int | None = document.get("shm_mib")
        self.cpus: float | None = document.get("cpus")
        self.memory_mib: int | None = document.get("memory_mib")
        self.max_duration: float | None = document.get("max_duration")
        self.stop_grace = float(document.get("stop_grace") or 0)
        self.log_limit: int | None = document.get("log_limit")
        self.code: dict[str, Any] | None = document.get("code")
        self.repo: dict[str, Any] | None = document.get("repo")
        self.instance: str | None = document.get("instance")
        if self.code is not None and not (isinstance(self.code["hash"], str) and isinstance(self.code["size"], int)):
            raise ValueError("its `code` needs `hash` and `size`")
        if self.repo is not None and not isinstance(self.repo["url"], str):
            raise ValueError("its `repo` needs `url`")
        self.service_port: int | None = document.get("service_port")
        self.keep_port = bool(document.get("keep_port"))
        self.inactivity: float | None = document.get("inactivity")

    @property
    def has_code(self) -> bool:
        """Whether its folder holds anything before it starts."""
        return self.code is not None or self.repo is not None

    def is_same(self, document: dict[str, Any]) -> bool:
        """Whether that asks for the same job, if perhaps with newer credentials for its repository."""
        return _without_credentials(self.document) == _without_credentials(document)


def _without_credentials(document: dict[str, Any]) -> dict[str, Any]:
    repo = document.get("repo")
    if not isinstance(repo, dict):
        return document
    return dict(document, repo=dict(repo, oauth_token=None, private_key=None, url=None))
