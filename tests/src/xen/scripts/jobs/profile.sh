# Profiles the guest's side of a disk under the IOmeter job: seconds=N.
modprobe xen-blkfront
until [ -b /dev/xvda ]; do sleep 0.2; done
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null

report() {
    title=$1
    shift
    "$@" >/run/report 2>&1
    text report "$title
$(head -40 /run/report | tr '\t' ' ')"
}
run_fio $(grep ^iometer /scripts/rows | sed 's| | /dev/xvda |') || text failure "fio: $(cat /run/fio.out)" &
load=$!
sleep 3
xenstore-write data/step load
perf record -q -a -e cpu-clock -o /run/perf.data sleep 3 || text failure "perf in the guest"
report "guest: perf" perf report -i /run/perf.data --stdio --sort comm,dso,symbol --percent-limit 1
perf lock record -q -a -o /run/lock.data sleep 2 >/dev/null 2>&1 || text failure "perf lock in the guest"
report "guest: contended locks" perf lock contention -i /run/lock.data
wait $load
report "fio" grep -E '"(iops|iops_mean|total_ios)" ' /run/fio.json

# The life of requests, once the load is over: a trace may be started and stopped at any time.
fio --name=trace --filename=/dev/xvda --ioengine=libaio --direct=1 --time_based --runtime=4 \
    --rw=randread --bs=4k --iodepth=4 >/dev/null 2>&1 &
cd /run || exit
blktrace -d /dev/xvda -w 1 -o trace >/dev/null 2>&1 || text failure "blktrace"
blktrace -d /dev/xvda -w 1 -o again >/dev/null 2>&1 || text failure "blktrace, a second time"
wait
report "guest: blkparse" sh -c 'blkparse -i trace -d trace.bin | tail -30'
report "guest: btt" sh -c 'btt -i trace.bin | sed -n "/All Devices/,/Device Overhead/p" | head -16'
text done ""
