#!/bin/sh
# dom0's first program: starts Xen's daemons, then the scenario, then switches the machine off.
# It looks itself up in /proc.
busybox mount -t proc proc /proc
busybox --install -s /usr/bin 2>/dev/null
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/xen-bin
export HOME=/root TERM=linux
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
# The hotplug scripts' locks need /dev/stdin, xenconsoled needs /dev/pts.
ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/xen /run/xenstored /run/blkback /var/lib/xen /var/lib/xenstored \
    /var/log/xen/console
for word in $(cat /proc/cmdline); do
    case $word in limit=*) limit=${word#limit=} ;; esac
done
# No one may be left to stop a machine that hangs.
[ "${limit:-0}" -gt 0 ] && (sleep "$limit"; echo "dom0: time is up"; poweroff -f) &

modprobe -a xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs
mount -t xenfs xenfs /proc/xen
xenstored --pid-file /run/xenstored.pid
until xenstore-read -s / >/dev/null 2>&1; do sleep 0.2; done
xen-init-dom0
xenconsoled --log=all --pid-file=/run/xenconsoled.pid
. /lib.sh
echo "dom0: ready after $(cut -d' ' -f1 /proc/uptime) s"
result boot "{\"dom0_s\":$(cut -d' ' -f1 /proc/uptime),\"xen\":\"$(xl info xen_version)\",\"linux\":\"$(uname -r)\"}"

sh -e /scenario
status=$?
result end "{\"status\":$status}"
sync
poweroff -f
