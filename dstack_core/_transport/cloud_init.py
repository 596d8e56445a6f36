"""The user-data of a machine that boots: all that it must know before anybody speaks to it.

It is a `#cloud-config` document, as every cloud hands it to cloud-init, under the 16 KB that the strictest one allows.
Whoever may look at the machine in the cloud's console can read it, so nothing of the job is in it. The private key in
it is the one with which the machine proves itself at first contact; over that connection it gets one that nobody knows
(see `on_machine`).

What the machine does with it:

- lets the server, and who else is named, log in as root
- begins to watch itself: if its agent does not run and no server speaks to it, it powers itself off after a while, and
  in any case when its time is over
- gets what the job needs: Python, a container engine if the job has an image and the machine none; looks for its GPUs
- writes down how that went, in `/var/lib/dstack/setup`, and says so on its console
- can lead those who log in to where the job is (`inside`)

The third and the fourth begin when the server comes, which is as soon as SSH is answered, or else with cloud-init's
last stage.

The agent itself is sent over SSH: it is larger than user-data may be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dstack_core._transport.archive import START
from dstack_core._transport.keys import KeyPair

LIMIT = 16 << 10
"""Bytes."""
FOLDER = "/var/lib/dstack"
AGENT = f"{FOLDER}/agent.pyz"
ALIVE = "/run/dstack/alive"
SETUP = f"{FOLDER}/setup"
_BIN = "/usr/local/lib/dstack"
BEGIN_SETUP = f"{_BIN}/setup"
"""Begun by whoever comes first: the server, or cloud-init, whose last stage takes its time. Once is enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What a machine is to know.

    Attributes:
        instance: what its agent is the agent of.
        server_key: the server's public key.
        public_keys: who else may log in.
        host_key: with which it proves itself at first contact.
        grace: seconds for which it stays when nobody cares for it.
        expires_at: when it must be gone at the latest.
        container_engine: the job has an image.
        gpus: the vendor of the GPUs that the job needs, if it needs some.
    """

    instance: str
    server_key: str
    public_keys: tuple[str, ...] = ()
    host_key: KeyPair
    grace: float
    expires_at: datetime | None = None
    container_engine: bool = False
    gpus: str | None = None


def user_data(boot: Boot) -> str:
    """The document.

    Raises:
        ValueError: it would be too long; only the keys of `public_keys` can make it so.
    """
    text = f"#cloud-config\n{json.dumps(_config(boot), separators=(',', ':'))}\n"
    if len(text) > LIMIT:
        raise ValueError(f"The user-data of a machine has {len(text)} bytes, more than the {LIMIT} that clouds allow.")
    return text


def first_host_key(text: str) -> str:
    """The public key with which a machine of this user-data proves itself at first contact."""
    config = json.loads(text.partition("\n")[2])
    return str(config["ssh_keys"]["ed25519_public"])


def _config(boot: Boot) -> dict[str, Any]:
    keys = list(dict.fromkeys((boot.server_key, *boot.public_keys)))
    return {
        "disable_root": False,
        "ssh_pwauth": False,
        "users": ["default", {"name": "root", "ssh_authorized_keys": keys}],
        "ssh_deletekeys": True,
        "ssh_keys": {"ed25519_private": boot.host_key.private, "ed25519_public": boot.host_key.public},
        "write_files": [
            _file("/etc/systemd/system/dstack-agent.service", _agent_unit(boot)),
            _file("/etc/systemd/system/dstack-watch.service", _WATCH_UNIT),
            _file("/etc/systemd/system/dstack-watch.timer", _watch_timer(boot)),
            _file(f"{_BIN}/watch", _watch(boot), "0755"),
            _file(BEGIN_SETUP, _setup(boot), "0755"),
            _file(f"{_BIN}/inside", _INSIDE, "0755"),
        ],
        "runcmd": [[BEGIN_SETUP]],
    }


def _file(path: str, content: str, permissions: str = "0644") -> dict[str, str]:
    return {"path": path, "content": content, "permissions": permissions, "owner": "root:root"}


# ---------------------------------------------------------------------------------------------------------------------
# The agent, as a service
# ---------------------------------------------------------------------------------------------------------------------


def _agent_unit(boot: Boot) -> str:
    """Started when its program is there, and again when it died without a job. When it ends, so does the machine.

    With a job it says 76 instead of starting again, which counts as an end like any other. (`SuccessAction=` would be
    for that, but is taken before a restart, too.)
    """
    return f"""\
[Unit]
Description=dstack agent
ConditionPathExists={AGENT}
StartLimitIntervalSec=0
[Service]
WorkingDirectory={FOLDER}
Environment=HOME=/root LANG=C.UTF-8 DSTACK_AGENT_RESTARTS=1
ExecStart=/usr/bin/env python3 -I -S -c '{START}' {AGENT} serve {boot.grace:g} {boot.instance}
Restart=on-failure
RestartSec=1
SuccessExitStatus=76
ExecStopPost=/bin/sh -c '[ "$SERVICE_RESULT" != success ] || systemctl --no-block poweroff'
OOMPolicy=continue
KillMode=mixed
TimeoutStopSec=20
TasksMax=infinity
[Install]
WantedBy=multi-user.target
"""


# ---------------------------------------------------------------------------------------------------------------------
# The watch over the machine: it works without the agent, and without any server
# ---------------------------------------------------------------------------------------------------------------------

_WATCH_UNIT = f"""\
[Unit]
Description=dstack: powers this machine off when nobody cares for it
[Service]
Type=oneshot
ExecStart={_BIN}/watch
"""


def _watch_timer(boot: Boot) -> str:
    every = max(1, min(60, int(boot.grace / 5)))
    return f"""\
[Unit]
Description=dstack: looks now and then whether anybody cares for this machine
[Timer]
OnActiveSec=0
OnUnitInactiveSec={every}
AccuracySec=1
[Install]
WantedBy=timers.target
"""


def _watch(boot: Boot) -> str:
    """By the time since it was switched on, as the clock of a machine that boots may jump."""
    expires = int(boot.expires_at.timestamp()) if boot.expires_at is not None else 0
    return f"""\
#!/bin/sh
read -r up _ </proc/uptime
up=${{up%.*}}
mkdir -p /run/dstack
if [ ! -s {ALIVE} ] || systemctl is-active --quiet dstack-agent; then echo "$up" >{ALIVE}; fi
read -r last <{ALIVE}
why=
if [ $((up - last)) -ge {int(boot.grace)} ]; then why="nobody has cared for it for {int(boot.grace)} s"; fi
if [ {expires} -gt 0 ] && [ "$(date +%s)" -ge {expires} ]; then why="its time is over"; fi
[ "$why" ] || exit 0
echo "dstack: powering off: $why" >/dev/console
systemctl poweroff || poweroff -f
"""


# ---------------------------------------------------------------------------------------------------------------------
# Logging in to where the job is
# ---------------------------------------------------------------------------------------------------------------------

# As `inside sshd` it is an SSH server for one connection, on its input and output, that knows the network of the job.
# Whatever is asked for over that connection becomes `inside` alone, which goes where the job is.
_INSIDE = f"""\
#!/bin/sh
PATH=$PATH:/usr/sbin:/sbin
refuse() {{ echo "dstack: $*" >&2; exit 1; }}
cd {FOLDER} || exit
folder=$(cat agent.folder 2>/dev/null)
if [ -s agent.container ]; then
  {{ read -r engine; read -r label; }} <agent.container
  box=$("$engine" ps -q --filter "label=$label" | head -n 1)
  [ "$box" ] || refuse "the container of the job does not run (yet)"
elif [ ! "$folder" ]; then refuse "the job does not run (yet)"
fi
if [ "$1" = sshd ]; then
  mkdir -p /run/sshd
  set -- "$(command -v sshd)" -i -o "ForceCommand=$0" -o LogLevel=ERROR
  [ ! "$box" ] || set -- nsenter -t "$("$engine" inspect -f '{{{{.State.Pid}}}}' "$box")" -n "$@"
  exec "$@"
fi
asked=$SSH_ORIGINAL_COMMAND
case $asked in *sftp-server | internal-sftp)
  [ ! "$box" ] || exit 1 # Its files would be the machine's.
  for asked in /usr/lib/openssh /usr/libexec/openssh /usr/lib/ssh; do
    asked=$asked/sftp-server; [ ! -x $asked ] || break
  done
esac
if [ "$box" ]; then
  tty=; [ ! -t 0 ] || tty=-t
  [ "$asked" ] || asked='! command -v bash >/dev/null || exec bash -l; exec sh -l'
  exec "$engine" exec -i $tty -e TERM "$box" sh -c "$asked"
fi
cd "$folder" || exit
[ ! "$asked" ] || exec "$SHELL" -c "$asked"
exec "$SHELL" -l
"""


# ---------------------------------------------------------------------------------------------------------------------
# What the job needs
# ---------------------------------------------------------------------------------------------------------------------


def _setup(boot: Boot) -> str:
    parts = [_SETUP, _PYTHON]
    if boot.container_engine:
        parts.append(_ENGINE)
    if boot.gpus is not None:
        parts.append(_GPUS.get(boot.gpus, ""))
        parts.append(_GPUS_IN_CONTAINERS.get(boot.gpus, "") if boot.container_engine else "")
    return "".join([*parts, _DONE])


_SETUP = f"""\
#!/bin/sh
say() {{ echo "dstack: $*" >/dev/console; }}
note() {{ echo "$1" >{SETUP}.new; mv {SETUP}.new {SETUP}; }}
fail() {{ say "set-up failed: $1"; note "failed: $1"; exit 1; }}
# FROM APT'S NAME, DNF'S NAME
install() {{
  if command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq -o Acquire::Retries=3 update
    apt-get install -y -qq -o DPkg::Lock::Timeout=300 --no-install-recommends "$1"
  elif command -v dnf >/dev/null; then dnf install -y -q "$2"
  elif command -v yum >/dev/null; then yum install -y -q "$2"
  elif command -v zypper >/dev/null; then zypper -nq install "$2"
  else echo "no package manager that is known here"; false; fi >/tmp/dstack-install 2>&1
}}
said() {{ tail -n 3 /tmp/dstack-install | tr '\\n' ' '; }}
# PATIENCE, COMMAND
until_works() {{
  left=$1; shift
  until "$@" >/dev/null 2>&1; do [ $((left -= 1)) -gt 0 ] || return 1; sleep 1; done
}}
mkdir -p -m 700 {FOLDER} /run/dstack
exec 9>/run/dstack/setup
flock -n 9 && [ ! -s {SETUP} ] || exit 0
# As `systemctl enable` does it, which reads all units anew each time. An older systemd does not find new ones else.
wanted() {{ mkdir -p $units/$2.wants; ln -sf ../$1 $units/$2.wants/$1; }}
units=/etc/systemd/system
wanted dstack-agent.service multi-user.target
wanted dstack-watch.timer timers.target
systemctl start dstack-watch.timer 2>/dev/null || {{ systemctl daemon-reload; systemctl start dstack-watch.timer; }} ||
  fail "this machine has no systemd that works: use an image with one"
"""
_PYTHON = """\
command -v python3 >/dev/null || install python3 python3 ||
  fail "python3 is not here and cannot be installed ($(said)): use an image that has it"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' ||
  fail "$(python3 --version) is too old: use an image with Python 3.8 or later"
"""
_ENGINE = """\
engine() { command -v docker || command -v podman; }
engine >/dev/null || install docker.io docker || engine >/dev/null ||
  fail "there is no container engine, and none can be installed ($(said)): use an image that has docker or podman"
if command -v docker >/dev/null; then
  systemctl enable -q --now docker
  until_works 60 docker info || fail "docker does not start: $(docker info 2>&1 | tail -n 1)"
fi
"""
_GPUS = {
    "nvidia": """\
command -v nvidia-smi >/dev/null && until_works 60 nvidia-smi -L ||
  fail "no NVIDIA GPU works here ($(nvidia-smi -L 2>&1 | tail -n 1)): use an image with NVIDIA's driver"
""",
    "amd": """\
until_works 10 test -e /dev/kfd || fail "no AMD GPU works here (no /dev/kfd): use an image with AMD's driver"
""",
}
_GPUS_IN_CONTAINERS = {
    "nvidia": """\
command -v nvidia-container-cli >/dev/null || command -v nvidia-ctk >/dev/null ||
  fail "containers have no access to the GPUs: use an image with the NVIDIA Container Toolkit"
""",
}
_DONE = """\
say "ready for the agent"
note done
"""
