# Our frontend in a PV guest, its disks /dev/nbdN there, on Linux's xen-blkback.
ram_disk 256
file_disk 64
modprobe xen-blkback
GUEST_UNTRUSTED=51712
create_guest guest 'front via=nbd' \
    'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0' \
    'vdev=xvdb,format=raw,access=rw,backendtype=phy,target=/dev/loop0'
kernel_results guest
