# Uses the disk /dev/xvda in every way there is, with its data verified.
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

# NAME ARGUMENTS...: a fio job on the disk.
job() {
    name=$1
    shift
    fio --name="$name" --filename=/dev/xvda --ioengine=libaio --direct=1 --group_reporting \
        --output-format=json --output=/run/fio.json "$@" >/run/fio.out 2>&1
    status=$?
    cat /run/fio.out
    # Warnings come first.
    sed -n '/^{/,$p' /run/fio.json >/run/fio.result
    result fio /run/fio.result
    text "fio-status" "$name $status"
    [ $status = 0 ] || text failure "fio $name: $(cat /run/fio.out)"
}

verify="--verify=crc32c --verify_fatal=1 --clat_percentiles=0 --lat_percentiles=0"
job verify-4k --rw=randwrite --bs=4k --iodepth=32 --size=8M $verify
job verify-sizes --rw=randwrite --bsrange=512-256k --blockalign=512 --iodepth=16 --size=16M $verify
job verify-mixed --rw=randrw --bs=8k --iodepth=8 --size=4M --numjobs=2 --offset_increment=4M \
    --fsync=16 $verify
timed="--time_based --runtime=5 --size=100% --clat_percentiles=0"
job randread --rw=randread --bs=4k --iodepth=32 $timed
job randwrite --rw=randwrite --bs=4k --iodepth=32 $timed

# xvdb: what is discarded reads as zeroes.
discard() {
    most=$(cat /sys/block/xvdb/queue/discard_max_bytes)
    [ "$most" -gt 0 ] || { echo "not offered"; return 1; }
    tr '\0' x </dev/zero | dd of=/dev/xvdb bs=1M count=8 iflag=fullblock conv=fsync || return 1
    blkdiscard -o 1048576 -l 4194304 /dev/xvdb || return 1
    echo 3 >/proc/sys/vm/drop_caches
    for mib in 0 1 4 5; do
        dd if=/dev/xvdb bs=1M skip=$mib count=1 2>/dev/null | tr -d '\0' | wc -c
    done >/run/left
    [ "$(tr '\n' ' ' </run/left)" = "1048576 0 0 1048576 " ] || { cat /run/left; return 1; }
    echo "at most $most bytes at once"
}
if [ -b /dev/xvdb ]; then
    if discard >/run/discard.out 2>&1; then
        text discard "$(tail -1 /run/discard.out)"
    else
        text failure "discard: $(cat /run/discard.out)"
    fi
fi

modprobe crc32c_generic 2>/dev/null
modprobe ext4
filesystem() {
    # busybox has these too, and would prefer its own.
    /usr/sbin/mke2fs -q -t ext4 /dev/xvda && mount -t ext4 /dev/xvda /mnt || return 1
    mkdir /mnt/files
    cp /usr/bin/fio /usr/bin/busybox /usr/lib/x86_64-linux-gnu/libc*.so* /mnt/files/ || return 1
    (cd /mnt/files && md5sum * >/run/sums) || return 1
    umount /mnt && /usr/sbin/e2fsck -f -n /dev/xvda || return 1
    mount -t ext4 -o ro /dev/xvda /mnt || return 1
    (cd /mnt/files && md5sum -c /run/sums >/run/checked) || return 1
    umount /mnt
}
if filesystem >/run/fs.out 2>&1; then
    text filesystem "clean: $(wc -l </run/checked) files, $(tail -1 /run/fs.out)"
else
    text failure "filesystem: $(cat /run/fs.out)"
fi
text dmesg-errors "$(dmesg | grep -E 'I/O error|blkfront:.*([Bb]ad|error|invalid)|BUG:|WARNING:' | head -5)"
text done ""
