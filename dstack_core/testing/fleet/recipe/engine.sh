# Adds a container engine to a machine, and writes the root file system to standard output as a tar file.
# Runs as root on a machine without one, with the network of this computer.
set -eu
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
exec 3>&1 1>&2
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
apt-get -o Acquire::Retries=3 update -qq
apt-get install -y -qq --no-install-recommends docker.io
rm -rf /usr/sbin/policy-rc.d /var/lib/apt/lists/* /var/cache/apt/*
tar -C / --one-file-system --numeric-owner -c . >&3
