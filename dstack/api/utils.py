"""Reading the files that people keep beside their code: profiles, and configurations of runs."""

from dstack_core._client.files import load_configuration, load_profile

load_configuration.__module__ = load_profile.__module__ = __name__

__all__ = ["load_configuration", "load_profile"]
