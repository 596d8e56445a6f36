"""Errors: which are caught by which, and what they know."""

from dstack.api import (
    AttachError,
    BackendNotInstalledError,
    Client,
    ClientError,
    ConfigurationError,
    DstackError,
    NoOffersError,
    NotFoundError,
    PortUsedError,
    Run,
    RunNameTakenError,
    ServerClientError,
    ServerUnavailableError,
    Task,
    VersionMismatchError,
)


def submitted(client: Client) -> Run | None:
    """A submit that says what went wrong."""
    try:
        return client.runs.submit(Task(commands=["true"], ports=[8080]), run_name="train")
    except PortUsedError as error:
        port: int = error.port
        holder: str | None = error.holder
        print(port, holder)
    except (NoOffersError, RunNameTakenError) as error:
        print(error.code)
    except (ServerUnavailableError, VersionMismatchError) as error:
        print(error)
    except ConfigurationError as error:
        wrong: ValueError = error
        print(wrong)
    return None


def kinds() -> None:
    """Each error is one of a wider kind."""
    wide: list[type[DstackError]] = [ClientError, ConfigurationError]
    client: list[type[ClientError]] = [AttachError, PortUsedError, ServerClientError, ServerUnavailableError]
    server: list[type[ServerClientError]] = [NoOffersError, NotFoundError, RunNameTakenError]
    configuration: list[type[ConfigurationError]] = [BackendNotInstalledError]
    print(wide, client, server, configuration)
