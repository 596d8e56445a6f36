"""Sizes, ranges and what a job asks of a machine."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from dstack_core._models.resources import CPU, GPU, Disk, Memory, Range, Resources
from dstack_core.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "mib"),
    [("24GB", 24576), ("512mb", 512), ("1.5TB", 1572864), (" 8 gb ", 8192), ("0GB", 0), ("0.5GB", 512), ("2GiB", 2048)],
)
def test_a_size_is_kept_in_whole_mib(text: str, mib: int) -> None:
    """Units are binary, in any case, with or without a space, and decimals are allowed."""
    assert Memory(text) == mib


@pytest.mark.parametrize("text", ["24GB", "512MB", "2TB", "1536MB", "0MB"])
def test_a_size_is_written_exactly(text: str) -> None:
    """The text of a size reads back as the same size, in the largest unit that is exact."""
    assert str(Memory(text)) == text
    assert Memory(str(Memory(text))) == Memory(text)


def test_sizes_survive_pickle_and_copy() -> None:
    """A size goes through pickle and deepcopy, although its constructor refuses bare numbers."""
    size = Memory("24GB")
    assert pickle.loads(pickle.dumps(size)) == size  # noqa: S301  # our own bytes
    assert isinstance(copy.deepcopy(size), Memory)


@pytest.mark.parametrize("bare", [24, "24", 0.5, " 7 "])
def test_a_bare_number_for_a_size_is_refused_with_both_spellings(bare: Any) -> None:
    """`memory=24` once meant MB and later GB, so it is refused, and the message has the two ways to say it."""
    number = str(bare).strip()
    with pytest.raises(ConfigurationError) as refusal:
        Resources(memory=bare)
    assert str(refusal.value) == f"Resources: memory: {number} is ambiguous: write '{number}GB' or '{number}MB'"


@pytest.mark.parametrize("field", ["memory", "shm_size", "disk"])
@pytest.mark.parametrize("nonsense", ["lots", "-1GB", "1e3GB", "24 G", "24XB", "", True, [1], "9999999999GB", "٣GB"])
def test_what_is_no_size_is_refused_by_name(field: str, nonsense: Any) -> None:
    """Whatever is not a size names the field it was given for."""
    with pytest.raises(ConfigurationError, match=rf"^Resources: {field}"):
        Resources(**{field: nonsense})


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("2..8", 2, 8), ("4..", 4, None), ("..8", None, 8), (4, 4, None), ("4", 4, None), ("4..4", 4, 4)],
)
def test_a_range_is_read_from_text(text: Any, low: int | None, high: int | None) -> None:
    """A single value is a minimum; two dots make a range; equal ends are exact."""
    assert CPU(count=text).count == Range(min=low, max=high)


def test_a_range_holds_both_its_ends() -> None:
    """Both ends belong to a range, and an open end lets everything through."""
    assert 2 in Range(2, 8)
    assert 8 in Range(2, 8)
    assert 9 not in Range(2, 8)
    assert 1_000_000 in Range(min=2)
    assert 1 in Range(max=2)
    assert 3 not in Range(max=2)


def test_a_range_is_a_value() -> None:
    """Ranges compare and hash by their ends, survive pickle, and cannot be changed."""
    one = Range(2, 8)
    assert one == Range(2, 8) != Range(2)
    assert len({one, Range(2, 8)}) == 1
    assert pickle.loads(pickle.dumps(one)) == one  # noqa: S301  # our own bytes
    with pytest.raises(AttributeError, match="cannot be changed"):
        one.min = 3
    with pytest.raises(AttributeError, match="cannot be changed"):
        del one.max


@pytest.mark.parametrize(
    "nonsense", ["..", "8..2", "a..b", "1..2..3", "-1", -1, 2.5, True, None, {}, {"mim": 2}, "9" * 5000]
)
def test_what_is_no_range_is_refused(nonsense: Any) -> None:
    """Open at both ends, the wrong way round, negative, fractional: all refused by the field's name."""
    with pytest.raises(ConfigurationError, match=r"^CPU: count: "):
        CPU(count=nonsense)


def test_a_range_the_wrong_way_round_is_shown_the_right_way() -> None:
    """The cure of a reversed range is the range itself, turned."""
    with pytest.raises(ConfigurationError, match=r"write '16GB\.\.64GB'"):
        Resources(memory="64GB..16GB")


def test_both_ends_of_a_size_range_need_their_unit() -> None:
    """A unit at one end does not lend itself to the other."""
    with pytest.raises(ConfigurationError, match="24 is ambiguous"):
        Resources(memory="24..80GB")


@pytest.mark.parametrize(
    ("short", "full"),
    [
        (4, {"count": 4}),
        ("4..", {"count": "4.."}),
        ("2..8", {"count": "2..8"}),
        ("arm:8", {"arch": "arm", "count": 8}),
        ("X86:2..4", {"arch": "x86", "count": "2..4"}),
        ("arm", {"arch": "arm"}),
        ({"min": 2, "max": 4}, {"count": "2..4"}),
        (Range(min=4), {"count": 4}),
    ],
)
def test_cpus_have_a_short_form(short: Any, full: dict[str, Any]) -> None:
    """A number, a range, an architecture, or both."""
    assert Resources(cpu=short).cpu == CPU(**full)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        (1, {"count": 1}),
        ("2", {"count": 2}),
        ("A100", {"name": "A100"}),
        ("a100:2", {"name": ["A100"], "count": 2}),
        ("A100,H100:1..4", {"name": ["A100", "H100"], "count": "1..4"}),
        ("24GB", {"memory": "24GB"}),
        ("24GB..", {"memory": "24GB"}),
        ("24GB..80GB:2", {"memory": "24GB..80GB", "count": 2}),
        ("A100:80GB:2", {"name": "A100", "memory": "80GB", "count": 2}),
        ("nvidia:24GB..:2", {"vendor": "nvidia", "memory": "24GB..", "count": 2}),
        ("2 : AMD : MI300X", {"vendor": "amd", "name": "MI300X", "count": 2}),
        ("tpu:v5litepod-8", {"vendor": "google", "name": "V5LITEPOD-8"}),
        ("tt:n150", {"vendor": "tenstorrent", "name": "N150"}),
    ],
)
def test_gpus_have_a_short_form(short: Any, full: dict[str, Any]) -> None:
    """Vendor, names, memory and count in any order, told apart by how they look."""
    assert Resources(gpu=short).gpu == GPU(**full)


def test_a_single_count_is_a_minimum() -> None:
    """`gpu=1`, `GPU(count=2)` and `"A100:2"` ask for at least that many, as at 0.13.0."""
    gpu = Resources(gpu="A100:2").gpu
    assert gpu is not None
    assert gpu.count == GPU(count=2).count == Range(min=2, max=None)
    assert GPU(name="A100").count == Range(min=1)


@pytest.mark.parametrize(
    "nonsense",
    ["A100:H100", "2:4", "24GB:48GB", "nvidia:amd", "", "A100:", "?", True, 1.5, "8GBB", ["A100"], {"nam": "A100"}],
)
def test_what_is_no_gpu_is_refused(nonsense: Any) -> None:
    """A part that is given twice, is empty, or cannot be told, is refused under the field's name."""
    with pytest.raises(ConfigurationError, match=r"^Resources: gpu"):
        Resources(gpu=nonsense)


@pytest.mark.parametrize("written", ["7.5", 7.5, (7, 5), [7, 5]])
def test_compute_capability_is_kept_as_a_pair(written: Any) -> None:
    """Text, number and pair mean the same."""
    assert GPU(compute_capability=written).compute_capability == (7, 5)


@pytest.mark.parametrize("written", [8, "8", 8.0, "8.0"])
def test_compute_capability_needs_no_minor_part(written: Any) -> None:
    """A whole number is that version's first."""
    assert GPU(compute_capability=written).compute_capability == (8, 0)


@pytest.mark.parametrize("nonsense", ["seven", (7,), (7, 5, 1), "7.5.1", "", True, {"major": 7}])
def test_what_is_no_compute_capability_is_refused(nonsense: Any) -> None:
    """The message has the two ways to write one."""
    with pytest.raises(ConfigurationError, match=r"^GPU: compute_capability: .*'7\.5' or \(7, 5\)"):
        GPU(compute_capability=nonsense)


@pytest.mark.parametrize("nonsense", [3, "", [], ["A100", ""], "A100,,H100", {"A100": 1}])
def test_what_is_no_gpu_name_is_refused(nonsense: Any) -> None:
    """Names are text, one or several."""
    with pytest.raises(ConfigurationError, match=r"^GPU: name: "):
        GPU(name=nonsense)


def test_a_disk_is_a_size_or_a_range() -> None:
    """A disk's short form is its size."""
    assert Resources(disk="100GB").disk == Disk(size="100GB..")
    assert Resources(disk=Range(min="50GB", max="200GB")).disk == Disk(size="50GB..200GB")


def test_defaults_are_those_of_the_old_api() -> None:
    """2 CPUs, 8 GB of memory, 100 GB of disk, no GPU, and none of them counts as set."""
    resources = Resources()
    assert resources.cpu == CPU(count=2)
    assert resources.memory == Range(min=Memory("8GB"))
    assert resources.disk == Disk(size="100GB")
    assert resources.gpu is None
    assert resources.shm_size is None
    assert resources.model_fields_set == set()


def test_nothing_can_be_asked_for_explicitly() -> None:
    """`None` is a wish: it takes the default away."""
    resources = Resources(cpu=None, memory=None, disk=None, gpu=None)
    assert (resources.cpu, resources.memory, resources.disk) == (None, None, None)
    assert resources.model_fields_set == {"cpu", "memory", "disk", "gpu"}


def test_resources_are_values() -> None:
    """Resources hash, compare, copy, pickle, and cannot be changed after they were made."""
    one = Resources(gpu="A100:2", memory="24GB..80GB")
    assert one == Resources(gpu="A100:2", memory="24GB..80GB")
    assert len({one, copy.deepcopy(one), pickle.loads(pickle.dumps(one))}) == 1  # noqa: S301  # our own bytes
    with pytest.raises(ConfigurationError, match=r"^Resources: memory: this cannot be changed: make a new one$"):
        one.memory = "8GB"
    with pytest.raises(ConfigurationError, match="did you mean 'memory'"):
        one.memori = "8GB"


def test_an_unknown_field_is_answered_with_the_allowed_ones() -> None:
    """The message names the field, what was probably meant, and everything that is allowed."""
    with pytest.raises(ConfigurationError) as refusal:
        Resources.model_validate({"gpus": 1})
    assert str(refusal.value) == (
        "Resources: unknown field 'gpus' (did you mean 'gpu'?); allowed: cpu, disk, gpu, memory, shm_size"
    )


def test_every_problem_gets_its_line() -> None:
    """All that is wrong is said at once."""
    with pytest.raises(ConfigurationError) as refusal:
        Resources.model_validate({"cpu": "many", "memory": 24, "gpu": {"count": 0.5, "nam": "A100"}})
    assert len(str(refusal.value).splitlines()) == 4
