"""Cases about the package: how it registers, and how it is configured."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import EntryPoint
from os import pathsep
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr, ValidationError

from dstack_core.testing import _loading
from dstack_core.testing._suite._base import Base
from dstack_core.testing._suite._messages import expect, fail
from dstack_core.testing._suite._needs import SECRETS, needs
from dstack_core.testing._suite._rig import Rig, secrets_in

_PLUGIN_API = 1
_SECRET = re.compile(r"(token|secret|passw(or)?d|api_?key|private_?key|access_?key|credentials?)$", re.IGNORECASE)
_NONSENSE = {"surely": ["no", {"such": "value"}]}
_CHILD = """
import importlib.metadata, json, sys
import dstack_core.plugin
packages = lambda: {name.partition(".")[0] for name in sys.modules}
touched, before = [], packages()
network = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.system")
sys.addaudithook(lambda event, args: touched.append(f"{event}{args[1:]!r}") if event in network else None)
name, value, group = sys.argv[1:]
plugin = importlib.metadata.EntryPoint(name, value, group).load()
names = [info.name for info in plugin.dstack_register_backends()]
print(json.dumps({"names": names, "touched": touched, "packages": sorted(packages() - before)}))
"""


@cache
def _registered(point: EntryPoint) -> dict[str, Any]:
    """What a fresh interpreter does when it loads the package and lets it register."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, point.name, point.value, _loading.GROUP],
        env={"PYTHONPATH": pathsep.join(sys.path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        fail(
            "register",
            "the package cannot be loaded in a fresh interpreter",
            expected="its module is imported and dstack_register_backends returns",
            got=done.stderr.strip().splitlines()[-1:] or done.returncode,
            cure="import nothing in that module that is not a dependency of the package",
        )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]  # printed above


class RegistrationCases(Base):
    """The package says what it brings, without loading an SDK, and its configuration is strict and keeps secrets."""

    def test_the_entry_point_leads_to_the_backend(self, rig: Rig) -> None:
        """Does the entry point's module register a backend of this name, once?"""
        names = [info.name for info in _loading.infos(rig.point)]
        expect(
            names.count(rig.name) == 1,
            "register",
            "the backend is not registered exactly once",
            expected=f"{rig.name!r} once",
            got=names,
            cure="return one BackendInfo for each backend",
        )

    def test_registration_loads_no_sdk(self, rig: Rig) -> None:
        """Does a fresh interpreter that registers the package load nothing but the package and the standard library?"""
        own = rig.point.value.partition(":")[0].partition(".")[0]
        # Other parts of what the core itself needs, as of pydantic, are no SDK.
        foreign = sorted(set(_registered(rig.point)["packages"]) - {own} - set(sys.stdlib_module_names))
        expect(
            not foreign,
            "sdk-free",
            "registering loads other packages",
            expected=f"nothing but {own} and the standard library",
            got=", ".join(foreign),
            cure="keep the SDK's import in the module that `BackendInfo.factory` names; every start of the server pays "
            "for what is imported here, and fails where it is broken",
        )

    def test_registration_touches_no_network(self, rig: Rig) -> None:
        """Does registering neither open connections nor start programs?"""
        touched = _registered(rig.point)["touched"]
        expect(
            not touched,
            "sdk-free",
            "registering reaches outside",
            expected="no connection and no program",
            got=touched,
            cure="move it to a hook, or to the factory",
        )

    def test_the_name_is_what_users_write(self, rig: Rig) -> None:
        """Is the name lower-case, of letters, digits and dashes, and the configuration's `type` the same?"""
        good = re.fullmatch(r"[a-z][a-z0-9-]{,63}", rig.info.name)
        written = rig.info.config.model_fields["type"].default
        expect(
            good and written == rig.info.name,
            "name",
            "the name is none, or not that of the configuration",
            expected="at most 64 lower-case letters, digits and dashes, and the same as the default of `type`",
            got=f"name {rig.info.name!r}, type {written!r}",
            cure=f'write `type: Literal["{rig.info.name}"] = "{rig.info.name}"` in the configuration',
        )

    def test_the_title_is_for_people(self, rig: Rig) -> None:
        """Is there a title that can be shown?"""
        expect(
            rig.info.title.strip() == rig.info.title != "",
            "title",
            "there is no title",
            expected="a name for people",
            got=repr(rig.info.title),
            cure="fill in `BackendInfo.title`",
        )

    def test_the_plugin_api_is_one_that_the_core_speaks(self, rig: Rig) -> None:
        """Is `plugin_api` a pair whose first number is that of this core?"""
        version = rig.info.plugin_api
        expect(
            version[:1] == (_PLUGIN_API,),
            "plugin-api",
            "the core would refuse this plugin",
            expected=f"({_PLUGIN_API}, n)",
            got=version,
            cure="leave `plugin_api` at its default, or write the version whose contract you read",
        )

    def test_the_facts_make_sense(self, rig: Rig) -> None:
        """Are the declared times, limits and choices ones that the core can work with?"""
        info = rig.info
        wrong = [
            f"{name}={getattr(info, name)!r}"
            for name, least in {
                "visibility_window": 0,
                "offers_ttl": 0,
                "hook_timeout": 1,
                "provisioning_timeout": 1,
            }.items()
            if not least <= getattr(info, name) < 86400
        ]
        wrong += [] if info.max_concurrency >= 1 else [f"max_concurrency={info.max_concurrency!r}"]
        wrong += [] if info.ownership in ("tags", "name", "none") else [f"ownership={info.ownership!r}"]
        wrong += [] if info.terminates_itself in ("agent", "cloud", "nobody") else ["terminates_itself"]
        expect(
            not wrong,
            "facts",
            "a declared fact cannot be",
            expected="seconds from 0 to a day, at least one call at once, and the choices that are documented",
            got=", ".join(wrong),
            cure="see the attributes of BackendInfo",
        )

    def test_the_factory_makes_an_object_with_the_five_hooks(self, rig: Rig) -> None:
        """Can the factory be imported, called with the configuration, and has the result all five hooks?"""
        made = rig.another()
        expect(
            not made.hooks.unmarked,
            "factory",
            "a hook is not marked, so the core does not see it",
            expected="@hookimpl above each hook",
            got=", ".join(made.hooks.unmarked),
            cure="write @hookimpl above it",
        )

    def test_hooks_are_spelt_right(self, rig: Rig) -> None:
        """Is everything that is marked with @hookimpl a hook, and takes only arguments that the hook has?"""
        hooks = rig.another().hooks
        wrong = [f"{name} is no hook" for name in hooks.misspelt]
        for name, function in hooks.found.items():
            taken = set(inspect.signature(function).parameters) - set(_loading.ARGUMENTS[name])
            wrong += [f"{name} has no argument {argument!r}" for argument in sorted(taken)]
        expect(
            not wrong,
            "factory",
            "a hook is misspelt",
            expected=f"hooks among {', '.join(_loading.ARGUMENTS)}, with the documented arguments or some of them",
            got="; ".join(wrong),
            cure="compare with the signatures in the reference",
        )

    def test_the_factory_is_found_without_running_anything(self, rig: Rig) -> None:
        """Is `factory` written as `module:callable`, with a module of the package?"""
        module, _, _ = rig.info.factory.partition(":")
        found = re.fullmatch(r"[\w.]+:[\w.]+", rig.info.factory) and importlib.import_module(module)
        expect(
            found and callable(_loading.factory(rig.info)),
            "factory",
            "the factory cannot be found",
            expected="'module:callable'",
            got=repr(rig.info.factory),
            cure="name the module and the callable in it, with a colon between",
        )

    # -- the configuration ------------------------------------------------------------------------------------------

    def test_the_configuration_is_read(self, rig: Rig) -> None:
        """Does the configuration of the cloud under test pass, with and without `type`, to the same result?"""
        again = rig.info.config.model_validate(rig.cloud.config())
        expect(
            again == rig.config,
            "config",
            "the same entry gives two configurations, or none of BackendConfig",
            expected="equal models",
            got=f"{type(rig.config).__name__} and {type(again).__name__}",
            cure="put no clock, randomness or connection into the model",
        )

    def test_an_unknown_key_is_refused(self, rig: Rig) -> None:
        """Is a misspelt key an error, instead of being ignored?"""
        _refused(rig, {"surely_no_such_key": "x"}, "unknown-key", "a key that does not exist is accepted")

    def test_another_type_is_refused(self, rig: Rig) -> None:
        """Is the entry of another backend an error?"""
        _refused(rig, {"type": "another-backend"}, "config", "an entry of another `type` is accepted")

    def test_a_value_of_the_wrong_type_is_refused(self, rig: Rig) -> None:
        """Is nonsense in any of the fields an error?"""
        for name in rig.info.config.model_fields:
            _refused(rig, {name: _NONSENSE}, "config", f"the field '{name}' accepts {_NONSENSE!r}")

    def test_a_missing_key_is_named(self, rig: Rig) -> None:
        """Is the field that is missing named in the error?"""
        required = [name for name, field in rig.info.config.model_fields.items() if field.is_required()]
        for name in required:
            entry = {key: value for key, value in rig.cloud.config().items() if key != name}
            with pytest.raises(ValidationError) as caught:
                rig.info.config.model_validate(entry)
            expect(
                any(name in error["loc"] for error in caught.value.errors()),
                "config",
                f"without '{name}' the error does not name it",
                expected=f"an error at '{name}'",
                got=[error["loc"] for error in caught.value.errors()],
                cure="leave it to pydantic to find what is missing",
            )

    def test_the_configuration_cannot_be_changed(self, rig: Rig) -> None:
        """Is the model frozen, as its base says?"""
        try:
            rig.config.type = "changed"
        except (ValidationError, AttributeError, TypeError):
            return
        fail(
            "config",
            "the configuration can be changed after it was read",
            expected="a frozen model",
            got="an assignment that worked",
            cure="keep `frozen=True` in the model's configuration",
        )

    def test_the_default_configuration_is_complete(self, rig: Rig) -> None:
        """If there is a default configuration, is it one of the model, and does it hold no secret?"""
        default = rig.info.default_config
        expect(
            default is None or (isinstance(default, rig.info.config) and not [*secrets_in(default)]),
            "default-config",
            "the default configuration is not one",
            expected=f"None, or a {rig.info.config.__name__} that needs nothing else",
            got=repr(default),
            cure="give `default_config` only where the backend works without any configuration",
        )

    def test_secrets_are_declared_as_secrets(self, rig: Rig) -> None:
        """Is each field that is named like a secret a `SecretStr`?"""
        plain = _plain_secrets(rig.info.config)
        expect(
            not plain,
            "secret",
            "a field that sounds like a secret is shown in logs and errors",
            expected="pydantic.SecretStr",
            got=", ".join(plain),
            cure="write `token: SecretStr`, and `.get_secret_value()` where it is sent",
        )

    @needs(SECRETS)
    def test_the_configuration_shows_no_secret(self, rig: Rig) -> None:
        """Do its repr, its text and its JSON leave the secrets out?"""
        shown = f"{rig.config!r} {rig.config} {rig.config.model_dump_json()} {rig.config.model_dump()}"
        _no_secret(rig, shown, "dstack_register_backends: the configuration shows a secret")

    @needs(SECRETS)
    def test_an_error_in_the_configuration_shows_no_secret(self, rig: Rig) -> None:
        """Does an error in another field not quote the secrets?"""
        with pytest.raises(ValidationError) as caught:
            rig.info.config.model_validate({**rig.cloud.config(), "surely_no_such_key": "x"})
        _no_secret(
            rig,
            f"{caught.value} {caught.value!r}",
            "dstack_register_backends: the error about another field quotes a secret",
        )

    @needs(SECRETS)
    def test_the_backend_shows_no_secret(self, rig: Rig) -> None:
        """Does the repr of the backend's object leave the secrets out?"""
        _no_secret(
            rig,
            f"{rig.backend.made!r} {rig.backend.made}",
            "the object with dstack_create_instance shows a secret in its repr",
        )


def _refused(rig: Rig, change: dict[str, Any], key: str, what: str) -> None:
    __tracebackhide__ = True
    try:
        rig.info.config.model_validate({**rig.cloud.config(), **change})
    except ValidationError:
        return
    fail(
        key,
        what,
        expected="a ValidationError",
        got="a configuration",
        cure="subclass BackendConfig, keep `extra='forbid'`, and give each field the narrowest type",
    )


def _no_secret(rig: Rig, text: str, what: str) -> None:
    __tracebackhide__ = True
    expect(
        not any(secret in text for secret in rig.secrets),
        "no-secret",
        what,
        expected="********** or nothing in its place",
        got="the secret itself (not repeated here)",
        cure="keep it in a SecretStr until it is sent",
    )


def _plain_secrets(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Fields that sound like secrets and are plain text, in inner models as well."""
    found = []
    for name, field in model.model_fields.items():
        kinds = _kinds(field.annotation)
        if _SECRET.search(name) and str in kinds and SecretStr not in kinds:
            found.append(prefix + name)
        for kind in kinds:
            if inspect.isclass(kind) and issubclass(kind, BaseModel):
                found += _plain_secrets(kind, f"{prefix}{name}.")
    return found


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    inner = getattr(annotation, "__args__", ())
    return {annotation} if not inner else set().union(*map(_kinds, inner))
