# Loads both disks for $seconds, every byte verified: fio on xvda, a file system on xvdb.
. /scripts/disk-lib.sh
modprobe xen-blkfront max_ring_page_order=4
modprobe crc32c_generic 2>/dev/null
modprobe ext4
tries=0
until [ -b /dev/xvda ] && [ -b /dev/xvdb ]; do
    sleep 0.2
    tries=$((tries + 1))
    [ $tries -gt 150 ] && fail "no disks"
done

# Copies programs over and over, and compares them, until /run/enough is there. Shows how often.
files() {
    /usr/sbin/mke2fs -q -t ext4 /dev/xvdb || return 1
    rounds=0
    until [ -e /run/enough ] && [ $rounds -gt 0 ]; do
        mount -t ext4 /dev/xvdb /mnt || return 1
        rm -rf /mnt/files
        mkdir /mnt/files
        cp /usr/bin/fio /usr/bin/busybox /usr/lib/x86_64-linux-gnu/libc*.so* /mnt/files/ || return 1
        (cd /mnt/files && md5sum * >/run/sums) || return 1
        umount /mnt && /usr/sbin/e2fsck -f -n /dev/xvdb || return 1
        # What is read now comes from the disk.
        mount -t ext4 -o ro /dev/xvdb /mnt || return 1
        (cd /mnt/files && md5sum -c /run/sums >/run/checked) || return 1
        umount /mnt || return 1
        rounds=$((rounds + 1))
    done
    echo "$rounds rounds"
}
files >/run/files.out 2>&1 &
files=$!
echo "guest: load begins"
job load /dev/xvda --rw=randwrite --bs=4k --iodepth=32 --size=4M --numjobs=2 --offset_increment=4M \
    --time_based --runtime="$seconds" --verify=crc32c --verify_fatal=1 --verify_state_save=0
touch /run/enough
if wait $files; then
    text filesystem "clean after $(tail -1 /run/files.out)"
else
    text failure "files: $(cat /run/files.out)"
fi
errors=$(dmesg | grep -E 'I/O error|blkfront:.*([Bb]ad|error|invalid)|EXT4-fs error|BUG:|WARNING:|hung' | head -5)
[ -z "$errors" ] || text failure "dmesg: $errors"
text done ""
