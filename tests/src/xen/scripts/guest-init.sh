# A guest: runs its job.
# dom0 looks for these lines in the console's log; the kernel must not write in the middle of them.
dmesg -n 1
result() {
    printf '@result {"name":"%s","value":%s}\n' "$1" "$(tr -d '\n\r' <"$2")"
}
text() {
    printf '@result {"name":"%s","value":%s}\n' "$1" "$(quoted "$2")"
}
fail() {
    text failure "$1"
    exit 1
}
echo "guest: $job after $(cut -d' ' -f1 /proc/uptime) s"
(. "/scripts/jobs/$job.sh")
