# Linux's xen-blkback and xen-blkfront: shows that the machine works.
ram_disk 256
file_disk 64
modprobe xen-blkback
create_guest guest disk 'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0' \
    'vdev=xvdb,format=raw,access=rw,backendtype=phy,target=/dev/loop0'
guest_results guest
