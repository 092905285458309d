# What dom0 and guests have in common.

# TEXT: as a JSON string, without characters that would need escaping.
quoted() {
    printf '"%s"' "$(printf %s "$1" | tr '\t' ' ' | tr -d '\000-\011\013-\037"\\' |
        awk 'NR > 1 { printf "\\n" } { printf "%s", $0 }')"
}

# MIB [MILLISECONDS]: a disk in RAM, /dev/nullb0, whose requests take that long. (Its emulated write cache
# can lock up Linux 6.12.)
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
    if [ -n "${2:-}" ]; then
        # By a timer.
        echo 2 >$d/irqmode
        echo "${2}000000" >$d/completion_nsec
    fi
    echo 1 >$d/power
    until [ -b /dev/nullb0 ]; do sleep 0.1; done
}

# MIB: a disk on a file, /dev/loop0, with a write cache, and with discard, which frees the file's space.
file_disk() {
    modprobe loop
    truncate -s "${1}M" /tmp/disk.raw
    losetup /dev/loop0 /tmp/disk.raw
}

# OPTION...: starts blkback.
run_blkback() {
    blkback serve --platform xen "$@" --listen unix:/run/blkback/stats.sock >>/run/blkback.log 2>&1 &
    backend=$!
}

# As run_blkback, and shows what it says.
start_blkback() {
    run_blkback "$@"
    tail -F /run/blkback.log 2>/dev/null &
}

# Stops blkback, in twice the time that its service has for that.
stop_blkback() {
    kill -0 $backend || fail "blkback has ended: $(tail -1 /run/blkback.log | tr -d '\"')"
    kill -TERM $backend
    (sleep 20 && grep '' /proc/$backend/task/*/comm /proc/$backend/task/*/stack; kill -9 $backend) &
    patience=$!
    wait $backend || fail "blkback did not end well"
    kill $patience || true
}

# What blkback has open, and how much of other domains it has mapped. One gntdev is its claim on the domain,
# and its first thread keeps the one that it has used once; tokio has one or two threads, which look at the
# sizes of disks.
opened() {
    ls -l /proc/$backend/fd | awk -v threads="$(cat /proc/$backend/task/*/comm | grep -vc tokio)" '
        /gntdev$/ { gntdev++; next }
        END { print NR - gntdev " files, " (gntdev > 2 ? gntdev : 2) " gntdev, " threads " threads" }'
}
mapped() {
    grep -c gntdev /proc/$backend/maps || true
}

# What blkback keeps of requests in flight, for its successor.
records() {
    ls /run/blkback | grep -v stats.sock || true
}

# FILE: the JSON that fio has written there, on one line. Warnings come first.
fio_json() {
    sed -n '/^{/,$p' "$1" | tr -d '\n\r'
}

# NAME DEVICE ARGUMENTS...: a fio job. Leaves its result in /run/fio.result, on one line, and what it prints
# in /run/fio.out.
run_fio() {
    fio_name=$1 fio_device=$2
    shift 2
    fio --name="$fio_name" --filename="$fio_device" --ioengine=libaio --direct=1 --group_reporting \
        --clat_percentiles=0 --lat_percentiles=0 --output-format=json --output=/run/fio.json "$@" >/run/fio.out 2>&1
    fio_status=$?
    fio_json /run/fio.json >/run/fio.result
    return $fio_status
}

# NAME DEVICE ARGUMENTS...: as run_fio, for $seconds.
time_fio() {
    run_fio "$@" --time_based --runtime="$seconds" --norandommap
}
