# shellcheck shell=bash
# A year of nightly redials, and some: nothing grows.

REDIALS=${REDIALS:-1000}

# redial ADDRESS: the link ends and comes back; every second time pppd tells only of its return.
redial() {
    if (($1 % 2)); then
        ip link set ppp0 down
        mh_hook -q event down ppp0 /dev/null 0 203.0.113.1 203.0.113.1
    fi
    link_up ppp0 "203.0.113.$1"
    mh_hook -q event up ppp0 /dev/null 0 "203.0.113.$1" 203.0.113.1
    # Somebody plays, and will not hear that the address has changed.
    flow 192.0.2.61 "203.0.113.$1" 27016 192.168.0.2 27016 10
}

# sizes: how much of everything there is.
sizes() {
    echo "rules $(ip -4 rule | wc -l)"
    echo "routes $(ip -4 route show table all | wc -l)"
    echo "chains $(iptables-save | grep -c '^:.* -')"
    echo "entries $(iptables-save | grep -c '^-A')"
    echo "connections $(conntrack -L 2>/dev/null | wc -l)"
    echo "files in /run: $(find /run -path /run/lab -prune -o -printf '%p %s ')"
    echo "processes $(pgrep -c "mh-hook|conntra" || true)"
}

# memory: the most that a call needs, in KiB, of ten redials.
memory() {
    local i
    rm -f /run/lab/memory
    fake_tools
    fault 1 999 memory
    for i in {30..39}; do redial "$i"; done
    real_tools
    [[ $(wc -l </run/lab/memory) -ge 40 ]] || fail "too few calls were measured"
    sort -n /run/lab/memory | tail -n 1
}

test_1000_redials_leave_nothing_behind() {
    local i first first_sizes early late began
    foreign
    configure 10 192.168.0.2 10
    mh_hook -q sync
    early=$(memory)
    redial 20
    first=$(dump)
    first_sizes=$(sizes)
    [[ $first == *dst=192.0.2.61* ]] || fail "there is no connection to be ended"
    began=$(now)
    for ((i = 1; i <= REDIALS; i++)); do redial $((20 + i % 200)); done
    took=$(($(now) - began))
    redial 20
    expect_equal "after $REDIALS redials" "$first" "$(dump)"
    expect_equal "sizes after $REDIALS redials" "$first_sizes" "$(sizes)"
    late=$(memory)
    ((late <= early + 256)) || fail "a call needed $early KiB before, and $late KiB after"
    echo "figure: $REDIALS redials in $((took / 1000)) ms; a call needs $early KiB before and $late KiB after"
}

# The memory that ten thousand forwards take, in KiB, is bounded: as it is when the last tool is started, with all that
# it reads ready.
test_ten_thousand_forwards_take_less_than_16_mib() {
    local most
    configure 10 192.168.0.2 10000
    fake_tools
    fault 1 999 memory
    mh_hook -q up ppp0
    mh_hook -q down ppp0
    mh_hook -q up ppp0
    real_tools
    most=$(sort -n /run/lab/memory | tail -n 1)
    ((most > 2048)) || fail "$most KiB: not measured"
    ((most <= 16384)) || fail "$most KiB"
    echo "figure: $most KiB with 10,000 forwards"
}
