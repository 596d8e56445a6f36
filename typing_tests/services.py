"""What a running service has. Needs a server to run."""

from collections.abc import Iterator
from typing import assert_type

from dstack.api import Client, Service


def reached(client: Client) -> None:
    """A service's address, its model, and the output of one replica."""
    run = client.runs.submit(Service(port=8000, commands=["python serve.py"], replicas=2, model="llama"))
    assert_type(run.wait_until_ready(timeout=60), bool)
    assert_type(run.url, str | None)
    assert_type(run.service_url, str | None)
    model = run.service_model
    if model is not None:
        assert_type(model.name, str)
        assert_type(model.url, str)
    assert_type(run.logs(replica_num=1), Iterator[bytes])
