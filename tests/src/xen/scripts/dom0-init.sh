# dom0: starts Xen's daemons, then the scenario.
# Nobody else may be left to stop a machine that hangs.
[ "${limit:-0}" -gt 0 ] && (sleep "$limit"; echo "dom0: time is up"; poweroff -f) &

# Without xenstored everything waits forever, so its end must be seen.
(xenstored --no-fork --pid-file /run/xenstored.pid; echo "dom0: xenstored ended with $?") &
until xenstore-read -s / >/dev/null 2>&1; do sleep 0.2; done
xen-init-dom0
xenconsoled --log=all --pid-file=/run/xenconsoled.pid
. /scripts/dom0-lib.sh
echo "dom0: ready after $(cut -d' ' -f1 /proc/uptime) s"
result boot "{\"dom0_s\":$(cut -d' ' -f1 /proc/uptime),\"xen\":\"$(xl info xen_version)\",\"linux\":\"$(uname -r)\"}"

(
    set -e
    . "/scripts/scenarios/$scenario.sh"
)
result end "{\"status\":$?}"
sync
