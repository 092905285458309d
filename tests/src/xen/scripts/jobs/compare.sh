# Measures disks beside each other: disks=BACKEND:DISK,... rounds=N seconds=N. dom0 reads its counters
# before and after each row; the two keep in step through xenstore.
modprobe xen-blkfront

mkfifo /run/done
xenstore-watch data/done >/run/done &
exec 3</run/done

# NAME: until dom0 has done its part of this step.
step() {
    xenstore-write data/step "$1"
    while read -r _ <&3; do
        [ "$(xenstore-read data/done 2>/dev/null)" = "$1" ] && return
    done
}

# Events that the kernel's frontend has taken.
events() {
    awk '$NF == "blkif" { for (k = 2; k < 4; k++) n += $k } END { print n + 0 }' /proc/interrupts
}

# ROUND BACKEND DISK
measure() {
    while read -r row arguments; do
        step "$1 $2 $row"
        before=$(events)
        time_fio "$row" "/dev/$3" $arguments </dev/null || text failure "fio $row on $2: $(cat /run/fio.out)"
        after=$(events)
        step "$1 $2 $row end"
        printf '@result {"name":"row","value":{"round":%s,"backend":"%s","row":"%s","guest_events":%s,"fio":%s}}\n' \
            "$1" "$2" "$row" $((after - before)) "$(cat /run/fio.result)"
    done </scripts/rows
}

for disk in $(echo "$disks" | tr ',' ' '); do
    until [ -b "/dev/${disk#*:}" ]; do sleep 0.2; done
done
text blkfront "$(dmesg | grep blkfront:)"
round=1
while [ $round -le "$rounds" ]; do
    for disk in $(echo "$disks" | tr ',' ' '); do
        measure $round "${disk%:*}" "${disk#*:}"
    done
    # dom0's turn.
    step "$round direct"
    round=$((round + 1))
done
xenstore-write data/step end
text done ""
