#!/bin/bash
# Within `unshare --mount`: shows systemd-nspawn a cgroup v2 of one hierarchy, and boots the box again when it asks for that.
# Arguments: CGROUP, then systemd-nspawn's own.
set -e
cg=/sys/fs/cgroup/skerry-boxes/$1; shift # one each: boxes that share a cgroup share their units'
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mkdir -p "$cg"
echo $$ >"$cg/cgroup.procs"
child=
trap '[ -n "$child" ] && kill -TERM "$child"' TERM
while :; do
  # Without the capabilities and bpf(2), IPAddressDeny= and DevicePolicy= are not enforced, and nobody says so. A container engine in a
  # box gives each container a keyring.
  systemd-nspawn --boot --register=no --keep-unit --console=read-only --resolv-conf=off --timezone=off --link-journal=no \
    --capability=CAP_BPF,CAP_NET_ADMIN "--system-call-filter=bpf @keyring" "$@" &
  child=$!
  rc=0
  while wait "$child" || rc=$?; kill -0 "$child" 2>/dev/null; do rc=0; done # wait again after a trap
  [ "$rc" = 133 ] || exit "$rc" # 133: it asked to be booted again
done
