# A shell on the console: Xen is up, a disk is there, and a guest's configuration.
set +e
ram_disk 256
guest_config guest shell 'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0'
cat <<END

dom0 of a Xen host: xl, xenstore-*, fio, blkback and blkfront are here. A start:

  modprobe xen-blkback          # the kernel's backend; or: blkback serve --platform xen &
  xl create -c /run/guest.cfg   # a PV guest with /dev/nullb0 as its xvda; Ctrl-] leaves its console
  poweroff -f                   # ends the machine; so does: exit

END
setsid cttyhack bash -i
