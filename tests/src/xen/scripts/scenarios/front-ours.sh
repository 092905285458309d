# Our frontend in a PV guest, its disks /dev/nbdN there, on our backend in dom0: split rings and union rings.
ram_disk 256
file_disk 64
start_blkback
GUEST_UNTRUSTED=51712
create_guest guest 'front via=nbd' \
    'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0' \
    'vdev=xvdb,format=raw,access=rw,backendtype=phy,target=/dev/loop0'
blkback_results guest
