"""EC2 on this computer: what the unmodified SDK speaks to in tests.

The wire, and most of what is behind it, is moto's; what moto leaves out or does too kindly is done here: tokens of
idempotency, signatures, capacity and quotas, time to boot, pages, prices, and whatever can go wrong.
"""

from __future__ import annotations

from tests.support.ec2._cloud import Ec2

__all__ = ["Ec2"]
