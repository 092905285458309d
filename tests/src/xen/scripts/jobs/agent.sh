# Does what dom0 asks for (dom0-lib.sh, ask): data/ask is 'NUMBER COMMAND', data/answer 'NUMBER STATUS OUTPUT'.
# A command's output is the answer; what it writes to >&3 is shown, and results in it count.
# The functions of disk-lib.sh are there.
. /scripts/disk-lib.sh
modprobe xen-blkfront max_ring_page_order=4
exec 3>&1
fail() {
    text failure "$1" >&3
}
# The kernel sets the watch again when the domain is restored or migrated.
mkfifo /run/asked
xenstore-watch data/ask >/run/asked &
watch=$!
asked=
while [ "$asked" != end ] && read -r _; do
    ask=$(xenstore-read -R data/ask 2>/dev/null)
    [ -z "$ask" ] || [ "${ask%% *}" = "$asked" ] && continue
    asked=${ask%% *}
    eval "${ask#* }" >/run/answer 2>&1
    xenstore-write -R data/answer "$asked $? $(tail -c 1000 /run/answer)"
done </run/asked
kill $watch
text done ""
