# What guests do with a block device, with its data verified.

# NAME DEVICE ARGUMENTS...: a fio job, which is a result. (All variables are global.)
job() {
    run_fio "$@"
    cat /run/fio.out
    result fio /run/fio.result
    text "fio-status" "$1 $fio_status"
    [ $fio_status = 0 ] || text failure "fio $1: $(cat /run/fio.out)"
}

# DEVICE: writes at every size, reads, and flushes; a quarter of it with the word short=1.
verify_disk() {
    verify="--verify=crc32c --verify_fatal=1"
    job verify-4k "$1" --rw=randwrite --bs=4k --iodepth=32 --size=$((short ? 2 : 8))M $verify
    job verify-sizes "$1" --rw=randwrite --bsrange=512-256k --blockalign=512 --iodepth=16 \
        --size=$((short ? 4 : 16))M $verify
    job verify-mixed "$1" --rw=randrw --bs=8k --iodepth=8 --size=$((short ? 1 : 4))M \
        --numjobs=2 --offset_increment=4M --fsync=16 $verify
}

# DEVICE MIB: waits for the disk; what is written to this mebibyte must be read back.
use_disk() {
    until [ -b "$1" ]; do sleep 0.1; done
    dd if=/dev/urandom of=/run/written bs=64k count=16 || return 1
    dd if=/run/written of="$1" bs=64k seek=$((16 * $2)) oflag=direct conv=notrunc || return 1
    dd if="$1" bs=64k skip=$((16 * $2)) count=16 iflag=direct | cmp - /run/written
}

# DEVICE: random reads and writes, timed.
time_disk() {
    timed="--time_based --runtime=5 --size=100%"
    job randread "$1" --rw=randread --bs=4k --iodepth=32 $timed
    job randwrite "$1" --rw=randwrite --bs=4k --iodepth=32 $timed
}

# NAME FUNCTION DEVICE: the last line that the function prints is the result.
report() {
    if "$2" "$3" >/run/report.out 2>&1; then
        text "$1" "$(tail -1 /run/report.out)"
    else
        text failure "$1 of $3: $(cat /run/report.out)"
    fi
}

# DEVICE: what is discarded must read as zeroes, and what is beside it must not.
discard() {
    most=$(cat "/sys/block/${1#/dev/}/queue/discard_max_bytes")
    [ "$most" -gt 0 ] || { echo "not offered"; return 1; }
    tr '\0' x </dev/zero | dd of="$1" bs=1M count=8 iflag=fullblock conv=fsync || return 1
    blkdiscard -o 1048576 -l 4194304 "$1" || return 1
    echo 3 >/proc/sys/vm/drop_caches
    for mib in 0 1 4 5; do
        dd if="$1" bs=1M skip=$mib count=1 2>/dev/null | tr -d '\0' | wc -c
    done >/run/left
    [ "$(tr '\n' ' ' </run/left)" = "1048576 0 0 1048576 " ] || { cat /run/left; return 1; }
    echo "at most $most bytes at once"
}

# DEVICE: files must be what they were, also when it is mounted again.
filesystem() {
    modprobe crc32c_generic 2>/dev/null
    modprobe ext4
    # busybox has these too, and would prefer its own.
    /usr/sbin/mke2fs -q -t ext4 "$1" && mount -t ext4 "$1" /mnt || return 1
    mkdir /mnt/files
    cp /usr/bin/fio /usr/bin/busybox /usr/lib/x86_64-linux-gnu/libc*.so* /mnt/files/ || return 1
    (cd /mnt/files && md5sum * >/run/sums) || return 1
    umount /mnt && /usr/sbin/e2fsck -f -n "$1" >/run/checked-fs || { cat /run/checked-fs; return 1; }
    mount -t ext4 -o ro "$1" /mnt || return 1
    (cd /mnt/files && md5sum -c /run/sums >/run/checked) || return 1
    umount /mnt
    echo "clean: $(wc -l </run/checked) files, $(tail -1 /run/checked-fs)"
}
