# Our backend in dom0 by backendtype=tap, which libxl has its own path in xenstore for (vbd3) from 4.19 on.
ram_disk 256
file_disk 64
# Without a script, libxl runs tapdisk's.
disk='format=raw,access=rw,backendtype=tap,script=block-blkback'
start_blkback
create_guest guest disk "vdev=xvda,$disk,target=/dev/nullb0" "vdev=xvdb,$disk,target=/tmp/disk.raw"
blkback_results guest
