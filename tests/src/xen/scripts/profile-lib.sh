# The parts of profiles, for dom0 as for a guest.
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null || true
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null || true
# Otherwise the kernel samples less and less often, because interrupts take long on an emulated CPU.
echo 0 >/proc/sys/kernel/perf_cpu_time_max_percent

# LINES TITLE COMMAND...: what the command prints, if it prints anything, is a report.
show() {
    lines=$1 title=$2
    shift 2
    "$@" >/run/report 2>/run/report.err && [ -s /run/report ] || fail "$title: $(tail -3 /run/report.err)"
    text report "$title
$(head -n "$lines" /run/report | sed 's/[- ]*$//')"
}

# The kernel patches its code for the first event of a kind, and after the last one. A PV CPU that traps
# into code being patched takes its event channels first: by then the patching may be over, nobody knows of
# the trap, and the kernel dies with `Oops: int3`, or hangs. So it is done once, while there is one CPU, and
# kept: perf watches a program that sleeps.
keep_patched() {
    echo 0 >/sys/devices/system/cpu/cpu1/online || fail "cannot do with one CPU"
    sleep 100000 &
    perf stat -e task-clock,lock:contention_begin,lock:contention_end,raw_syscalls:sys_enter,raw_syscalls:sys_exit \
        -p $! >/dev/null 2>/run/kept &
    until [ "$(ls -l /proc/$!/fd | grep -c perf_event)" -ge 5 ]; do
        kill -0 $! || fail "perf stat: $(cat /run/kept)"
        sleep 0.5
    done
    echo 1 >/sys/devices/system/cpu/cpu1/online
}

# SECONDS FILE OPTION...: samples where the CPUs are, and by whose calls. Without a vPMU there are no
# hardware events; an emulated CPU bears 99 timer interrupts a second.
sample() {
    time=$1 file=$2
    shift 2
    perf record -q -a -g -F 99 -e cpu-clock -o "$file" "$@" -- sleep "$time" || fail "perf record"
}

# FILE OPTION...: a report on these samples, without perf's own comments. (Inlined functions take minutes to
# find.)
sampled() {
    file=$1
    shift
    perf report -i "$file" --stdio --no-inline -g none "$@" | grep -v -e '^#' -e '^ *$'
}

# FILE: samples as lines of `COMMAND;CALLER;...;CALLEE COUNT`, which programs for flame graphs read.
folded() {
    perf report -i "$1" --stdio --no-inline --no-children -n -s comm -g folded,0,caller,count | awk '
        /^ / { sub(/^[ 0-9.%]*/, ""); sub(/ *$/, ""); command = $0 }
        /^[0-9]/ { count = $1; sub(/^[0-9]* /, ""); print command ";" $0 " " count }'
}

# COMMAND...: locks that were waited for while it runs, and by whom. (Linux 6.1's perf prints that to
# stderr.)
locks() {
    perf lock record -q -a -o /run/lock.data -- "$@" >/dev/null || fail "perf lock record"
    perf lock contention -i /run/lock.data 2>&1 | grep .
}

# SECONDS DEVICE: the life of its requests: queued (Q), given to the driver (D), completed (C). There are
# none while tracing begins and ends, because that patches code, too.
trace_blocks() {
    cd /run
    rm -f trace.*
    hold
    blktrace -d "$2" -o trace >/run/blktrace.out 2>&1 &
    trace=$!
    until [ -e trace.blktrace.1 ]; do
        kill -0 $trace || fail "blktrace: $(cat /run/blktrace.out)"
        sleep 0.5
    done
    go_on
    sleep "$1"
    hold
    kill -INT $trace
    wait $trace || fail "blktrace: $(cat /run/blktrace.out)"
    go_on
    blkparse -q -i trace -d trace.bin >/run/blkparse.out
    grep -q ' C ' /run/blkparse.out || fail "blktrace has seen nothing"
    cd /
}
times_of_blocks() {
    btt -i /run/trace.bin | sed -n '/All Devices/,/Device Overhead/p' | grep -E 'MIN|^[A-Z]2'
}

# ROW: in a guest, fio runs this row until unload.
load() {
    seconds=600
    before=$(cat /sys/block/xvda/stat)
    time_fio "$1" /dev/xvda $(grep "^$1 " /scripts/rows | cut -d' ' -f2-) &
    load=$!
    until [ "$(cat /sys/block/xvda/stat)" != "$before" ]; do sleep 0.2; done
}
hold() {
    killall -STOP fio
    sleep 1
}
go_on() {
    killall -CONT fio
}
unload() {
    killall fio
    wait $load || true
}
