#!/usr/bin/env bash
# A machine of its own for test_house_systemd, of namespaces: machine.sh FOLDER, whose install.sh installs and whose systemd
# is process 1.  What is written to /etc, /opt, /run and /var/lib stays in FOLDER and in memory; the network is loopback.
set -euo pipefail
folder=$1

mkdir -p "$folder"/{etc,opt,state,stubs,bin}
cp --archive /etc/. "$folder/etc"
mount --bind "$folder/etc" /etc
mount --bind "$folder/opt" /opt
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /etc/systemd/system
for target in sysinit basic shutdown multi-user timers network-online; do
    printf '[Unit]\nDefaultDependencies=no\n' > "$folder/stubs/$target.target"
done

# `sudo [--user NAME] [NAME=VALUE...] COMMAND` of root.
cat > "$folder/bin/sudo" <<'SUDO'
#!/bin/sh
if [ "$1" = --user ]; then
    user=$2
    shift 2
    exec runuser --user "$user" -- env HOME="$(getent passwd "$user" | cut -d: -f6)" "$@"
fi
exec env "$@"
SUDO
chmod +x "$folder/bin/sudo"

PATH="$folder/bin:$PATH" bash -euo pipefail "$folder/install.sh"

export container=test SYSTEMD_UNIT_PATH="/etc/systemd/system:$folder/stubs"
exec unshare --mount --pid --fork --kill-child --net --ipc --uts --cgroup bash -euc '
    mount -t proc proc /proc
    mount -t cgroup2 none /sys/fs/cgroup
    mount -t tmpfs tmpfs /run
    ip link set lo up
    exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=console --show-status=no
'
