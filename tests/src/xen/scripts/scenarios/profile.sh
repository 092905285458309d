# Where time goes on blkback: perf, contended locks, blktrace, xentop and xentrace, in dom0 and in a guest (docs/profiling.md).
# needs: profilers
. /scripts/profile-lib.sh
hold() { ask guest hold; }
go_on() { ask guest go_on; }
keep_patched
ram_disk 256
start_blkback
create_guest guest agent 'vdev=xvda,format=raw,access=rw,backendtype=phy,target=/dev/nullb0'
ask guest '. /scripts/profile-lib.sh; until [ -b /dev/xvda ]; do sleep 0.1; done; keep_patched'
rings='d1.xvda r0,d1.xvda r1'

# One request at a time: what each costs.
ask guest 'load read-d1'
show 9 "depth 1: blkback stats --watch" sh -c 'blkback stats --watch 5 | head -n 4'
sample 8 /run/d1.data
show 20 "depth 1: perf trace" sh -c "perf trace -s -p $backend -- sleep 4 2>&1 | grep -A9 ' d1.xvda r'"
xentrace -D -e all -T 2 /run/xen.trace || fail "xentrace"
show 4 "depth 1: xentop" sh -c 'xentop -b -i 2 -d 4 | tail -3'
ask guest unload
show 12 "depth 1: who" sampled /run/d1.data --no-children --sort comm
show 60 "depth 1: ring threads" sampled /run/d1.data --children --percentage relative --comms "$rings" --sort comm,symbol --percent-limit 3
show 40 "depth 1: ring threads, themselves" sampled /run/d1.data --no-children --percentage relative --comms "$rings" --sort comm,dso,symbol --percent-limit 0.8
show 20 "depth 1: hypercalls" sh -c "xenalyze --summary /run/xen.trace 2>/dev/null | sed -n '/Domain 0 --/,/Emulate/p' | sed -n '/v0 --/,/^-- v1/p' | grep -A15 'PV events'"
result file "{\"name\":\"depth1.folded\",\"text\":$(quoted "$(folded /run/d1.data)")}"

# As many requests as the disk takes.
ask guest 'load iometer'
sample 6 /run/many.data
ask guest 'sample 6 /run/many.data'
show 20 "dom0: contended locks" locks sleep 3
ask guest 'show 20 "guest: contended locks" locks sleep 3 >&3'
trace_blocks 2 /dev/nullb0
ask guest 'trace_blocks 2 /dev/xvda'
show 30 "blkback stats" blkback stats
ask guest unload

# Large requests, of 32 pages each.
ask guest 'load sequential'
sample 6 /run/large.data
show 4 "sequential: blkback stats --watch" sh -c 'blkback stats --watch 3 | head -n 4'
ask guest unload
show 60 "sequential: ring threads" sampled /run/large.data --children --percentage relative --comms "$rings" --sort comm,symbol --percent-limit 3
show 40 "sequential: ring threads, themselves" sampled /run/large.data --no-children --percentage relative --comms "$rings" --sort comm,dso,symbol --percent-limit 0.8
result file "{\"name\":\"sequential.folded\",\"text\":$(quoted "$(folded /run/large.data)")}"

show 12 "dom0: who" sampled /run/many.data --no-children --sort comm
show 40 "dom0: ring threads" sampled /run/many.data --children --percentage relative --comms "$rings" --sort comm,symbol --percent-limit 3
ask guest 'show 30 "guest" sampled /run/many.data --no-children --sort comm,dso,symbol --percent-limit 0.8 >&3'
show 12 "dom0: btt" times_of_blocks
ask guest 'show 12 "guest: btt" times_of_blocks >&3'
# A table may be empty because nobody has waited. This one is not, which shows that waiting is seen.
show 12 "contended locks of perf bench" locks perf bench sched messaging -g 2 -l 50
grep -q '[1-9].* us ' /run/report || fail "perf has seen no lock that was waited for"
end_guest guest
stop_blkback
