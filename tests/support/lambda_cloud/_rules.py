"""Rules by hand: what Lambda refuses beyond, or in place of, its document. Each is one function, and is counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from tests.support.lambda_cloud import _wares

LARGEST_USER_DATA = 1_000_000
_TAG_KEY = re.compile(r"[a-z][a-z0-9:-]+")
_HOSTNAME = re.compile(r"[a-z0-9][0-9a-z-]{0,62}")
_FIELDS = frozenset(
    {
        "region_name",
        "instance_type_name",
        "ssh_key_names",
        "file_system_names",
        "file_system_mounts",
        "hostname",
        "name",
        "image",
        "user_data",
        "tags",
        "firewall_rulesets",
    }
)


class Account(Protocol):
    """What the rules look at."""

    keys: dict[str, str]


Rule = Callable[[dict[str, Any], Account], str | None]


def no_unknown_field(order: dict[str, Any], _: Account) -> str | None:
    """A launch has no fields but the documented ones."""
    unknown = sorted(order.keys() - _FIELDS)
    return f"Unknown fields: {', '.join(unknown)}" if unknown else None


def region_type_and_key_are_given(order: dict[str, Any], _: Account) -> str | None:
    """Three fields are required."""
    missing = sorted({"region_name", "instance_type_name", "ssh_key_names"} - order.keys())
    return f"Missing fields: {', '.join(missing)}" if missing else None


def exactly_one_ssh_key(order: dict[str, Any], _: Account) -> str | None:
    """No more and no less."""
    return None if len(order["ssh_key_names"]) == 1 else "Exactly one SSH key must be specified"


def name_is_short(order: dict[str, Any], _: Account) -> str | None:
    """At most 64 characters."""
    return None if len(order.get("name", "")) <= 64 else "The name must be 64 characters or fewer"


def hostname_is_one(order: dict[str, Any], _: Account) -> str | None:
    """Lower-case letters, digits and dashes."""
    name = order.get("hostname")
    return None if name is None or _HOSTNAME.fullmatch(name) else f"'{name}' is no hostname"


def user_data_is_small(order: dict[str, Any], _: Account) -> str | None:
    """At most 1 MB."""
    size = len(order.get("user_data", "").encode())
    return None if size <= LARGEST_USER_DATA else "The user data cannot exceed 1MB"


def tags_are_as_allowed(order: dict[str, Any], _: Account) -> str | None:
    """Keys of at most 55 lower-case letters, digits, dashes and colons; values of at most 128 characters."""
    for tag in order.get("tags", ()):
        if not _TAG_KEY.fullmatch(tag["key"]) or len(tag["key"]) > 55:
            return f"'{tag['key']}' is no key of a tag"
        if len(tag["value"]) > 128:
            return f"The value of the tag '{tag['key']}' is too long"
    return None


def tags_differ(order: dict[str, Any], _: Account) -> str | None:
    """No key twice."""
    keys = [tag["key"] for tag in order.get("tags", ())]
    return None if len(keys) == len(set(keys)) else "A key of a tag is there twice"


def image_is_by_id_or_family(order: dict[str, Any], _: Account) -> str | None:
    """One of the two."""
    image = order.get("image")
    return None if image is None or image.keys() in ({"id"}, {"family"}) else "An image has an id or a family"


INVALID: tuple[Rule, ...] = (
    no_unknown_field,
    region_type_and_key_are_given,
    exactly_one_ssh_key,
    name_is_short,
    hostname_is_one,
    user_data_is_small,
    tags_are_as_allowed,
    tags_differ,
    image_is_by_id_or_family,
)
"""Refused with `global/invalid-parameters`."""


def region_exists(order: dict[str, Any], _: Account) -> str | None:
    """It is one of Lambda's."""
    return None if order["region_name"] in _wares.REGIONS else f"Region {order['region_name']}"


def type_exists(order: dict[str, Any], _: Account) -> str | None:
    """It is sold."""
    return None if order["instance_type_name"] in _wares.WARES else f"Instance type {order['instance_type_name']}"


def ssh_key_exists(order: dict[str, Any], account: Account) -> str | None:
    """It was added before."""
    return next((f"SSH key {name}" for name in order["ssh_key_names"] if name not in account.keys), None)


def image_is_of_the_region(order: dict[str, Any], _: Account) -> str | None:
    """An id is of one region."""
    wanted = order.get("image", {}).get("id")
    there = {image["id"] for image in _wares.images() if image["region"]["name"] == order["region_name"]}
    return None if wanted is None or wanted in there else f"Image {wanted}"


def image_family_exists(order: dict[str, Any], _: Account) -> str | None:
    """It has an image."""
    wanted = order.get("image", {}).get("family")
    return None if wanted in (None, *_wares.FAMILIES) else f"Image family {wanted}"


def image_fits_the_processor(order: dict[str, Any], _: Account) -> str | None:
    """An image for ARM boots on ARM alone, and the other way round."""
    wanted = order.get("image", {}).get("id")
    image = next((one for one in _wares.images() if one["id"] == wanted), None)
    arch = _wares.WARES[order["instance_type_name"]].image_arch
    return None if image is None or image["architecture"] == arch else f"Image {wanted} for {arch}"


MISSING: tuple[Rule, ...] = (
    region_exists,
    type_exists,
    ssh_key_exists,
    image_is_of_the_region,
    image_family_exists,
    image_fits_the_processor,
)
"""Refused with `global/object-does-not-exist`."""


def broken(rules: tuple[Rule, ...], order: dict[str, Any], account: Account) -> Iterator[str]:
    """What is said by the rules that an order breaks, one after the other."""
    for rule in rules:
        said = rule(order, account)
        if said is not None:
            yield said
