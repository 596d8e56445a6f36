# Builds the root file system of a machine, and writes it to standard output as a tar file.
# Runs as root in a container that sees this computer's /usr and /etc, read-only, and its network.
#
#   build.sh SUITE MIRROR PACKAGES
set -eu
suite=$1 mirror=$2 packages=$3
root=/build/root
export DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec 3>&1 1>&2

# In two stages, so that dpkg has its settings before it unpacks anything.
debootstrap --force-check-gpg --foreign --variant=minbase --include="$packages" "$suite" $root "$mirror"
mkdir -p $root/etc/dpkg/dpkg.cfg.d
cat >$root/etc/dpkg/dpkg.cfg.d/fleet <<'END'
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/man/*
END
chroot $root /debootstrap/debootstrap --second-stage || { cat $root/debootstrap/debootstrap.log; exit 1; }

# Nothing is started in here. debootstrap cannot resolve what cloud-init depends on; apt can.
printf '#!/bin/sh\nexit 101\n' >$root/usr/sbin/policy-rc.d
chmod 755 $root/usr/sbin/policy-rc.d
cp /etc/resolv.conf $root/etc/resolv.conf
chroot $root apt-get install -y -qq --no-install-recommends cloud-init python3-cffi-backend
rm $root/usr/sbin/policy-rc.d

# Every machine makes keys and an id of its own when it boots first. What belongs to hardware, or runs now and then, is off.
rm -rf $root/etc/ssh/ssh_host_* $root/var/lib/dbus/machine-id $root/var/lib/apt/lists/* $root/var/cache/apt/* $root/var/log/*.log $root/debootstrap
: >$root/etc/machine-id
for unit in apt-daily.timer apt-daily-upgrade.timer console-getty.service dev-hugepages.mount dpkg-db-backup.timer \
  e2scrub_all.timer e2scrub_reap.service getty.target modprobe@.service sys-fs-fuse-connections.mount \
  sys-kernel-debug.mount sys-kernel-tracing.mount systemd-modules-load.service; do
  ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
cp /recipe/99-fleet.cfg $root/etc/cloud/cloud.cfg.d/
mkdir -p $root/usr/lib/fleet $root/etc/docker $root/var/lib/cloud/seed/nocloud
cp /recipe/boot /recipe/link $root/usr/lib/fleet/
chmod 755 $root/usr/lib/fleet/*
cp /recipe/daemon.json $root/etc/docker/
tar -C $root --numeric-owner -c . >&3
