# Where time goes on blkback: perf, lock contention and blktrace, in dom0 and in the guest.
# needs: profilers
seconds=15
ram_disk 256
start_blkback
create_guest guest "profile seconds=$seconds" \
    'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0'
domain="/local/domain/$(xl domid guest)"

# TITLE COMMAND...: its output as a result.
report() {
    title=$1
    shift
    "$@" >/run/report 2>&1 || true
    result report "\"$title|$(head -40 /run/report | tr -d '\r"\\' | tr '\t\n' ' |')\""
}
until [ "$(xenstore-read "$domain/data/step" 2>/dev/null)" = load ]; do sleep 0.2; done
perf record -q -a -e cpu-clock -o /run/perf.data sleep 4 || fail "perf in dom0"
report "dom0: perf" perf report -i /run/perf.data --stdio --sort comm,dso,symbol --percent-limit 1
perf lock record -q -a -o /run/lock.data sleep 3 >/dev/null 2>&1 || fail "perf lock in dom0"
report "dom0: contended locks" perf lock contention -i /run/lock.data
report "blkback stats" blkback stats
blkback_results guest
