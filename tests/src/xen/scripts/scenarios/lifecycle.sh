# Disks attached and detached 20 times and resized under a running guest, which is then rebooted, and destroyed under load.
ram_disk 256
file_disk 64
start_blkback
until [ -S /run/blkback/stats.sock ]; do sleep 0.1; done
xvda='vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0'
xvdb='vdev=xvdb,format=raw,access=rw,backendtype=phy,target=/dev/loop0'
idle=$(opened)
empty=$(nodes)

# Entries of the guest's grant table that are in use by others.
granted() {
    xl dmesg -c >/dev/null
    xl debug-keys g
    xl dmesg | awk -v guest="d$(xl domid guest) " '
        /grant-table for remote/ { in_it = index($0, guest) }
        in_it && /^\(XEN\) \[0x/ { entries++ }
        END { print entries + 0 }'
}

GUEST_REBOOT=restart
create_guest guest agent "$xvda"
ask guest 'until [ -b /dev/xvda ]; do sleep 0.1; done'
# Through both of its rings: the thread of a ring opens its gntdev with the first page that it maps.
for cpu in 0 1; do
    ask guest "fio --name=ring --filename=/dev/xvda --rw=read --bs=4k --size=64k --direct=1 --cpus_allowed=$cpu"
done
guest_nodes=$(nodes)
guest_opened=$(opened)
guest_mapped=$(mapped)
guest_granted=$(granted)
for cycle in $(seq 20); do
    xl block-attach guest "$xvdb" || fail "attach $cycle"
    ask guest "use_disk /dev/xvdb $cycle"
    xl block-list guest | tee /run/list | grep -q '^51728 .* 4 ' || fail "not listed: $(tr '\n' ';' </run/list)"
    xl block-detach guest xvdb || fail "detach $cycle"
    ask guest 'while [ -b /dev/xvdb ]; do sleep 0.1; done'
    echo "dom0: cycle $cycle after $(cut -d' ' -f1 /proc/uptime) s: $(opened), $(mapped) maps"
done
settles "$guest_nodes" nodes
settles "$guest_opened" opened
settles "$guest_mapped" mapped
settles "$guest_granted" granted
result cycles "\"20; before and after: $guest_opened, $guest_mapped maps, $guest_granted grants\""

# A disk grows under the guest.
xl block-attach guest "$xvdb"
ask guest 'use_disk /dev/xvdb 0'
truncate -s 96M /tmp/disk.raw
losetup -c /dev/loop0
kill -HUP $backend
ask guest 'until [ $(cat /sys/block/xvdb/size) = 196608 ]; do sleep 0.1; done; use_disk /dev/xvdb 95'
result resized '"from 64 to 96 MiB, and the last one is used"'

# A guest that reboots has the same disks, xvdb too.
ask guest 'tr "\0" x </dev/zero | dd of=/dev/xvda bs=1M count=8 iflag=fullblock conv=fsync'
first=$(xl domid guest)
xenstore-write "/local/domain/$first/data/ask" '1 reboot -f'
until again=$(xl domid guest 2>/dev/null) && [ "$again" != "$first" ]; do sleep 1; done
ask guest 'until [ -b /dev/xvda ]; do sleep 0.1; done; [ $(dd if=/dev/xvda bs=1M count=8 | tr -d x | wc -c) = 0 ]'
ask guest 'use_disk /dev/xvdb 94'
result rebooted "\"from d$first to d$again\""

# Destroyed while it writes.
ask guest 'for disk in xvda xvdb; do fio --name=load --filename=/dev/$disk --ioengine=libaio --direct=1 \
    --rw=randwrite --bs=4k --iodepth=32 --size=32M --time_based --runtime=600 >/dev/null 2>&1 & done; sleep 3'
xl destroy guest
settles "$empty" nodes
settles "$idle" opened
settles 0 mapped
# A domain stays, without a name, as long as a page of it is mapped.
xl list | tail -n +2 >/run/list
[ "$(wc -l </run/list)" = 1 ] || fail "a domain is left: $(tr '\n' ';' </run/list)"
result left "\"$(opened), $(mapped) maps\""
stop_blkback
