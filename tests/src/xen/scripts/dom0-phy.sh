# Our backend in dom0 in the place of the kernel's, which is not loaded.
. /lib.sh
ram_disk 256
blkback serve --platform xen --listen unix:/run/blkback/stats.sock >/run/blkback.log 2>&1 &
backend=$!
tail -F /run/blkback.log &
create_guest guest 'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0'
while xl domid guest >/dev/null 2>&1; do
    # Those of a disk go with it: the last look counts.
    blkback stats --json >/run/stats.json 2>/dev/null \
        && [ -s /run/stats.json ] && cp /run/stats.json /run/stats.last
    sleep 5
done
[ -f /run/stats.last ] && result blkback "$(cat /run/stats.last)"
guest_results guest
kill -0 $backend || fail "blkback has ended: $(tail -1 /run/blkback.log | tr -d '\"')"
kill -TERM $backend
wait $backend || fail "blkback did not end well"
xenstore-ls -f /local/domain/0/backend/vbd 2>/dev/null | grep -q . && fail "a disk is left in xenstore"
true
