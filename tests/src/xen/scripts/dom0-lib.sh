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

# A disk in RAM with flush and discard: /dev/nullb0, MIB.
ram_disk() {
    modprobe configfs 2>/dev/null || true
    modprobe null_blk nr_devices=0
    mount -t configfs configfs /sys/kernel/config 2>/dev/null || true
    d=/sys/kernel/config/nullb/nullb0
    mkdir "$d"
    echo 1 >$d/memory_backed
    # A write cache, so that flushes are needed.
    echo 4 >$d/cache_size
    echo "$1" >$d/size
    echo 512 >$d/blocksize
    echo 2 >$d/submit_queues
    echo 1 >$d/discard
    echo 1 >$d/power
    until [ -b /dev/nullb0 ]; do sleep 0.1; done
}

# Writes /run/NAME.cfg, a PV guest with a DISK line, its vCPUs on CPUs that dom0 does not use.
guest_config() {
    cat >"/run/$1.cfg" <<END
name="$1"
type="pv"
kernel="/guest/kernel"
ramdisk="/guest/initramfs"
extra="$(cat /guest/arguments)"
memory=640
vcpus=2
cpus=["2","3"]
disk=['$2']
on_poweroff="destroy"
on_crash="destroy"
on_reboot="destroy"
END
}

# Creates the guest NAME with a DISK line, and shows its console.
create_guest() {
    guest_config "$1" "$2"
    tail -F "/var/log/xen/console/guest-$1.log" 2>/dev/null &
    xl create "/run/$1.cfg" || fail "xl create $1"
    xenstore-ls -f | grep -E 'vbd' || true
}

# Waits until the guest NAME has switched itself off, and passes its results on.
guest_results() {
    while xl domid "$1" >/dev/null 2>&1; do sleep 1; done
    log="/var/log/xen/console/guest-$1.log"
    tr -d '\r' <"$log" | sed -n 's/^@result //p' >/dev/ttyS1
    grep -q '"name":"done"' "$log" || fail "guest $1 did not finish its job"
}
