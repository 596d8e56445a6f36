"""`Client`: the way in.

Every program imports it, so importing it costs nothing: the rest of the client comes with the first object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from os import PathLike

    from dstack_core._client.api import APIClient
    from dstack_core._client.backends import BackendCollection
    from dstack_core._client.repos import RepoCollection
    from dstack_core._client.runs import RunCollection

LOCAL_PROJECT = "main"
"""The one project of a local server."""


class Client:
    """One project on one server: the way to its runs and backends.

    Most programs make one with `Client.from_config()`. It may be used from several threads, and after a fork. It needs
    no closing, but can be closed, and used in a `with` block.

    Args:
        api_client: speaks to the server.
        project_name: the project.
        ssh_identity_file: the private key to log in to instances with, where attaching uses SSH.
    """

    def __init__(
        self, api_client: APIClient, project_name: str, ssh_identity_file: str | PathLike[str] | None = None
    ) -> None:
        # Imported late: see the top of this file.
        from dstack_core._client.backends import BackendCollection
        from dstack_core._client.repos import RepoCollection
        from dstack_core._client.runs import RunCollection

        self._api = api_client
        self._project = project_name
        self._ssh_identity_file = ssh_identity_file
        self._repos = RepoCollection(api_client, project_name)
        self._backends = BackendCollection(api_client, project_name)
        self._runs = RunCollection(api_client, project_name, ssh_identity_file)

    @staticmethod
    def from_config(
        project_name: str | None = None,
        server_url: str | None = None,
        user_token: str | None = None,
        ssh_identity_file: str | PathLike[str] | None = None,
    ) -> Client:
        """A client for the server that is configured, or for the one of this computer.

        With `server_url` and `user_token`, that server. Otherwise a project of `$DSTACK_HOME/config.yml` (by default
        `~/.dstack/config.yml`): the one of that name, or the default one. If that file has no projects, the local
        server, which is started if it does not run; there is nothing to set up for it.

        Args:
            project_name: the project.
            server_url: the server's address, as `http://127.0.0.1:3000`.
            user_token: the token that the server printed when it first started.
            ssh_identity_file: the private key to log in to instances with, where attaching uses SSH.

        Raises:
            ConfigurationError: an argument, or something in the file, cannot be used.
            ServerUnavailableError: the local server does not start; says why.
            VersionMismatchError: the local server is newer than this client.
        """
        from dstack_core._client.api import APIClient

        if server_url is None and user_token is None:
            return _from_file(project_name, ssh_identity_file)
        if server_url is None or user_token is None:
            given, missing = ("user_token", "server_url") if server_url is None else ("server_url", "user_token")
            raise ConfigurationError(f"{given} was given without {missing}. Give both, or none to use config.yml.")
        if project_name is None:
            raise ConfigurationError("The project name is not specified")
        return Client(APIClient(server_url, user_token), project_name, ssh_identity_file)

    @property
    def repos(self) -> RepoCollection:
        """Where the code of runs comes from."""
        return self._repos

    @property
    def backends(self) -> BackendCollection:
        """The backends of the server."""
        return self._backends

    @property
    def runs(self) -> RunCollection:
        """The runs of the project."""
        return self._runs

    @property
    def client(self) -> APIClient:
        """The low-level client, one method per request."""
        return self._api

    @property
    def project(self) -> str:
        """Name of the project."""
        return self._project

    def close(self) -> None:
        """Closes the connections to the server. Runs go on, and so does the server."""
        self._api.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of project '{self._project}', {self._api!r}>"


def _from_file(project_name: str | None, ssh_identity_file: str | PathLike[str] | None) -> Client:
    from dstack_core._client.api import APIClient
    from dstack_core._client.config import choose, config_path, load_projects

    path = config_path()
    projects = load_projects(path)
    if not projects:
        return _local(project_name, ssh_identity_file)
    project = choose(projects, project_name, path)
    return Client(APIClient(project.url, project.token), project.name, ssh_identity_file)


def _local(project_name: str | None, ssh_identity_file: str | PathLike[str] | None) -> Client:
    from dstack_core._client.api import APIClient
    from dstack_core._client.local_server import LocalConnection

    if project_name not in (None, LOCAL_PROJECT):
        raise ConfigurationError(
            f"Project {project_name} is not configured. The local server has one project, '{LOCAL_PROJECT}'; "
            "projects of other servers belong into config.yml, or come with server_url and user_token."
        )
    connection = LocalConnection()
    connection.prepare()
    return Client(APIClient(connection), LOCAL_PROJECT, ssh_identity_file)
