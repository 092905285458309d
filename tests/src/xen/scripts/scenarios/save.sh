# A guest that is saved and restored, twice, while its fio goes on with verify. (Debian's Xen cannot migrate PV guests.)
ram_disk 256
start_blkback
until [ -S /run/blkback/stats.sock ]; do sleep 0.1; done
idle=$(opened)
empty=$(nodes)
create_guest guest agent 'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0'
ask guest 'use_disk /dev/xvda 64'
mkfifo /run/image
for round in 1 2; do
    before=$(xl domid guest)
    ask guest 'touch /run/on; rm -f /run/runs; (while [ -e /run/on ]; do fio --name=saved --filename=/dev/xvda \
        --ioengine=libaio --direct=1 --rw=randrw --bs=8k --iodepth=8 --size=4M --verify=crc32c --verify_fatal=1 \
        >/run/fio.out 2>&1 || break; echo >>/run/runs; done) & fio=$!; sleep 5'
    # Uncompressed, the image is too large for dom0's memory.
    gzip -1 </run/image >/tmp/image.gz &
    xl save guest /run/image || fail "save"
    settles "$empty" nodes
    settles "$idle" opened
    settles 0 mapped
    zcat /tmp/image.gz >/run/image &
    xl restore /run/image || fail "restore"
    ask guest 'sleep 5; [ -e /run/on ] && rm /run/on && wait $fio; grep -E "err=|verify" /run/fio.out; grep -q "err= 0" /run/fio.out'
    ask guest "use_disk /dev/xvda $((64 + round))"
    result restored "\"from d$before to d$(xl domid guest), and fio had run $(ask guest 'wc -l </run/runs') times\""
done
ask guest '! dmesg | grep -E "I/O error|blkfront:.*(bad|error|invalid)"'
end_guest guest
settles "$empty" nodes
settles "$idle" opened
settles 0 mapped
stop_blkback
