# Uses the disks xvda and xvdb through blkfront, as block devices of this guest: $via is nbd or ublk.
. /scripts/disk-lib.sh
export RUST_LOG=info
# The kernel's frontend would take the disks: it is a module, and nothing loads it.
[ -d /sys/module/xen_blkfront ] && text failure "xen-blkfront is loaded"

# Under emulation on a busy machine, a backend can take long.
patience="--connect-timeout 60"

text info "$(blkfront info xvda $patience --vcpus 2 --split --ring-order 2)"
blkfront info xvda $patience --json >/run/info.json || text failure "blkfront info"
result info /run/info.json
grep -q '"trusted": false' /run/info.json || text failure "xvda is not called untrusted"

case $via in
nbd)
    modprobe nbd nbds_max=2
    device=/dev/nbd
    ;;
ublk)
    modprobe ublk_drv
    device=/dev/ublkb
    ;;
esac

# N ARGUMENTS...: makes a device of a disk and waits until it is there.
start() {
    n=$1
    shift
    case $via in
    nbd) set -- nbd "$@" --device "$device$n" ;;
    ublk) set -- ublk "$@" --id "$n" ;;
    esac
    blkfront "$@" $patience --stats >"/run/front$n" 2>"/run/front$n.log" &
    eval "front$n=$!"
    tries=0
    until grep -q "^$device$n" "/run/front$n"; do
        sleep 0.2
        tries=$((tries + 1))
        kill -0 $! 2>/dev/null && [ $tries -lt 600 ] && continue
        return 1
    done
}
# N: removes it again, and reports what it has done.
stop() {
    eval "pid=\$front$1"
    kill -TERM "$pid"
    wait "$pid" || text failure "blkfront did not end well: $(tail -3 "/run/front$1.log")"
    cat "/run/front$1.log"
    sed 1d "/run/front$1" >/run/stats.json
    result blkfront /run/stats.json
}

# xen-gntalloc's limit is for all processes together, and too low for two vCPUs.
limit=/sys/module/xen_gntalloc/parameters/limit
text gntalloc-limit "$(cat $limit)"
if start 0 xvda --vcpus 2; then
    text failure "two vCPUs did with $(cat $limit) grants"
    stop 0
fi
text no-grants "$(tail -1 /run/front0.log)"
grep -q $limit /run/front0.log || text failure "not told what to do: $(cat /run/front0.log)"
echo 16384 >$limit

start 0 xvda --vcpus 2 --split || text failure "$(cat /run/front0.log)"
if [ "$via" = nbd ]; then
    blkfront nbd xvdb $patience --device ${device}0 2>/run/busy.log && text failure "a device twice"
    text busy "$(tail -1 /run/busy.log)"
fi
start 1 xvdb --ring-order 1 || text failure "$(cat /run/front1.log)"
blkfront info xvda $patience 2>/run/twice.log && text failure "a disk in use was opened once more"
grep -q "is in use" /run/twice.log || text failure "not told that the disk is in use: $(cat /run/twice.log)"
text queues "$(ls "/sys/block/${device#/dev/}0/mq")"
text queue "$(cd "/sys/block/${device#/dev/}0/queue" && grep -s . max_segments max_hw_sectors_kb \
    nr_requests discard_max_bytes write_cache fua logical_block_size physical_block_size)"
verify_disk ${device}0
time_disk ${device}0
report discard discard ${device}1
job verify-flush ${device}1 --rw=randrw --bs=8k --iodepth=8 --size=4M --fsync=16 --verify=crc32c \
    --verify_fatal=1
report filesystem filesystem ${device}0
stop 0
stop 1

# And without the kernel's help, over the union layout.
blkfront bench xvda $patience --rw randwrite --bssplit 512/10:4k/50:64k/30:256k/10 --iodepth 16 --numjobs 2 \
    --size 4m --verify=crc32c --json >/run/bench.json 2>/run/bench.log ||
    text failure "blkfront bench: $(tail -1 /run/bench.log)"
result bench /run/bench.json
text dmesg-errors "$(dmesg | grep -E 'I/O error|nbd.*(error|timed out)|BUG:|WARNING:' | head -5)"

# The kernel looks for partitions before a device appears, which can be given up: this disk takes 20 s for
# each read. Afterwards blkfront waits for the backend, which has one in flight.
if [ "$via" = ublk ]; then
    blkfront ublk xvdc $patience --id 2 >/run/front2 2>/run/front2.log &
    slow=$!
    # N PATH: waits until it exists (0), or no longer exists (1).
    until_there() {
        tries=0
        while [ $tries -lt 300 ]; do
            [ -e "$2" ]
            [ $? = "$1" ] && return
            sleep 0.2
            tries=$((tries + 1))
        done
        text failure "$2 was waited for in vain"
    }
    until_there 0 /sys/block/ublkb2
    sleep 1
    since=$(date +%s)
    kill -TERM $slow
    until_there 1 /dev/ublkc2
    took=$(($(date +%s) - since))
    wait $slow || text failure "blkfront did not give up well: $(tail -3 /run/front2.log)"
    text slow-disk "given up in $took s: $(tail -3 /run/front2.log)"
    [ $took -lt 10 ] || text failure "a slow disk was given up in $took s"
    [ -s /run/front2 ] && text failure "a slow disk was announced: $(cat /run/front2)"
fi
text done ""
