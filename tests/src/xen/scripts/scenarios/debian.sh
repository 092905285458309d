# A whole Debian with systemd: our package, guests' disks, restarts and an upgrade under load, purge.
package=/guest/xen-blk.deb
dpkg -i $package
systemctl --no-pager status blkback || fail "blkback.service is not active"
blkback doctor || fail "doctor finds something missing"
exposure=$(systemd-analyze --no-pager security blkback | sed -n 's/.*exposure level.*: \([0-9.]*\) .*/\1/p')
result exposure "$exposure"

ram_disk 256
truncate -s 64M /srv/disk.raw
line=format=raw,access=rw,backendtype=phy,script=block-blkback
create_guest guest verify "vdev=xvda,$line,target=/dev/nullb0" \
    "vdev=xvdb,$line,target=/srv/disk.raw"
domain=$(xl domid guest)
backend=/local/domain/0/backend/vbd/$domain
[ "$(xenstore-read "$backend/51712/physical-device")" = "$(stat -c %t:%T /dev/nullb0)" ]
until grep -q 'guest: verifying' /var/log/xen/console/guest-guest.log; do sleep 1; done

for time in 1 2; do
    echo "dom0: restart $time"
    systemctl restart blkback || fail "restart $time"
    sleep 5
done
pid=$(systemctl show -P MainPID blkback)
dpkg -i $package
[ "$(systemctl show -P MainPID blkback)" != "$pid" ] || fail "an upgrade left the old daemon running"

echo "dom0: attach and detach"
xl block-attach guest "vdev=xvdc,$line,target=null:64G" || fail "attach null:64G"
tries=0
until [ "$(xenstore-read "$backend/51744/state")" = 4 ]; do
    sleep 0.5
    tries=$((tries + 1))
    [ $tries -lt 60 ] || fail "null:64G is not connected"
done
[ "$(xenstore-read "$backend/51744/sectors")" = 134217728 ] || fail "the size of null:64G"
xl block-detach guest xvdc || fail "detach"

# The administrator must be told why.
refused() {
    if xl block-attach guest "vdev=xvdd,$line,target=$1" 2>/run/refused; then fail "$1 is attached"; fi
    cat /run/refused
    grep -q "$2" /run/refused || fail "xl does not say why $1 is refused"
    # libxl leaves behind what it could not attach.
    xl block-detach guest xvdd || fail "detach what was refused"
}
refused /nowhere "does not exist"
mkdir /root/images
truncate -s 1M /root/images/out.raw
refused /root/images/out.raw "Read-only"
# As its own unit says.
mkdir -p /etc/systemd/system/blkback.service.d
printf '[Service]\nReadWritePaths=/root/images\n' >/etc/systemd/system/blkback.service.d/images.conf
systemctl daemon-reload
systemctl restart blkback
xl block-attach guest "vdev=xvdd,$line,target=/root/images/out.raw" || fail "attach what a drop-in opens"
xl block-detach guest xvdd || fail "detach"
rm -r /etc/systemd/system/blkback.service.d
systemctl daemon-reload

echo "dom0: kill -9"
pid=$(systemctl show -P MainPID blkback)
kill -KILL "$pid"
tries=0
until [ "$(journalctl -q -u blkback --since -60s -o cat | sed -n '/code=killed/,$p' | grep -c 'going on where')" = 4 ]; do
    sleep 0.5
    tries=$((tries + 1))
    [ $tries -lt 60 ] || fail "the rings were not taken up after kill -9"
done
guest_lives guest || fail "the guest has ended"
sleep 10

result blkback "$(blkback stats --json)"
xenstore-write "/local/domain/$domain/data/enough" ''
guest_results guest
nothing_left

echo "dom0: purge"
dpkg -L xen-blk | while read -r path; do [ -d "$path" ] || echo "$path"; done >/run/files
[ "$(wc -l </run/files)" -gt 10 ]
dpkg --purge xen-blk
left=$(
    while read -r path; do ls -d "$path" 2>/dev/null; done </run/files
    ls -d /run/blkback /etc/blkback* /etc/xen/scripts/*blkback* 2>/dev/null
    find / -xdev -name '*blkback*' ! -name 'xen*blkback.ko' 2>/dev/null
) || true
[ -z "$left" ] || fail "purge leaves: $left"
if systemctl is-active --quiet blkback; then fail "blkback is active"; fi
