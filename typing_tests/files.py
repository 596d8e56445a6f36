"""Profiles and configurations from files. Needs a server to run."""

from pathlib import Path
from typing import assert_type

from dstack.api import Client, DevEnvironment, Profile, Service, Task
from dstack.api.utils import load_configuration, load_profile


def loaded(client: Client) -> None:
    """What is in a file, and a run of it."""
    profile = load_profile(Path(), profile_name="cheap")
    assert_type(profile, Profile)
    path, configuration = load_configuration(".", work_dir="src", configuration_file="train.yml")
    assert_type(path, str)
    assert_type(configuration, Task | Service | DevEnvironment)
    client.runs.submit(configuration, configuration_path=path, profile=profile)
    client.runs.get_plan(configuration, profile=profile)
