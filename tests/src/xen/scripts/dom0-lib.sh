# What scenarios have in common in dom0.

# Brings a result to the machine outside: a name and a JSON value, as a line on the second serial port.
result() {
    printf '{"name":"%s","value":%s}\n' "$1" "$(printf %s "$2" | tr -d '\n')" >/dev/ttyS1
}

fail() {
    result failure "\"$1\""
    echo "dom0: FAILED: $1"
    tail -n 30 /var/log/xen/xl-*.log /var/log/xen/xen-hotplug.log 2>/dev/null || true
    exit 1
}

# A disk in RAM: /dev/nullb0, MIB. (Its emulated write cache can lock Linux 6.12 up.)
ram_disk() {
    modprobe configfs 2>/dev/null || true
    modprobe null_blk nr_devices=0
    mount -t configfs configfs /sys/kernel/config 2>/dev/null || true
    d=/sys/kernel/config/nullb/nullb0
    mkdir "$d"
    echo 1 >$d/memory_backed
    echo "$1" >$d/size
    echo 512 >$d/blocksize
    echo 2 >$d/submit_queues
    echo 1 >$d/discard
    echo 1 >$d/power
    until [ -b /dev/nullb0 ]; do sleep 0.1; done
}

# A disk on a file, with a write cache, and whose space is given back by discard: /dev/loop0, MIB.
file_disk() {
    modprobe loop
    truncate -s "${1}M" /tmp/disk.raw
    losetup /dev/loop0 /tmp/disk.raw
}

# Writes /run/NAME.cfg, a PV guest with DISK lines, its vCPUs on CPUs that dom0 does not use.
guest_config() {
    name=$1
    shift
    cat >"/run/$name.cfg" <<END
name="$name"
type="pv"
kernel="/guest/kernel"
ramdisk="/guest/initramfs"
extra="$(cat /guest/arguments)"
memory=640
vcpus=2
cpus=["2","3"]
disk=[$(printf "'%s'," "$@")]
on_poweroff="destroy"
on_crash="destroy"
on_reboot="destroy"
END
}

# Creates the guest NAME with DISK lines, and shows its console.
create_guest() {
    guest_config "$@"
    tail -F "/var/log/xen/console/guest-$1.log" 2>/dev/null &
    xl create "/run/$1.cfg" || fail "xl create $1"
    xenstore-ls -f | grep -E 'backend/|device/vbd' || true
}

# Waits until the guest NAME has switched itself off, and passes its results on.
guest_results() {
    while xl domid "$1" >/dev/null 2>&1; do sleep 1; done
    log="/var/log/xen/console/guest-$1.log"
    tr -d '\r' <"$log" | sed -n 's/^@result //p' >/dev/ttyS1
    grep -q '"name":"done"' "$log" || fail "guest $1 did not finish its job"
}

# Starts blkback.
start_blkback() {
    blkback serve --platform xen --listen unix:/run/blkback/stats.sock >/run/blkback.log 2>&1 &
    backend=$!
    tail -F /run/blkback.log &
}

# As guest_results, with blkback's statistics, and that nothing is left when the guest NAME is gone.
blkback_results() {
    while xl domid "$1" >/dev/null 2>&1; do
        # Those of a disk go with it: the last look counts.
        blkback stats --json >/run/stats.new 2>/dev/null && grep -q '"sectors"' /run/stats.new \
            && mv /run/stats.new /run/stats
        sleep 5
    done
    [ -s /run/stats ] && result blkback "$(cat /run/stats)"
    guest_results "$1"
    kill -0 $backend || fail "blkback has ended: $(tail -1 /run/blkback.log | tr -d '\"')"
    kill -TERM $backend
    wait $backend || fail "blkback did not end well"
    for kind in vbd vbd3; do
        left=$(xenstore-ls -f "/local/domain/0/backend/$kind" 2>/dev/null | grep state || true)
        [ -z "$left" ] || fail "a disk is left in xenstore"
    done
}
