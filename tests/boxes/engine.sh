#!/bin/sh
# Within a box: a Docker Engine. Where the machine has the controllers in control groups of version 1, those of the box bound nothing,
# and the engine takes the machine's; nobody else sees these mounts (PrivateMounts=).
set -e
controllers=$(cut -d: -f2 /proc/self/cgroup | grep -v '^name=' | grep . || true)
if [ -n "$controllers" ]; then
  umount -R /sys/fs/cgroup
  mount -t tmpfs -o mode=755 none /sys/fs/cgroup
  for controller in $controllers; do
    mkdir "/sys/fs/cgroup/$controller"
    mount -t cgroup -o "$controller" none "/sys/fs/cgroup/$controller"
  done
  set -- --exec-opt native.cgroupdriver=cgroupfs
fi
exec dockerd --host fd:// "$@"
