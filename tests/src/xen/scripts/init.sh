#!/bin/sh
# The first program of dom0 and of guests. busybox looks itself up in /proc.
busybox mount -t proc proc /proc
busybox --install -s /usr/bin 2>/dev/null
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/xen-bin HOME=/root TERM=linux
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
modprobe -a xen-evtchn xen-gntdev xen-gntalloc xen-privcmd xenfs
mount -t xenfs xenfs /proc/xen
# What is to be done is in the kernel's arguments: NAME=VALUE.
for word in $(cat /proc/cmdline); do
    case $word in
    [a-z]*.*=*) ;;
    [a-z]*=*) export "$word" ;;
    esac
done
. /scripts/lib.sh
[ "$scenario" = debian ] && . /scripts/debian-init.sh
case $(cat /proc/xen/capabilities) in
*control_d*) . /scripts/dom0-init.sh ;;
*) . /scripts/guest-init.sh ;;
esac
poweroff -f
