# dom0, where it is a whole Debian and its units are up: runs the scenario.
. /scripts/lib.sh
. /scripts/dom0-lib.sh
result boot "{\"dom0_s\":$(cut -d' ' -f1 /proc/uptime),\"xen\":\"$(xl info xen_version)\",\"linux\":\"$(uname -r)\"}"
(
    set -e
    . /scripts/scenarios/debian.sh
)
status=$?
journalctl --no-pager -o short-monotonic -u blkback -u scenario | tail -n 100
result end "{\"status\":$status}"
sync
systemctl poweroff -ff
