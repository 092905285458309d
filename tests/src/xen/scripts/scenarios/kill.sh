# kill -9 of blkback under load, five times, and an end in good order: Linux's xen-blkfront in a guest goes on
# without an error.
KILLS=5
# So slow that requests are always in flight, even when the kernel has torn down the daemon's memory: their
# pages must not be the guest's then (Platform::may_pin).
ram_disk 256 100
file_disk 64
start_blkback
create_guest guest 'load seconds=120' 'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0' \
    'vdev=xvdb,format=raw,access=rw,backendtype=phy,target=/dev/loop0'
until grep -q 'load begins' /var/log/xen/console/guest-guest.log; do
    guest_lives guest || fail "the guest has ended"
    sleep 1
done
# Requests that the daemon has taken.
requests() {
    blkback stats --json 2>/dev/null | grep -oE '"(rd|wr)_req": *[0-9]+' | grep -oE '[0-9]+$' |
        { sum=0; while read -r n; do sum=$((sum + n)); done; echo $sum; }
}
# Waits until a daemon is at work.
under_load() {
    sleep 4
    until [ "$(requests)" -gt 500 ]; do
        guest_lives guest || fail "the guest ended after $kill kills"
        sleep 1
    done
}
kill=0
while [ $kill -lt $KILLS ]; do
    under_load
    kill -9 $backend
    wait $backend || true
    # Rings that share a thread wait elsewhere than a ring that has its own.
    run_blkback --threads $((4 - kill % 2 * 2))
    kill=$((kill + 1))
    echo "dom0: killed blkback $kill times"
done
under_load
stop_blkback
echo "dom0: stopped blkback"
run_blkback
blkback_results guest
# Two disks with two rings each.
taken_up=$(grep -c 'going on where the last backend stopped' /run/blkback.log)
busy=$(grep 'going on where' /run/blkback.log | grep -vc 'open=0$') || true
result kills "{\"kills\":$KILLS,\"rings_taken_up\":$taken_up,\"with_requests_open\":$busy}"
[ "$taken_up" = $((KILLS * 4 + 4)) ] || fail "$taken_up rings were taken up"
[ "$busy" -ge $KILLS ] || fail "requests were in flight on $busy rings only"
! grep -E 'WARN|ERROR' /run/blkback.log || fail "blkback has warned"
! grep -v 'data="persistent grants, bounced"' /run/blkback.log | grep 'rings attached' || fail "pages of the guest were pinned"
! dmesg | grep -E 'BUG:|WARNING:' || fail "dom0's kernel has warned"
