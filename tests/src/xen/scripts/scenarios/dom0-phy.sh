# Our backend in dom0 in the place of the kernel's, which is not loaded.
ram_disk 256
file_disk 64
start_blkback
GUEST_UNTRUSTED=51728
create_guest guest 'disk untrusted=xvdb' \
    'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0' \
    'vdev=xvdb,format=raw,access=rw,backendtype=phy,target=/dev/loop0'
blkback_results guest
