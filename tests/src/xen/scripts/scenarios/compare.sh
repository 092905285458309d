# Linux's xen-blkback, QEMU's qdisk and blkback beside each other, and dom0 itself: use --suite trixie.
# One RAM disk, one guest with a disk of each backend on it; rows take turns.
rounds=3
seconds=2
ram_disk 256
modprobe xen-blkback
start_blkback --kinds vbd3

tracing=/sys/kernel/tracing
mount -t tracefs tracefs $tracing
# The register that holds the count argument of each of the kernel's grant operations.
grant_probes="gnttab_map_refs:cx gnttab_unmap_refs:cx gnttab_batch_copy:si"
start_probes() {
    for probe in $grant_probes; do
        echo "p:grants/${probe%:*} ${probe%:*} count=%${probe#*:}:u32" >>$tracing/kprobe_events || return 0
        echo "hist:keys=common_type:vals=count" >$tracing/events/grants/${probe%:*}/trigger
    done
}
read_probes() {
    for probe in $grant_probes; do
        printf '"%s":"%s",' "${probe%:*}" "$(grep -s -o -E 'hitcount: *[0-9]+ *count: *[0-9]+' \
            "$tracing/events/grants/${probe%:*}/hist" | tr -s ' ' | tail -1)"
    done
}

# Nanoseconds that threads have run: those of a process by number, or kernel threads by name.
ran() {
    cat /proc/"$1"/task/*/schedstat 2>/dev/null | awk '{ n += $1 } END { print n + 0 }'
}
ran_kernel() {
    for comm in $(grep -l -E '^[0-9]+\.xvd' /proc/[0-9]*/comm); do cat "${comm%comm}schedstat"; done 2>/dev/null \
        | awk '{ n += $1 } END { print n + 0 }'
}
counters() {
    busy=$(awk '/^cpu / { print $2 + $3 + $4 + $7 + $8 }' /proc/stat)
    kernel_events=$(awk '$NF ~ /^blkif-backend/ { n += $2 + $3 } END { print n + 0 }' /proc/interrupts)
    user_events=$(awk '$NF ~ /^evtchn:/ { n += $2 + $3 } END { print n + 0 }' /proc/interrupts)
    printf '{"busy_ticks":%s,"kernel_ns":%s,"qdisk_ns":%s,"ours_ns":%s,"kernel_events":%s,"user_events":%s,%s"step":"%s"}' \
        "$busy" "$(ran_kernel)" "$(ran "$qemu")" "$(ran "$backend")" "$kernel_events" "$user_events" \
        "$(read_probes)" "$1"
}

qemu=none
ours='format=raw,access=rw,backendtype=tap,script=block-blkback,target=/dev/nullb0'
create_guest guest "compare disks=kernel:xvda,qdisk:xvdb,ours:xvdc rounds=$rounds seconds=$seconds" \
    'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0' \
    'vdev=xvdb,format=raw,access=rw,backendtype=qdisk,target=/dev/nullb0' "vdev=xvdc,$ours"
domain="/local/domain/$(xl domid guest)"
qemu=$(xenstore-read "$domain/image/device-model-pid")
start_probes

xenstore-watch "$domain/data/step" | while read -r _; do
    step=$(xenstore-read "$domain/data/step" 2>/dev/null || true)
    case $step in
    # Not begun, or the guest is gone.
    '') guest_lives guest || break ;;
    end) break ;;
    *direct)
        while read -r row arguments; do
            time_fio "$row" /dev/nullb0 $arguments </dev/null || fail "fio $row in dom0"
            result row "{\"round\":${step% *},\"backend\":\"direct\",\"row\":\"$row\",\"fio\":$(cat /run/fio.result)}"
        done </scripts/rows
        ;;
    *) result counters "$(counters "$step")" ;;
    esac
    xenstore-write "$domain/data/done" "$step"
done
guest_results guest
stop_blkback
