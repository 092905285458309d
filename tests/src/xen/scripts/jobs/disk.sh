# Uses the disk /dev/xvda in every way there is, with its data verified. With the word short=1 it is not timed.
. /scripts/disk-lib.sh
modprobe xen-blkfront max_ring_page_order=4
tries=0
until [ -b /dev/xvda ]; do
    sleep 0.2
    tries=$((tries + 1))
    [ $tries -gt 150 ] && { text failure "no /dev/xvda"; dmesg | tail -20; poweroff -f; }
done
queue=/sys/block/xvda/queue
text blkfront "$(dmesg | grep -E 'blkfront|xvda')"
text queues "$(ls /sys/block/xvda/mq)"
text queue "$(cd $queue && grep -s . max_segments max_hw_sectors_kb nr_requests discard_max_bytes \
    write_cache fua logical_block_size physical_block_size)"
verify_disk /dev/xvda
[ -n "$short" ] || time_disk /dev/xvda
if [ -b /dev/xvdb ]; then
    report discard discard /dev/xvdb
    # The toolstack has called the backend of xvdb untrusted.
    if [ "$untrusted" = xvdb ]; then
        bounces=$(dmesg | grep 'xvdb: .*bounce buffer: enabled')
        text untrusted "$bounces"
        [ -n "$bounces" ] || text failure "an untrusted backend, and no bounce buffer"
    fi
fi
report filesystem filesystem /dev/xvda
text dmesg-errors "$(dmesg | grep -E 'I/O error|blkfront:.*([Bb]ad|error|invalid)|BUG:|WARNING:' | head -5)"
text done ""
