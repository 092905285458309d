# dom0 as a whole Debian: from the initramfs to the system on the disk.
[ "${limit:-0}" -gt 0 ] && limit="RuntimeMaxSec=$limit"
modprobe -a nvme crc32c_generic ext4
until [ -b /dev/nvme0n1 ]; do sleep 0.1; done
mount -t ext4 /dev/nvme0n1 /mnt || poweroff -f
# Memory is faster than the disk, and systemd keeps a /run that is there.
cp -a /guest /scripts /run/
ln -s run/guest run/scripts /mnt/
mkdir -p /mnt/usr/lib/modules /mnt/var/log/xen/console
cp -a /usr/lib/modules/* /mnt/usr/lib/modules/
chroot /mnt depmod
echo 'XENCONSOLED_ARGS=--log=all' >>/mnt/etc/default/xen
cat >/mnt/etc/systemd/system/scenario.service <<END
[Unit]
Description=The scenario
Wants=xen.service
After=xen.service
OnFailure=poweroff.target
[Service]
ExecStart=/bin/sh /scripts/debian-dom0.sh
StandardOutput=file:/dev/hvc0
StandardError=file:/dev/hvc0
$limit
[Install]
WantedBy=multi-user.target
END
chroot /mnt systemctl -q enable scenario.service
# Units that nobody needs here take a minute of an emulated CPU.
chroot /mnt systemctl -q mask getty.target serial-getty@hvc0.service e2scrub_reap.service \
    systemd-logind.service systemd-journal-flush.service systemd-update-utmp.service
echo ShowStatus=no >>/mnt/etc/systemd/system.conf
umount /proc/xen /dev/pts
for dir in dev proc run sys; do mount --move /$dir /mnt/$dir; done
exec switch_root /mnt /sbin/init
