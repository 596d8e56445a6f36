"""What Azure refuses beyond single fields. Each rule is one function; the README counts them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable
from typing import Any

from tests.support.azure import _wares
from tests.support.azure._wire import Refused

Body = dict[str, Any]
Find = Callable[[str], Body | None]
"""A resource by its id."""

_RESERVED = frozenset({"administrator", "admin", "root", "user", "guest", "test", "sys", "backup", "support", "server"})
_SUBNET = re.compile(r"(.*/virtualNetworks/[^/]+)/subnets/([^/]+)$", re.IGNORECASE)
_IMAGES = {
    ("canonical", "ubuntu-24_04-lts", "server"): ("x86", "V2", 30),
    ("canonical", "ubuntu-24_04-lts", "server-gen1"): ("x86", "V1", 30),
    ("canonical", "ubuntu-24_04-lts", "server-arm64"): ("arm", "V2", 30),
    ("microsoft-dsvm", "ubuntu-hpc", "2204"): ("x86", "V2", 64),
    ("microsoft-dsvm", "ubuntu-hpc", "2404-arm64"): ("arm", "V2", 64),
}
"""Architecture, generation, GiB."""


class Wrong(Exception):
    """Args: what Azure says, and its code."""

    def __init__(self, words: str, code: str = "InvalidParameter") -> None:
        super().__init__(words)
        self.code = code


def check_machine(name: str, body: Body, find: Find) -> None:
    """Refuses a machine that Azure would refuse.

    Raises:
        Refused: with what is wrong.
    """
    _check(MACHINE_RULES, name, body, find)


def check_network(name: str, body: Body, find: Find) -> None:
    """The same for a network."""
    _check(NETWORK_RULES, name, body, find)


def check_rules(name: str, body: Body, find: Find) -> None:
    """The same for a security group."""
    _check(GROUP_RULES, name, body, find)


def _check(rules: Iterable[Callable[[str, Body, Find], None]], name: str, body: Body, find: Find) -> None:
    for rule in rules:
        try:
            rule(name, body, find)
        except Wrong as wrong:
            raise Refused(400, wrong.code, str(wrong)) from None


def _size(body: Body) -> str:
    return str(body["properties"].get("hardwareProfile", {}).get("vmSize", ""))


def _os(body: Body) -> Body:
    return dict(body["properties"].get("osProfile") or {})


def _cards(body: Body) -> list[Body]:
    return list((body["properties"].get("networkProfile") or {}).get("networkInterfaceConfigurations") or ())


def _addresses(body: Body) -> list[Body]:
    return [one for card in _cards(body) for one in (card.get("properties") or {}).get("ipConfigurations") or ()]


# -- of everything ----------------------------------------------------------------------------------------------------


def _place(_: str, body: Body, __: Find) -> None:
    """The location exists."""
    if body.get("location") not in _wares.REGIONS:
        raise Wrong(
            f"The provided location '{body.get('location')}' is not available.", "LocationNotAvailableForResourceType"
        )


def _tags(_: str, body: Body, __: Find) -> None:
    """At most 50 tags, of limited length, without odd characters in their names."""
    tags = body.get("tags") or {}
    if len(tags) > 50:
        raise Wrong("The maximum of tags is 50.", "InvalidTags")
    for key, value in tags.items():
        if len(key) > 512 or len(value) > 256 or re.search(r"[<>%&\\?/]", key):
            raise Wrong(f"The tag name '{key}' or its value is invalid.", "InvalidTagNameCharacters")


# -- of machines ------------------------------------------------------------------------------------------------------


def _name(name: str, _: Body, __: Find) -> None:
    """1 to 64 letters, digits, dots, dashes."""
    if not re.fullmatch(r"[A-Za-z0-9]([\w.-]{0,62}\w)?", name):
        raise Wrong("The name of the virtual machine is invalid.", "InvalidResourceName")


def _known_size(_: str, body: Body, __: Find) -> None:
    """The size exists."""
    if _size(body) not in _wares.WARES:
        raise Wrong(f"The value {_size(body)} provided for the VM size is not valid.")


def _zones(_: str, body: Body, __: Find) -> None:
    """At most one zone, which the region has."""
    zones = body.get("zones") or []
    if len(zones) > 1:
        raise Wrong("Virtual machines can be in one zone.", "InvalidAvailabilityZone")
    if any(zone not in _wares.ZONED[body["location"]] for zone in zones):
        raise Wrong(f"The zone(s) '{zones}' are not supported.", "AvailabilityZoneNotSupported")


def _size_in_zone(_: str, body: Body, __: Find) -> None:
    """The size is sold in that zone."""
    for zone in body.get("zones") or []:
        if zone not in _wares.zones_of(_size(body), body["location"]):
            raise Wrong(f"The requested size {_size(body)} is not available in zone {zone}.", "SkuNotAvailable")


def _image(_: str, body: Body, __: Find) -> None:
    """A disk from an image needs one, named in full."""
    storage = body["properties"].get("storageProfile") or {}
    disk, image = storage.get("osDisk") or {}, storage.get("imageReference") or {}
    ids = {"id", "sharedGalleryImageId", "communityGalleryImageId"} & image.keys()
    if (
        disk.get("createOption") == "FromImage"
        and not ids
        and not {"publisher", "offer", "sku", "version"} <= image.keys()
    ):
        raise Wrong("Required parameter 'imageReference' is missing or incomplete.")
    if ids and {"publisher", "offer", "sku"} & image.keys():
        raise Wrong("imageReference.id cannot go with publisher, offer and sku.")


def _known_image(body: Body) -> tuple[str, str, int] | None:
    image = body["properties"]["storageProfile"].get("imageReference") or {}
    if "publisher" not in image:
        return None
    key = tuple(str(image[part]).lower() for part in ("publisher", "offer", "sku"))
    if key not in _IMAGES:
        raise Wrong(f"The platform image '{':'.join(key)}' is not available.", "PlatformImageNotFound")
    return _IMAGES[key]


def _architecture(_: str, body: Body, __: Find) -> None:
    """The image is of the machine's architecture."""
    image = _known_image(body)
    if image is not None and image[0] != _wares.WARES[_size(body)].machine[2]:
        raise Wrong("The architecture of the image does not match that of the VM size.", "BadRequest")


def _generation(_: str, body: Body, __: Find) -> None:
    """The machine boots images of that generation."""
    image = _known_image(body)
    if image is not None and image[1] not in _wares.WARES[_size(body)].generations:
        raise Wrong(f"The selected VM size cannot boot Hypervisor Generation '{image[1][1]}'.", "BadRequest")


def _disk_size(_: str, body: Body, __: Find) -> None:
    """The disk holds the image, and is not larger than a system's disk may be."""
    size = body["properties"]["storageProfile"]["osDisk"].get("diskSizeGB")
    image = _known_image(body)
    if size is not None and not (image[2] if image else 1) <= size <= 4095:
        raise Wrong(f"The value '{size}' of disk size is out of range.", "InvalidParameter")


def _system(_: str, body: Body, __: Find) -> None:
    """A system from an image has a name, and a user whose name is not reserved."""
    system = _os(body)
    if not system.get("computerName") or not system.get("adminUsername"):
        raise Wrong("Required parameter 'osProfile.computerName' or 'adminUsername' is missing.")
    if system["adminUsername"].lower() in _RESERVED:
        raise Wrong(f"The Admin Username specified is not allowed: {system['adminUsername']}.")


def _host_name(_: str, body: Body, __: Find) -> None:
    """A host's name."""
    if not re.fullmatch(r"(?!\d+$)[A-Za-z0-9]([A-Za-z0-9-]{0,62}[A-Za-z0-9])?", _os(body)["computerName"]):
        raise Wrong("Linux host name is invalid.", "InvalidParameter")


def _keys(_: str, body: Body, __: Find) -> None:
    """Somebody can log in: without passwords there are keys."""
    linux = _os(body).get("linuxConfiguration") or {}
    keys = (linux.get("ssh") or {}).get("publicKeys") or []
    if not keys and (linux.get("disablePasswordAuthentication") or "adminPassword" not in _os(body)):
        raise Wrong("Authentication using either SSH or by user name and password must be enabled.")


def _key_places(_: str, body: Body, __: Find) -> None:
    """Keys are put where sshd looks, and are of a kind that Azure takes."""
    linux = _os(body).get("linuxConfiguration") or {}
    for key in (linux.get("ssh") or {}).get("publicKeys") or []:
        if key.get("path") != f"/home/{_os(body)['adminUsername']}/.ssh/authorized_keys":
            raise Wrong("Destination path for SSH public keys is currently limited to its default value.")
        if not re.match(r"ssh-(rsa|ed25519) [A-Za-z0-9+/=]+", key.get("keyData", "")):
            raise Wrong("The value of parameter linuxConfiguration.ssh.publicKeys.keyData is invalid.")


def _custom_data(_: str, body: Body, __: Find) -> None:
    """In base64, at most 64 KB."""
    text = _os(body).get("customData") or ""
    try:
        size = len(base64.b64decode(text, validate=True))
    except binascii.Error:
        raise Wrong("Custom data in OSProfile must be in Base64 encoding.") from None
    if size > 65535:
        raise Wrong("Custom data in OSProfile must be with a maximum length of 87380 characters.")


def _one_way_to_the_network(_: str, body: Body, __: Find) -> None:
    """Interfaces that are there, or interfaces to be made; those with the version of the network's interface."""
    profile = body["properties"].get("networkProfile") or {}
    if bool(profile.get("networkInterfaces")) == bool(profile.get("networkInterfaceConfigurations")):
        raise Wrong("Give either networkInterfaces or networkInterfaceConfigurations.", "InvalidRequestFormat")
    if profile.get("networkInterfaceConfigurations") and not profile.get("networkApiVersion"):
        raise Wrong("networkApiVersion is required with networkInterfaceConfigurations.")


def _primary(_: str, body: Body, __: Find) -> None:
    """Of several interfaces or addresses one is the first."""
    for found in (_cards(body), _addresses(body)):
        if len(found) > 1 and sum(bool((one.get("properties") or {}).get("primary")) for one in found) != 1:
            raise Wrong("Exactly one has to be primary.", "InvalidRequestFormat")


def _subnet(_: str, body: Body, find: Find) -> None:
    """The subnet is there, ready, and in the machine's location."""
    for address in _addresses(body):
        subnet = str(((address.get("properties") or {}).get("subnet") or {}).get("id", ""))
        match = _SUBNET.match(subnet)
        vnet = find(match.group(1)) if match else None
        names = [one["name"] for one in vnet["properties"].get("subnets", ())] if vnet else []
        if vnet is None or match is None or match.group(2) not in names:
            raise Wrong(f"Resource {subnet} referenced by the machine was not found.", "InvalidResourceReference")
        if vnet["location"] != body["location"]:
            raise Wrong("The network is not in the machine's location.", "InvalidResourceReference")
        if vnet["properties"]["provisioningState"] != "Succeeded":
            raise Refused(429, "ReferencedResourceNotProvisioned", f"{subnet} is not in Succeeded state.")


def _addresses_are_standard(_: str, body: Body, __: Find) -> None:
    """Public addresses are Standard, and those are static."""
    for address in _addresses(body):
        public = (address.get("properties") or {}).get("publicIPAddressConfiguration")
        if public is None:
            continue
        if (public.get("sku") or {}).get("name") != "Standard":
            raise Wrong("Basic public addresses cannot be made any more.", "BasicSkuPublicIPNotAllowed")
        if (public.get("properties") or {}).get("publicIPAllocationMethod") != "Static":
            raise Wrong(
                "Standard sku publicIp must have AllocationMethod set to Static.", "PublicIPStandardMustBeStatic"
            )


def _spot(_: str, body: Body, __: Find) -> None:
    """What is for spot goes with spot, and the size is sold so."""
    properties = body["properties"]
    spot = properties.get("priority") in ("Spot", "Low")
    if not spot and ("evictionPolicy" in properties or "billingProfile" in properties):
        raise Wrong("Eviction policy and max price can be set only for Azure Spot Virtual Machines.")
    if spot and not _wares.WARES[_size(body)].spot:
        raise Wrong(f"The VM size '{_size(body)}' is not available as Spot.", "OperationNotAllowed")


MACHINE_RULES = (
    _name,
    _place,
    _tags,
    _known_size,
    _zones,
    _size_in_zone,
    _image,
    _architecture,
    _generation,
    _disk_size,
    _system,
    _host_name,
    _keys,
    _key_places,
    _custom_data,
    _one_way_to_the_network,
    _primary,
    _subnet,
    _addresses_are_standard,
    _spot,
)


# -- of networks ------------------------------------------------------------------------------------------------------


def _inside(_: str, body: Body, __: Find) -> None:
    """Each subnet lies in the network's range."""
    from ipaddress import ip_network

    spaces = [ip_network(one) for one in body["properties"].get("addressSpace", {}).get("addressPrefixes", ())]
    if not spaces:
        raise Wrong("Address space is required.", "InvalidRequestFormat")
    for subnet in body["properties"].get("subnets") or ():
        inner = ip_network(subnet["properties"]["addressPrefix"])
        if not any(inner.subnet_of(space) for space in spaces):  # type: ignore[arg-type]  # all are of version 4
            raise Wrong(f"Subnet '{subnet['name']}' is not valid in virtual network.", "NetcfgSubnetRangeOutsideVnet")


def _group_there(_: str, body: Body, find: Find) -> None:
    """The security group of a subnet is there, in the same location."""
    for subnet in body["properties"].get("subnets") or ():
        group = (subnet["properties"].get("networkSecurityGroup") or {}).get("id")
        found = find(group) if group else None
        if group and (found is None or found["location"] != body["location"]):
            raise Wrong(f"Resource {group} was not found.", "InvalidResourceReference")


NETWORK_RULES = (_place, _tags, _inside, _group_there)


def _priorities(_: str, body: Body, __: Find) -> None:
    """Rules have priorities from 100 to 4096, no two the same."""
    found = [rule["properties"].get("priority", 0) for rule in body["properties"].get("securityRules") or ()]
    if len(set(found)) != len(found) or not all(100 <= one <= 4096 for one in found):
        raise Wrong("Security rules have invalid priorities.", "SecurityRuleInvalidPriority")


def _ends(_: str, body: Body, __: Find) -> None:
    """Rules say from where, to where, and on which port."""
    for rule in body["properties"].get("securityRules") or ():
        for side in ("source", "destination"):
            single, several = f"{side}AddressPrefix", f"{side}AddressPrefixes"
            if not {single, several} & rule["properties"].keys():
                raise Wrong(f"Security rule must specify {single}.", "SecurityRuleMissingAddress")


GROUP_RULES = (_place, _tags, _priorities, _ends)
