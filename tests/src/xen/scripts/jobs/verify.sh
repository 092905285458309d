# Writes xvda and xvdb, and reads back what was written, until dom0 writes data/enough. Not at full speed:
# dom0 needs the emulated CPUs for what it does meanwhile.
modprobe xen-blkfront
for disk in xvda xvdb; do
    tries=0
    until [ -b /dev/$disk ]; do
        sleep 0.2
        tries=$((tries + 1))
        [ $tries -lt 150 ] || fail "no /dev/$disk"
    done
done
echo "guest: verifying"
until xenstore-exists data/enough; do
    for disk in xvda xvdb; do
        fio --name=$disk --filename=/dev/$disk --ioengine=libaio --direct=1 --rw=randwrite \
            --bsrange=4k-64k --iodepth=8 --rate=2m --size=4M --verify=crc32c --verify_fatal=1 \
            --output-format=json --output=/run/$disk.json >/run/$disk.out 2>&1 &
        eval "$disk=$!"
    done
    for disk in xvda xvdb; do
        eval "pid=\$$disk"
        wait $pid || text failure "fio on $disk: $(cat /run/$disk.out /run/$disk.json | head -c 2000)"
        fio_json /run/$disk.json >/run/fio.result
        result fio /run/fio.result
        sed '/"write"/,$d' /run/$disk.json | grep -q '"total_ios" : [1-9]' ||
            text failure "fio on $disk has read nothing back"
    done
done
text dmesg-errors "$(dmesg | grep -E 'I/O error|blkfront:.*([Bb]ad|error|invalid)|BUG:|WARNING:' | head -5)"
text done ""
