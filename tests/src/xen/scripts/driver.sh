# A driver domain of type TYPE serves the disks of guests; dom0 only runs the toolstack. First with `xl
# devd` in it, which runs Debian's `block` script and removes what is detached; then blkback alone, for a PV
# guest and for a PVH guest.
driver_domain() {
    before=$(nodes)
    GUEST_TYPE=$1 GUEST_CPUS='"4","5"' GUEST_MORE=driver_domain=1
    create_guest stor agent
    ask stor 'ram_disk 256 && file_disk 64'
    own=/local/domain/$(xl domid stor)
    GUEST_CPUS='"2","3"' GUEST_MORE=

    ask stor 'xl devd -p /run/devd.pid'
    GUEST_TYPE=pv
    serve devd /dev/loop0 --script-timeout-s 60
    ask stor 'cat /var/log/xen/xldevd.log >&3; kill $(cat /run/devd.pid) && losetup -d /dev/loop0'
    serve alone-pv /tmp/disk.raw
    GUEST_TYPE=pvh
    serve alone-pvh /tmp/disk.raw
    end_guest stor
    settles "$before" nodes
}

# NAME FILE OPTION...: starts blkback with the options; makes a guest of that name with a disk on the RAM disk
# and one on FILE, has it use them, and ends it.
serve() {
    name=$1 file=$2
    shift 2
    ask stor "start_blkback $* >&3; until [ -S /run/blkback/stats.sock ]; do sleep 0.1; done"
    idle=$(ask stor opened)
    kept=$(xenstore-ls "$own/backend" 2>/dev/null | sed 's/ =.*//')
    disk='format=raw,access=rw,backendtype=phy,backend=stor'
    create_guest "$name" agent "vdev=xvda,$disk,target=/dev/nullb0" "vdev=xvdb,$disk,target=$file"
    ask "$name" '(short=1; . /scripts/jobs/disk.sh) >&3'
    # Only one line shows how the disk was attached.
    xenstore-ls "$own/backend/vbd" | grep -E 'physical|hotplug|state' || true
    ask stor 'blkback stats --json >/run/stats && result blkback /run/stats >&3'
    end_guest "$name"
    settles "$idle" ask stor opened
    settles 0 ask stor mapped
    left=$(xenstore-ls "$own/backend" "$own/error" 2>/dev/null | sed 's/ =.*//')
    [ "$left" = "$kept" ] || fail "left in the driver domain's part of xenstore: $left"
    ask stor 'stop_blkback >&3'
}
