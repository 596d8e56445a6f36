"""What a job needs from a machine: CPUs, memory, GPUs, disk.

Sizes are written with a unit (`"24GB"`, `"512MB"`, `"1.5TB"`; 1 GB is 1024 MB) and kept in whole MiB. A single value is
a minimum; ranges are written `"16GB..64GB"`, `"16GB.."`, `"..64GB"`.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, NoReturn, Self, TypeVar, get_args

from pydantic import BeforeValidator
from pydantic_core import core_schema

from dstack_core._models._base import Accepts, ValueModel, default, shown
from dstack_core.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler

__all__ = ["CPU", "GPU", "Disk", "Memory", "Range", "Resources"]

# ---------------------------------------------------------------------------------------------------------------------
# Sizes and ranges
# ---------------------------------------------------------------------------------------------------------------------

_UNITS = {"M": 1, "G": 1024, "T": 1024 * 1024}
_SIZE = r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([MmGgTt])[Ii]?[Bb]\s*"


class Memory(int):
    """A size in whole MiB, written with its unit: `Memory("24GB") == 24576`.

    Units are MB, GB and TB (1 GB is 1024 MB), in upper or lower case; decimals are allowed, and rounded to whole MB.

    Raises:
        ConfigurationError: there is no unit (a bare number is ambiguous), or it is not a size.
    """

    __slots__ = ()

    def __new__(cls, value: "str | Memory") -> Self:
        return super().__new__(cls, _mib(value))

    @classmethod
    def from_mib(cls, mib: int) -> Self:
        """The size of that many MiB.

        Args:
            mib: the number, whole.
        """
        return super().__new__(cls, mib)

    def __getnewargs__(self) -> Any:
        return (str(self),)

    def __str__(self) -> str:
        unit = next((unit for unit in "TG" if self and int(self) % _UNITS[unit] == 0), "M")
        return f"{int(self) // _UNITS[unit]}{unit}B"

    def __repr__(self) -> str:
        return f"Memory('{self}')"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: "GetCoreSchemaHandler") -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls,
            serialization=core_schema.to_string_ser_schema(when_used="json"),
            json_schema_input_schema=_SIZE_JSON,
        )


def _mib(value: object) -> int:
    if isinstance(value, Memory):
        return int(value)
    match = re.fullmatch(_SIZE, value) if isinstance(value, str) else None
    if match is None:
        raise ConfigurationError(_bad_size(value))
    return round(float(match[1]) * _UNITS[match[2].upper()])


def _bad_size(value: object) -> str:
    text = str(value).strip()
    if not isinstance(value, bool) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        return f"{text} is ambiguous: write '{text}GB' or '{text}MB'"
    return f"{shown(value)} is not a size: write a number with a unit, as '24GB' or '512MB'"


T = TypeVar("T")


class Range(Generic[T]):
    """From `min` to `max`, both included; `None` leaves that end open. Immutable.

    Written as text: `"2..8"`, `"4.."`, `"..8"`; a single value is a minimum (`4` is `"4.."`), an exact one is `"4..4"`.

    Args:
        min: the least that is accepted.
        max: the most that is accepted.

    Raises:
        ConfigurationError: neither end is given, or they are the wrong way round.
    """

    __slots__ = ("max", "min")
    min: T | None
    max: T | None

    def __init__(self, min: T | None = None, max: T | None = None) -> None:
        if min is None and max is None:
            raise ConfigurationError("a range needs a minimum, a maximum or both, as '2..', '..8' or '2..8'")
        if isinstance(min, int | float) and isinstance(max, int | float) and min > max:
            raise ConfigurationError(f"'{min}..{max}' is the wrong way round: write '{max}..{min}'")
        object.__setattr__(self, "min", min)
        object.__setattr__(self, "max", max)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a Range cannot be changed: make a new one instead of setting '{name}'")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Range cannot be changed: '{name}' stays")

    def __reduce__(self) -> Any:
        return Range, (self.min, self.max)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Range) and (self.min, self.max) == (other.min, other.max)

    def __hash__(self) -> int:
        return hash((self.min, self.max))

    def __contains__(self, value: Any) -> bool:
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        low, high = ("" if end is None else str(end) for end in (self.min, self.max))
        return f"{low}..{high}"

    def __repr__(self) -> str:
        return f"Range(min={self.min!r}, max={self.max!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: "GetCoreSchemaHandler") -> core_schema.CoreSchema:
        read, end = _ENDS[(get_args(source) or (int,))[0]]
        return core_schema.no_info_plain_validator_function(
            partial(_range_of, read),
            serialization=core_schema.to_string_ser_schema(when_used="json"),
            json_schema_input_schema=_range_json(end),
        )


def _range_of(read: Callable[[Any], T], value: Any) -> Range[T]:
    low, high = _ends(value)
    return Range(min=None if low is None else read(low), max=None if high is None else read(high))


def _ends(value: Any) -> tuple[Any, Any]:
    if isinstance(value, Range):
        return value.min, value.max
    if isinstance(value, Mapping) and value.keys() <= {"min", "max"}:
        return value.get("min"), value.get("max")
    if isinstance(value, str) and ".." in value:
        low, _, high = value.partition("..")
        return low.strip() or None, high.strip() or None
    if value is None:
        raise ConfigurationError("None is not a value here: write a minimum ('4') or a range ('2..8')")
    return value, None


_MOST = 1_000_000_000


def _count(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST:
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        return int(value)
    raise ConfigurationError(f"{shown(value)} is not a whole number of 0 or more: write '4', '4..', '..8' or '2..8'")


_SIZE_JSON = core_schema.str_schema(pattern=f"^{_SIZE}$")
_RANGE_JSON = core_schema.str_schema(pattern=r"\.\.")
_DIGITS_JSON = core_schema.str_schema(pattern=r"^\s*[0-9]{1,9}\s*$")
_ENDS: dict[Any, tuple[Callable[[Any], Any], list[Any]]] = {
    int: (_count, [core_schema.int_schema(ge=0, le=_MOST), _DIGITS_JSON]),
    Memory: (Memory, [_SIZE_JSON]),
}


def _range_json(end: list[Any]) -> core_schema.CoreSchema:
    either = core_schema.typed_dict_field(core_schema.union_schema([*end, core_schema.none_schema()]), required=False)
    ends = core_schema.typed_dict_schema({"min": either, "max": either}, extra_behavior="forbid")
    return core_schema.union_schema([*end, _RANGE_JSON, ends])


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a machine
# ---------------------------------------------------------------------------------------------------------------------


class CPU(ValueModel):
    """CPUs of a machine. Short form: `4`, `"4.."`, `"2..8"`, `"arm:8"`, `"arm"`.

    Attributes:
        count: how many; a single number is a minimum. 2 or more if not set.
        arch: `"x86"`, `"arm"`, or `None` for any.
    """

    count: Accepts[Range[int], int | str] = default(Range(min=2))
    arch: Literal["x86", "arm"] | None = None

    @classmethod
    def parse(cls, text: int | str) -> Self:
        """Reads the short form.

        Args:
            text: as `4`, `"2..8"` or `"arm:8"`.

        Raises:
            ConfigurationError: it cannot be read.
        """
        return cls(**_cpu_fields(text))


def _cpu_fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, str):
        return {"count": value}
    arch, colon, count = (part.strip() for part in value.lower().partition(":"))
    if arch in ("x86", "arm") and (count or not colon):
        return {"arch": arch} | ({"count": count} if colon else {})
    return {"count": value}


Vendor = Literal["nvidia", "amd", "google", "intel", "tenstorrent"]
_VENDORS = {name: name for name in get_args(Vendor)} | {"tpu": "google", "tt": "tenstorrent"}


def _vendor(value: Any) -> Any:
    return _VENDORS.get(value.strip().lower(), value) if isinstance(value, str) else value


def _names(value: Any) -> tuple[str, ...] | None:
    names = value.split(",") if isinstance(value, str) else value
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise ConfigurationError(f"{shown(value)} is not a GPU name or a list of them, as 'A100' or ['A100', 'H100']")
    return tuple(name.strip().upper() for name in names)


def _capability(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    text = ".".join(map(str, value)) if isinstance(value, list | tuple) and len(value) == 2 else str(value)
    match = re.fullmatch(r"\s*([0-9]{1,3})(?:\.([0-9]{1,3}))?\s*", text)
    if match is None:
        raise ConfigurationError(f"{shown(value)} is not a compute capability: write it as '7.5' or (7, 5)")
    return int(match[1]), int(match[2] or 0)


class GPU(ValueModel):
    """GPUs of a machine.

    Short form: parts in any order with colons between, as `"A100"`, `"A100:2"`, `"A100,H100:1..4"`, `"24GB.."`,
    `"nvidia:24GB..80GB:2"`, or only a number.

    Attributes:
        vendor: `"nvidia"`, `"amd"`, `"google"` (or `"tpu"`), `"intel"`, `"tenstorrent"` (or `"tt"`), or `None` for any.
        name: acceptable names, as `"A100"` or `["A100", "H100"]`; kept as a tuple in upper case. `None` for any.
        count: how many; a single number is a minimum. 1 or more if not set.
        memory: memory of each GPU, as `"24GB"` or `"24GB..80GB"`; a single size is a minimum.
        total_memory: memory of all GPUs together.
        compute_capability: the least compute capability (NVIDIA), as `7.5`, `"7.5"` or `(7, 5)`; kept as a tuple.
    """

    vendor: Annotated[
        Accepts[Vendor | None, Literal["tpu", "tt"]], BeforeValidator(_vendor, json_schema_input_type=str | None)
    ] = default(None)
    name: Annotated[
        Accepts[tuple[str, ...] | None, str | list[str]],
        BeforeValidator(_names, json_schema_input_type=str | list[str] | None),
    ] = default(None)
    count: Accepts[Range[int], int | str] = default(Range(min=1))
    memory: Accepts[Range[Memory] | None, str] = default(None)
    total_memory: Accepts[Range[Memory] | None, str] = default(None)
    compute_capability: Annotated[
        Accepts[tuple[int, int] | None, float | str | list[int]],
        BeforeValidator(_capability, json_schema_input_type=float | str | tuple[int, int] | None),
    ] = default(None)

    @classmethod
    def parse(cls, text: int | str) -> Self:
        """Reads the short form.

        Args:
            text: as `1`, `"A100:2"`, `"24GB.."` or `"A100:80GB:2"`.

        Raises:
            ConfigurationError: it cannot be read.
        """
        return cls(**_gpu_fields(text))


def _gpu_fields(value: Any) -> dict[str, Any]:
    if not isinstance(value, str):
        return {"count": value}
    fields: dict[str, Any] = {}
    for part in map(str.strip, value.split(":")):
        field = _gpu_field(part)
        if field in fields:
            raise ConfigurationError(
                f"{shown(value)} gives the {field} of the GPU twice, '{fields[field]}' and '{part}': "
                "write 'A100', 'A100,H100', 'A100:2', '24GB' or 'A100:80GB:2'"
            )
        fields[field] = part
    return fields


def _gpu_field(part: str) -> str:
    if part.lower() in _VENDORS:
        return "vendor"
    if part[:1].isalpha():
        return "name"
    return "memory" if re.search("[a-zA-Z]", part) else "count"


class Disk(ValueModel):
    """The disk of a machine. Short form: `"100GB"`, `"100GB.."`, `"50GB..200GB"`.

    Attributes:
        size: how large; a single size is a minimum.
    """

    size: Accepts[Range[Memory], str]


def _short(model: Any, fields: Callable[[Any], dict[str, Any]], written_as: Any) -> BeforeValidator:
    """Lets a field of type `model` be given in its short form, or as a bare range."""

    def read(value: Any) -> Any:
        is_range = isinstance(value, Range) or (isinstance(value, dict) and value and value.keys() <= {"min", "max"})
        return fields(value) if is_range or isinstance(value, str | int | float) else value

    return BeforeValidator(read, json_schema_input_type=model | written_as | None)


class Resources(ValueModel):
    """What a job needs. Every single value is a minimum; `"4..4"` is exact.

    A field that is not set has a default that sizes machines which are made to order; of a machine that exists
    already, as this computer, it asks for nothing. A field that is set to `None` asks for nothing anywhere.

    Attributes:
        cpu: CPUs, as `4`, `"2..8"`, `"arm:8"` or `CPU(...)`. Default: 2 or more.
        memory: memory, as `"16GB"` or `"16GB..64GB"`. Default: 8 GB or more.
        gpu: GPUs, as `1`, `"A100:2"`, `"24GB.."` or `GPU(...)`. Default: none needed.
        shm_size: shared memory of the container, as `"1GB"`. Default: the container engine's.
        disk: disk, as `"100GB"`, `"100GB..500GB"` or `Disk(...)`. Default: 100 GB or more.

    Raises:
        ConfigurationError: a value cannot be read. A size without a unit (`memory=24`) is refused as ambiguous.
    """

    cpu: Annotated[Accepts[CPU | None, int | str | Range[int]], _short(CPU, _cpu_fields, Range[int] | str)] = default(
        CPU.model_construct(set())
    )
    memory: Accepts[Range[Memory] | None, str | Range[str]] = default(Range(min=Memory("8GB")))
    gpu: Annotated[Accepts[GPU | None, int | str | Range[int]], _short(GPU, _gpu_fields, Range[int] | str)] = default(
        None
    )
    shm_size: Accepts[Memory | None, str] = default(None)
    disk: Annotated[
        Accepts[Disk | None, str | Range[str]], _short(Disk, lambda size: {"size": size}, Range[Memory])
    ] = default(Disk.model_construct({"size"}, size=Range(min=Memory("100GB"))))


def merged(base: Resources, over: Resources) -> Resources:
    """What both ask for; where both say something, `over` wins."""
    given = {name: getattr(base, name) for name in base.model_fields_set}
    return Resources(**given | {name: getattr(over, name) for name in over.model_fields_set})
