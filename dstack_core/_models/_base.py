"""What all models that people write have in common: strictness, readable errors, and knowing what was set."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from dstack_core.errors import ConfigurationError

__all__ = ["Accepts", "Items", "TaggedModel", "UserModel", "ValueModel", "default", "explain", "shown"]

Stored = TypeVar("Stored")
Given = TypeVar("Given")
Item_co = TypeVar("Item_co", covariant=True)

if TYPE_CHECKING:

    class Accepts(Generic[Stored, Given]):
        """The type of a field that holds `Stored` and may also be given as `Given`, for type checkers."""

        def __get__(self, instance: object, owner: type | None = None) -> Stored: ...
        def __set__(self, instance: object, value: Stored | Given) -> None: ...

    class Items(Protocol[Item_co]):
        """A list or tuple of mixed items, for type checkers. Not text, which cannot be asked for any object."""

        def __contains__(self, item: object, /) -> bool: ...
        def __iter__(self) -> Iterator[Item_co]: ...
        def __len__(self) -> int: ...
else:
    Items = list

    class Accepts:
        """At run time, `Accepts[Stored, Given]` is `Stored`."""

        def __class_getitem__(cls, types: tuple[Any, Any]) -> Any:
            return types[0]


def default(value: object, *, repr: bool = True) -> Any:
    """The default of a field annotated with `Accepts`."""
    return Field(default=value, repr=repr)


class UserModel(BaseModel):
    """Base of every model that a person writes.

    Unknown fields are refused. What does not fit raises `ConfigurationError` with one line per problem; values that
    may be secret are not repeated. As JSON, a model is exactly what was set on it, so that reading it back gives an
    equal model with the same `model_fields_set`.
    """

    model_config = ConfigDict(extra="forbid", defer_build=True, hide_input_in_errors=True)

    def __init__(self, /, **data: Any) -> None:
        try:
            self.__pydantic_validator__.validate_python(data, self_instance=self)
        except ValidationError as error:
            _refuse(error, type(self))

    # Tells pydantic that this __init__ only forwards, so that nested models are built without calling it.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]  # pydantic's own mark on the function

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).model_fields:
            raise ConfigurationError(f"{type(self).__name__}: {_unknown(name, [type(self)])}")
        before = dict(self.__dict__), set(self.__pydantic_fields_set__)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            # A check across fields runs after the assignment, which must not stay.
            object.__setattr__(self, "__dict__", before[0])
            object.__setattr__(self, "__pydantic_fields_set__", before[1])
            _refuse(error, type(self))

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Reads a model from a dictionary.

        Args:
            obj: the dictionary, with the fields as keys.
            options: as for pydantic's method of this name.

        Raises:
            ConfigurationError: what does not fit, one line per problem.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            _refuse(error, cls)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Reads a model from JSON.

        Args:
            json_data: the JSON document.
            options: as for pydantic's method of this name.

        Raises:
            ConfigurationError: what does not fit, one line per problem.
        """
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            _refuse(error, cls)

    # Without a return type: one would take the place of the model's JSON Schema.
    @model_serializer(mode="wrap", when_used="json")
    def _only_what_was_set(self, handler: SerializerFunctionWrapHandler):  # type: ignore[no-untyped-def]  # noqa: ANN202  # see above
        # A list or dictionary that was filled in place counts as set, too.
        filled = {name for name, value in self.__dict__.items() if value and isinstance(value, list | dict)}
        self.__pydantic_fields_set__.update(filled)
        written = handler(self)
        return {name: written[name] for name in written if name in self.__pydantic_fields_set__}


class ValueModel(UserModel):
    """Base of models that are values: they cannot be changed, and are hashable if their fields are."""

    model_config = ConfigDict(frozen=True)


class TaggedModel(ValueModel):
    """Base of models that stand in a union and are told apart by `type`, which is therefore always written."""

    @model_validator(mode="after")
    def _type_counts_as_set(self) -> Self:
        self.__pydantic_fields_set__.add("type")
        return self


def shown(value: object) -> str:
    """A value as an error message repeats it: short, and on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def explain(
    error: ValidationError,
    model: type[BaseModel],
    title: str | Callable[[tuple[str | int, ...]], str] | None = None,
    noun: str = "field",
) -> str:
    """What is wrong with a document that should be a `model`: one line per problem, without values that may be secret.

    Args:
        error: what pydantic said.
        model: the model the document was read as.
        title: what each line starts with, before the path; the model's name if not given. Or a function that says all
            that comes before the problem, of a place as pydantic writes it.
        noun: what those who wrote the document call a field.
    """
    problems: dict[str, list[str]] = {}
    for details in _without_other_choices(error.errors(include_url=False)):
        path, problem = _problem(details, model, noun)
        prefix = title(details["loc"]) if callable(title) else _prefix(title or model.__name__, path)
        problems.setdefault(prefix, []).append(problem)
    lines = [_line(prefix, texts, f"unknown {noun}") for prefix, texts in problems.items()]
    return "\n".join(line for group in lines for line in group)


def _without_other_choices(problems: list[Any]) -> list[Any]:
    """Of a mapping that may also be something else, as text or a flag, what is wrong in it is all there is to say."""

    def is_other_choice(details: Any) -> bool:
        loc = details["loc"]
        around = (other["loc"] for other in problems if other["loc"] != loc and len(other["loc"]) > len(loc))
        mapping = isinstance(details["input"], dict) and details["type"].endswith(("_type", "_parsing"))
        return mapping and any(deeper[: len(loc) - 1] == loc[:-1] for deeper in around)

    return [details for details in problems if not is_other_choice(details)]


def _prefix(title: str, path: str) -> str:
    return f"{title}: {path}" if path else title


def _line(prefix: str, texts: list[str], apart: str) -> list[str]:
    unknown = [f"{prefix}: {text}" for text in texts if text.startswith(apart)]
    other = dict.fromkeys(text for text in texts if not text.startswith(apart))
    return [*unknown, *([f"{prefix}: {', or '.join(other)}"] if other else [])]


def _problem(details: Any, model: type[BaseModel], noun: str) -> tuple[str, str]:
    kind, loc = details["type"], details["loc"]
    if kind == "extra_forbidden":
        path, owners = _walk(model, loc[:-1])
        return path, _unknown(str(loc[-1]), owners, noun)
    return _walk(model, loc)[0], _text(details)


def _text(details: Any) -> str:
    context = details.get("ctx", {})
    match details["type"]:
        case "missing":
            return "this field is required"
        case "frozen_instance":
            return "this cannot be changed: make a new one"
        case "value_error":
            return str(context["error"])
        case "union_tag_not_found":
            return f"{context['discriminator']} is required"
        case "union_tag_invalid":
            return f"{context['discriminator']} should be one of {context['expected_tags']}"
        case _:
            message = str(details["msg"])
            return message[:1].lower() + message[1:] + _given(details["input"], details["loc"])


def _unknown(name: str, models: list[type[BaseModel]], noun: str = "field") -> str:
    allowed = sorted({field for model in models for field in model.model_fields})
    if not allowed:
        return f"unknown {noun} {shown(name)}"
    from difflib import get_close_matches

    near = get_close_matches(name, allowed, n=1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    return f"unknown {noun} {shown(name)}{hint}; allowed: {', '.join(allowed)}"


_MAY_BE_SECRET = frozenset(
    {"env", "registry_auth", "username", "password", "commands", "setup", "init", "headers", "body"}
)


def _given(value: object, loc: tuple[str | int, ...]) -> str:
    """The value, if it is simple and cannot be a secret."""
    if not loc or _MAY_BE_SECRET.intersection(loc) or not isinstance(value, str | int | float):
        return ""
    return f", not {shown(value)}"


def _walk(model: type[BaseModel], loc: tuple[str | int, ...]) -> tuple[str, list[type[BaseModel]]]:
    """The path of a place in a document as a person writes it, and the models that may stand there.

    Leaves out the names of union members, which pydantic puts between the fields.
    """
    path, here = "", [model]
    fields: dict[str, Any] = {}
    annotation: Any = model
    for step in loc:
        fields = {name: field for owner in here for name, field in owner.model_fields.items()}
        members = [owner for owner in here if _is_named(owner, step)]
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in fields:
            annotation = fields[step].annotation
            path, here = f"{path}.{step}", _models_in(annotation)
        elif members:
            here = members
        elif "dict[" in str(annotation):
            path += f".{step}"
    return path.removeprefix("."), here


def _is_named(model: type[BaseModel], step: str | int) -> bool:
    tags = [get_args(field.annotation) for name, field in model.model_fields.items() if name in ("type", "format")]
    return step == model.__name__ or any(step in tag for tag in tags)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _refuse(error: ValidationError, model: type[BaseModel]) -> NoReturn:
    raise ConfigurationError(explain(error, model)) from None
