# shellcheck shell=bash
# What others' tracked connections cost a call, and what it takes to end those that contradict a change. Sourced by
# tests/bench. The backend makes no difference to either, so there is one.

CONNECTIONS=(0 10000 100000 1000000)
STALE=10000
CONNECTIONS_ROUNDS=${CONNECTIONS_ROUNDS:-5}

CONNECTIONS_MAX=/proc/sys/net/netfilter/nf_conntrack_max

# connections_raised COMMAND…: with room for as many connections as are made, which is one setting for all namespaces; put
# back thereafter, whatever comes.
connections_raised() {
    local before status=0
    [[ -e $CONNECTIONS_MAX ]] || modprobe nf_conntrack
    before=$(cat "$CONNECTIONS_MAX")
    # shellcheck disable=SC2064 # as it is now
    trap "echo $before >$CONNECTIONS_MAX" EXIT
    echo 1200000 >"$CONNECTIONS_MAX"
    BENCH_RAISED=yes "$@" || status=$?
    exit "$status"
}

flows() { in_ns router /usr/bin/python3 "$LAB_REPOSITORY/tests/benches/flows.py" "$@"; }

# measured CALL OTHERS STALE ARGUMENT…: notes how long mh-hook takes.
measured() {
    note connections "$2" "$3" "$1" ms "$(flows measure "$MH_HOOK" -q --config "$LAB_CONFIG" "${@:4}")"
}

# memory_of CALL OTHERS STALE ARGUMENT…: notes how much memory mh-hook itself takes, in a call of its own.
memory_of() {
    note connections "$2" "$3" "$1" MiB "$(peak_memory "$MH_HOOK -q --config $LAB_CONFIG ${*:4}")"
}

# link_has ADDRESS: ppp0 comes back with it.
link_has() {
    ip -n router address flush dev ppp0
    ip -n router address add "$1" peer 203.0.113.1/32 dev ppp0
}

bench_connections() {
    local others round event
    for others in "${CONNECTIONS[@]}"; do
        bench_new_lab
        lab_config <<CONF
[lan]
interfaces = ["eth1"]
networks = ["192.168.0.0/24"]
[uplink.isp0]
interface = "ppp0"
table = 10
forward = [{ port = 80, to = "192.168.0.2" }, { proto = "udp", port = 80, to = "192.168.0.2" }]
[uplink.isp1]
interface = "ppp1"
CONF
        mh_hook -q sync
        flows others "$others"
        event=(event up ppp0 /dev/null 0)
        memory_of status "$others" 0 status
        mh_hook -q down ppp0
        memory_of "first up" "$others" 0 up ppp0
        for ((round = 0; round < CONNECTIONS_ROUNDS; round++)); do
            link_has 203.0.113.10
            mh_hook -q down ppp0
            measured "first up" "$others" 0 up ppp0
            link_has 203.0.113.11
            measured "new address" "$others" 0 "${event[@]}" 203.0.113.11 203.0.113.1
            measured "nothing to do" "$others" 0 "${event[@]}" 203.0.113.11 203.0.113.1
            measured status "$others" 0 status
            link_has 203.0.113.10
            mh_hook -q up ppp0
            flows stale "$STALE"
            link_has 203.0.113.11
            measured "new address" "$others" "$STALE" "${event[@]}" 203.0.113.11 203.0.113.1
            [[ ! $(in_ns router conntrack -L -p udp --orig-dst 203.0.113.10 2>/dev/null | head -n 1) ]] ||
                lab_die "connections of the former address are left"
        done
    done
}
