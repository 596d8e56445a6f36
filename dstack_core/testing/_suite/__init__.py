"""The conformance suite for backends.

_base         fixtures, and setting cases aside
_rig          what a case works with; cleaning up
_calls        calling hooks as the core does
_requests     requests as the engine renders them
_needs        what a case needs of the cloud or the backend
_contract     the sentences of the contract that cases quote
_messages     what an author reads when a case fails
_money        the spend cap of a live account
_registering, _offering, _creating, _looking, _ending, _failing, _recovering, _machine: the cases
"""

from __future__ import annotations

from dstack_core.testing._suite._creating import CreateCases
from dstack_core.testing._suite._ending import EndCases, StateCases
from dstack_core.testing._suite._failing import ErrorCases
from dstack_core.testing._suite._looking import LookCases
from dstack_core.testing._suite._machine import SequenceCases
from dstack_core.testing._suite._offering import OfferCases
from dstack_core.testing._suite._recovering import EngineCases, RecoveryCases
from dstack_core.testing._suite._registering import RegistrationCases

__all__ = ["BackendSuite"]


class BackendSuite(
    # pytest begins with the last one: what is basic comes first, so that `-x` stops where an author starts.
    SequenceCases,
    EngineCases,
    RecoveryCases,
    ErrorCases,
    StateCases,
    EndCases,
    LookCases,
    CreateCases,
    OfferCases,
    RegistrationCases,
):
    """Holds a backend against its contract. Subclass it, name the backend, and give it a cloud.

    Cases that need an ability which the cloud lacks, or a hook which the backend lacks, are skipped with the reason.
    Each case has an owner of its own and ends all that it made, also when it fails or is interrupted. If the backend's
    object has a method `close`, it is called at the end of the case; the core never calls it.

    Attributes:
        backend: the backend's name. It is found by its entry point.
        aside: cases that are expected to fail, each with the reason: `{"test_…": "why"}`. One that passes fails.
    """


BackendSuite.__module__ = "dstack_core.testing"
