# As front-ours, but the disks are /dev/ublkbN (Debian 13: Linux 6.1 has no ublk), and one is slow.
ram_disk 256
file_disk 64
start_blkback
GUEST_UNTRUSTED=51712
create_guest guest 'front via=ublk' \
    'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0' \
    'vdev=xvdb,format=raw,access=rw,backendtype=phy,target=/dev/loop0' \
    'vdev=xvdc,format=raw,access=rw,backendtype=tap,script=block-blkback,target=delay:20s,null:64M'
blkback_results guest
