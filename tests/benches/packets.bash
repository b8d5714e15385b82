# shellcheck shell=bash
# What the entries cost a packet. Sourced by tests/bench.
#
# Each case gets a lab of its own, since a table or connection tracking that stood once would cost the next case too.
# The cases take turns, PACKETS_ROUNDS times, so that a busy moment of the machine hits all alike; the table has medians.

PACKETS_ROUNDS=${PACKETS_ROUNDS:-3}
PACKETS_UPLINKS=(10 100)
# The last forward's ports at the server: one for iperf3, one whose connections are accepted and closed.
FLOW_PORT=30097
ANSWER_PORT=30098
# Refused by the router itself, since no forward has it. All others' ports are lower, without a gap, so that it is the
# worst case too where forwards are looked for by the hundred.
NO_PORT=30099

# bench_packets BACKEND FORWARDS…
bench_packets() {
    local backend=$1 round forwards uplinks
    local -a pids=()
    # shellcheck disable=SC2034 # for lab_config and mh_hook; processes.bash leaves it with its own
    local LAB_CONFIG=$LAB_DIR/packets.toml
    for ((round = 0; round < PACKETS_ROUNDS; round++)); do
        packets_case none 0 0
        for forwards in "${@:2}"; do
            packets_case typed 1 "$forwards"
            packets_case mh-hook 1 "$forwards"
        done
        for uplinks in "${PACKETS_UPLINKS[@]}"; do
            packets_case mh-hook "$uplinks" 1
        done
    done
}

# packets_case none|typed|mh-hook UPLINKS FORWARDS
packets_case() {
    local to=203.0.113.10
    local -a of=("$backend" "$@")
    packets_lab
    case $1 in
        none) packets_straight && to=192.168.0.2 ;;
        typed) packets_typed "$3" ;;
        mh-hook) packets_mh_hook "$2" "$3" ;;
    esac
    packets_note in packets_rate "$to"
    packets_note out packets_rate "$to" --reverse
    [[ $1 != none ]] || return 0
    packets_note last packets_answer accepted "$to" "$ANSWER_PORT"
    packets_note no packets_answer refused "$to" "$NO_PORT"
}

# packets_note WHAT COMMAND…: what the command prints, as a result of the case.
packets_note() {
    local value
    value=$("${@:2}")
    note packets "${of[@]}" "$1" "$value"
}

## The lab

# A new one, whatever stood before, with what listens at the server.
packets_lab() {
    ((${#pids[@]} == 0)) || kill "${pids[@]}"
    bench_new_lab
    in_ns server iperf3 --server --port "$FLOW_PORT" >/dev/null &
    pids=($!)
    in_ns server /usr/bin/python3 -c '
import os, socket, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
with socket.create_server(("", int(sys.argv[1])), backlog=128) as listener:
    while True:
        listener.accept()[0].close()' "$ANSWER_PORT" &
    pids+=($!)
    lab_wait in_ns server ss -Hlnt "sport = :$FLOW_PORT"
    lab_wait in_ns server ss -Hlnt "sport = :$ANSWER_PORT"
}

# Routes only: the client asks for the server's own address, and the replies leave by ppp0 because of the destination.
packets_straight() {
    ip -n client route add 192.168.0.0/24 dev isp0 src 192.0.2.9
    ip -n isp0 route add 192.168.0.0/24 dev customer
    ip -n router route add 192.0.2.0/24 dev ppp0
    lab_customer isp0 192.168.0.2
}

# packets_forwards FORWARDS FORMAT FORMAT…: a line for each forward; the first format is that of all but the last one,
# with its port and the last byte of its address, the others are those of the last one.
packets_forwards() {
    local i
    for ((i = 1; i < $1; i++)); do
        # shellcheck disable=SC2059 # a format it is
        printf -- "$2\n" "$((FLOW_PORT - $1 + i))" "$((2 + i % 250))"
    done
    printf '%s\n' "${@:3}"
}

# packets_typed FORWARDS: the recipe as people type it; the lines for iptables in one go, or 10,000 would take minutes.
packets_typed() {
    local dnat='-A PREROUTING -p tcp -i ppp0 --dport %s -j DNAT --to-destination 192.168.0.%s'
    ip -n router -batch - <<END
route add default dev ppp0 table 10
rule add from 203.0.113.10 table 10 pref 100
rule add iif eth1 fwmark 10 table 10 pref 99
END
    {
        printf '%s\n' '*mangle' '-A PREROUTING -j CONNMARK --restore-mark' \
            '-A PREROUTING -i ppp0 -j MARK --set-mark 10' '-A PREROUTING -j CONNMARK --save-mark' COMMIT \
            '*nat' '-A POSTROUTING -s 192.168.0.0/24 -o ppp0 -j MASQUERADE'
        packets_forwards "$1" "$dnat" \
            "-A PREROUTING -p udp -i ppp0 --dport $FLOW_PORT:$ANSWER_PORT -j DNAT --to-destination 192.168.0.2" \
            "-A PREROUTING -p tcp -i ppp0 --dport $FLOW_PORT:$ANSWER_PORT -j DNAT --to-destination 192.168.0.2"
        echo COMMIT
    } | in_ns router /usr/sbin/iptables-restore --noflush
}

# packets_mh_hook UPLINKS FORWARDS: of many uplinks, ppp0's is the last one.
packets_mh_hook() {
    local i
    for ((i = 2; i <= $1; i++)); do
        lab_wire router "ppp$i" isp1 "customer$i"
        ip -n router address add "10.0.$i.2" peer "10.0.$i.1/32" dev "ppp$i"
    done
    {
        printf '%s\n' '[lan]' 'interfaces = ["eth1"]' 'networks = ["192.168.0.0/24"]'
        for ((i = 2; i <= $1; i++)); do
            printf '%s\n' "[uplink.isp$i]" "interface = \"ppp$i\"" "table = $((10 + i))" \
                'forward = [{ port = 80, to = "192.168.0.2" }]'
        done
        printf '%s\n' '[uplink.isp0]' 'interface = "ppp0"' 'table = 10' 'forward = ['
        packets_forwards "$2" '{ port = %s, to = "192.168.0.%s" },' \
            "{ proto = [\"udp\", \"tcp\"], port = \"$FLOW_PORT-$ANSWER_PORT\", to = \"192.168.0.2\" },"
        echo ']'
    } | lab_config
    if (($1 == 1)); then mh_hook -q up ppp0; else mh_hook -q sync; fi
}

## Measuring

# packets_rate ADDRESS [--reverse]: small UDP packets of one flow, from the client or to it, that a processor forwards in
# a second. All the way through the router is the sender's own system call, so that its processor time is what the
# packets took, whatever else the machine does at the time; a busy machine would only lose some at the receiver.
packets_rate() {
    local clock=processor
    ! packets_interrupts_apart || clock=wall
    in_ns client iperf3 --client "$1" --port "$FLOW_PORT" "${@:2}" --udp --length 16 --bitrate 0 --time 1 --json \
        >"$LAB_DIR/flow" || lab_die "iperf3 $*: $(cat "$LAB_DIR/flow")"
    /usr/bin/python3 - "$LAB_DIR/flow" "$clock" "${2-}" <<'END'
import json, sys
found = json.load(open(sys.argv[1]))["end"]
sent, used = found["sum_sent"], found["cpu_utilization_percent"]
sender = used["remote_total" if sys.argv[3] else "host_total"] / 100
print(sent["packets"] / sent["seconds"] / (sender if sys.argv[2] == "processor" else 1))
END
}

# Whether the kernel takes the time of forwarding off the sender's; then only an idle machine measures well.
packets_interrupts_apart() {
    { cat "/boot/config-$(uname -r)" || zcat /proc/config.gz; } 2>/dev/null |
        grep -c '^CONFIG_IRQ_TIME_ACCOUNTING=y' >/dev/null
}

# packets_answer accepted|refused ADDRESS PORT: µs until a new connection has this answer, the median of many.
packets_answer() {
    in_ns client /usr/bin/python3 - "$@" <<'END'
import os, socket, statistics, struct, sys, time
# On the listener's processor: to wake another one would take longer than all the rest.
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
expected, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
found = []
for _ in range(300):
    with socket.socket() as connection:
        # Closed without a farewell, which would get in the way of the next one.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.settimeout(5)
        answer = "accepted"
        begin = time.perf_counter_ns()
        try:
            connection.connect((address, port))
        except ConnectionRefusedError:
            answer = "refused"
        found.append(time.perf_counter_ns() - begin)
        if answer != expected:
            sys.exit(f"{address}:{port} is {answer}, not {expected}")
        if answer == "accepted":
            # Only when the server is through with this connection comes the next: the two would disturb each other.
            connection.recv(1)
print(statistics.median(found) / 1000)
END
}
