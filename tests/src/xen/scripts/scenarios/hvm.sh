# An HVM guest: its firmware, and Linux without Xen's drivers, use QEMU's disks on what blkback serves.
# needs: hvm
ram_disk 256
truncate -s 64M /tmp/disk.raw
start_blkback
GUEST_TYPE=hvm
GUEST_SYSTEM=/hvm
GUEST_MORE='vga="none"'
disk='format=raw,access=rw,backendtype=phy'
set -- "vdev=hda,$disk,target=/dev/nullb0" "vdev=hdb,$disk,script=block-blkback,target=/tmp/disk.raw"

# Like this, Linux leaves the disks to QEMU, and its drivers for Xen's disks keep away.
create_guest emulated 'agent xen_emul_unplug=never' "$@"
ask emulated 'modprobe -a ata_piix sd_mod; use_disk /dev/sda 1 && use_disk /dev/sdb 1'
ask emulated 'dmesg | grep "sd[ab].*blocks" >&3; ! ls /dev/xvd*'
written=$(ask emulated 'for d in sda sdb; do head -c 4M /dev/$d | md5sum; done')
end_guest emulated

create_guest own agent "$@"
ask own 'until [ -b /dev/xvda ] && [ -b /dev/xvdb ]; do sleep 0.1; done; ! ls /dev/sd*'
[ "$(ask own 'for d in xvda xvdb; do head -c 4M /dev/$d | md5sum; done')" = "$written" ] || fail "the disks are not what was written through QEMU"
ask own 'use_disk /dev/xvda 2 && use_disk /dev/xvdb 2 && discard /dev/xvdb'
blkback stats --json >/run/stats && result blkback "$(cat /run/stats)"
end_guest own
stop_blkback
nothing_left
