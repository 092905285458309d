# What scenarios are made of.

# NAME VALUE: a line on the second serial port. VALUE is JSON.
result() {
    printf '{"name":"%s","value":%s}\n' "$1" "$(printf %s "$2" | tr -d '\n')" >/dev/ttyS1
}

# NAME TEXT
text() {
    result "$1" "$(quoted "$2")"
}

fail() {
    text failure "$1"
    echo "dom0: FAILED: $1"
    tail -n 30 /var/log/xen/xl-*.log /var/log/xen/xen-hotplug.log /var/log/xen/qemu-dm-*.log 2>/dev/null || true
    exit 1
}

# How guests are made; scenarios change it.
GUEST_TYPE=pv
# Where their kernel and initramfs are.
GUEST_SYSTEM=/guest
GUEST_CPUS='"2","3"'
GUEST_REBOOT=destroy
# More lines of the configuration.
GUEST_MORE=
# The numbers of disks whose backend is not to be trusted: xl's `untrusted`, which Debian 12's does not have
# yet, so it is written by hand before the guest starts.
GUEST_UNTRUSTED=

# NAME 'JOB [WORD=VALUE...]' DISK...: writes /run/NAME.cfg. Words go to the guest's kernel. A guest's
# vCPUs are on CPUs that no one else uses.
guest_config() {
    name=$1
    words=$2
    shift 2
    cat >"/run/$name.cfg" <<END
name="$name"
type="$GUEST_TYPE"
kernel="$GUEST_SYSTEM/kernel"
ramdisk="$GUEST_SYSTEM/initramfs"
extra="$(cat /guest/arguments) job=$words"
memory=768
vcpus=2
cpus=[$GUEST_CPUS]
disk=[$([ $# = 0 ] || printf "'%s'," "$@")]
on_poweroff="destroy"
on_crash="destroy"
on_reboot="$GUEST_REBOOT"
$GUEST_MORE
END
}

# As guest_config, and creates the guest, and shows its console.
create_guest() {
    guest_config "$@"
    tail -F "/var/log/xen/console/guest-$1.log" 2>/dev/null &
    xl create ${GUEST_UNTRUSTED:+-p} "/run/$1.cfg" || fail "xl create $1"
    for vbd in $GUEST_UNTRUSTED; do
        xenstore-write "/local/domain/$(xl domid "$1")/device/vbd/$vbd/trusted" 0
    done
    [ -z "$GUEST_UNTRUSTED" ] || xl unpause "$1"
    xenstore-ls -f | grep -E 'backend/|device/vbd' || true
}

guest_lives() {
    xl domid "$1" >/dev/null 2>&1
}

# NAME COMMAND: has a guest whose job is `agent` run it in its shell; prints what that prints, and fails if
# it fails.
ask() {
    number=$(cut -d' ' -f1 /proc/uptime)
    data=/local/domain/$(xl domid "$1")/data || fail "$1 is not there to be asked: $2"
    # The first event tells that the watch is set, the second one that there is an answer.
    xenstore-watch -n 2 "$data/answer" | {
        read -r _
        xenstore-write -R "$data/ask" "$number $2"
        read -r _
    }
    answer=$(xenstore-read -R "$data/answer" 2>/dev/null) && [ "${answer%% *}" = "$number" ] \
        || fail "$1 ended while asked: $2"
    answer=${answer#* }
    echo "${answer#* }"
    [ "${answer%% *}" = 0 ] || fail "$1: $2: ${answer#* }"
}

# Ends a guest whose job is `agent`, and passes its results on.
end_guest() {
    xenstore-write "/local/domain/$(xl domid "$1")/data/ask" 'end true'
    guest_results "$1"
}

# EXPECTED COMMAND...: waits until the command prints that, or a smaller number; what has ended may take a
# while to be gone.
settles() {
    expected=$1
    shift
    tries=0
    until seen=$("$@") && { [ "$seen" = "$expected" ] || [ "$seen" -lt "$expected" ] 2>/dev/null; }; do
        tries=$((tries + 1))
        if [ $tries -gt 60 ]; then
            echo "$expected" >/run/expected
            echo "$seen" >/run/seen
            fail "$*: $(diff /run/expected /run/seen | grep '^[-+][^-+]' | head -8)"
        fi
        sleep 0.5
    done
}

# The names of all nodes in xenstore but those that are the domains' own business.
nodes() {
    xenstore-ls -f / | sed 's/ = .*//' | grep -vE '^/(tool.*|libxl|vm)$|/data/|^/local/domain/0/backend/[a-z0-9]*$' | sort
}

# Waits until the guest NAME has switched itself off, and passes its results on.
guest_results() {
    while guest_lives "$1"; do sleep 1; done
    log="/var/log/xen/console/guest-$1.log"
    tr -d '\r' <"$log" | sed -n 's/^@result //p' >/dev/ttyS1
    grep -q '"name":"done"' "$log" || fail "guest $1 did not finish its job"
}

# Nothing of a disk may be left in xenstore.
nothing_left() {
    for kind in vbd vbd3; do
        left=$(xenstore-ls -f "/local/domain/${1:-0}/backend/$kind" 2>/dev/null | grep state || true)
        [ -z "$left" ] || fail "a disk is left in xenstore"
    done
}

# As guest_results, with the statistics of the kernel's backend.
kernel_results() {
    while guest_lives "$1"; do
        for dir in /sys/bus/xen-backend/devices/vbd-*/statistics; do
            # A ring's statistics go with it: the last look that shows something counts.
            (cd "$dir" 2>/dev/null && grep -s . *) >/run/stats.new || true
            grep -q ':[1-9]' /run/stats.new && tr '\n' ' ' </run/stats.new >"/run/stats.$(basename "${dir%/*}")"
        done
        sleep 2
    done
    for file in /run/stats.vbd-*; do
        [ -s "$file" ] && result blkback "{\"device\":\"${file#/run/stats.}\",\"statistics\":\"$(cat "$file")\"}"
    done
    guest_results "$1"
}

# As guest_results, with blkback's statistics; nothing may be left when the guest NAME is gone.
blkback_results() {
    while guest_lives "$1"; do
        # A ring's statistics go with it: the last look that shows something counts.
        blkback stats --json >/run/stats.new 2>/dev/null && grep -Eq '"wr_req": ?[1-9]' /run/stats.new \
            && mv /run/stats.new /run/stats
        sleep 5
    done
    [ -s /run/stats ] && result blkback "$(cat /run/stats)"
    guest_results "$1"
    # A daemon that is stopped earlier keeps the records of its disks for its successor.
    settles '' records
    stop_blkback
    nothing_left
}
