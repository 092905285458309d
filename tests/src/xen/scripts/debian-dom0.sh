# dom0 as a whole Debian, once its units are up: runs the scenario.
. /scripts/lib.sh
. /scripts/dom0-lib.sh
result boot "{\"dom0_s\":$(cut -d' ' -f1 /proc/uptime),\"xen\":\"$(xl info xen_version)\",\"linux\":\"$(uname -r)\"}"
journalctl -f -n 0 -o cat -u blkback &
(
    set -e
    . /scripts/scenarios/debian.sh
)
status=$?
result end "{\"status\":$status}"
sync
systemctl poweroff -ff
