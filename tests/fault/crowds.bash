# shellcheck shell=bash disable=SC2154 # ask_for sets status, said, took
# Many calls at once, others that hold the locks, others that change the same tables: nothing is lost, nothing doubled,
# theirs is left.

# all_at_once COMMAND…: each argument a call of mh-hook; all are started, then all must end well.
all_at_once() {
    local request call status=0 began
    local -a calls=()
    began=$(now)
    for request; do
        # shellcheck disable=SC2086 # words
        mh_hook_alone -q $request 2>>/run/lab/said &
        calls+=($!)
    done
    for call in "${calls[@]}"; do
        wait "$call" || status=$?
    done
    took=$(($(now) - began))
    ((status == 0)) || fail "one of $# at once: exit status $status: $(sort -u /run/lab/said)"
}

test_200_events_of_8_uplinks_at_once() {
    local n expected
    local -a events=()
    foreign
    {
        printf '[lan]\ninterfaces = ["eth1"]\nnetworks = ["192.168.0.0/24"]\n'
        for n in {0..7}; do
            link_up "ppp$n" "203.0.113.1$n"
            printf '[uplink.isp%s]\ninterface = "ppp%s"\ntable = 1%s\n' "$n" "$n" "$n"
            printf 'forward = [{ port = 80, to = "192.168.0.2" }, { proto = "udp", port = 53, to = "192.168.0.3" }]\n'
        done
    } | lab_config
    # The even ones come up, the odd ones go down.
    mh_hook -q sync
    for n in 1 3 5 7; do ip link set "ppp$n" down; done
    mh_hook -q sync
    expected=$(dump)
    for n in 1 3 5 7; do ip link set "ppp$n" up; done
    mh_hook -q sync
    for n in 1 3 5 7; do ip link set "ppp$n" down; done
    for n in 0 2 4 6; do mh_hook -q down "ppp$n"; done
    for _ in {1..25}; do
        for n in 0 2 4 6; do events+=("event up ppp$n /dev/null 0 203.0.113.1$n 203.0.113.1"); done
        for n in 1 3 5 7; do events+=("event down ppp$n /dev/null 0 203.0.113.1$n 203.0.113.1"); done
    done
    all_at_once "${events[@]}"
    expect_equal "after ${#events[@]} at once" "$expected" "$(dump)"
    echo "figure: ${#events[@]} events of 8 uplinks at once in $((took / 1000)) ms"
}

test_16_at_once_on_the_same_uplink() {
    local expected address
    local -a requests=()
    foreign
    configure 10 192.168.0.2 20
    for address in 203.0.113.10 203.0.113.11 203.0.113.10; do
        link_up ppp0 "$address"
        mh_hook -q sync
        expected=$(dump)
        link_up ppp0 203.0.113.99
        mh_hook -q sync
        link_up ppp0 "$address"
        requests=()
        for _ in {1..4}; do
            requests+=('up ppp0' sync "event up ppp0 /dev/null 0 $address 203.0.113.1"
                'event down ppp0 /dev/null 0 203.0.113.99 203.0.113.1')
        done
        all_at_once "${requests[@]}"
        expect_equal "after 16 at once" "$expected" "$(dump)"
        # And from nothing.
        mh_hook -q down ppp0
        all_at_once "${requests[@]}"
        expect_equal "after 16 at once" "$expected" "$(dump)"
    done
    echo "figure: 16 at once on the same uplink in $((took / 1000)) ms"
}

## Locks that others hold

is_legacy() { [[ $(readlink -f /usr/sbin/iptables) == *legacy* ]]; }

# lock_setup: everything stands for another address.
lock_setup() {
    foreign
    configure 10 192.168.0.2
    mh_hook -q sync
    wanted=$(dump)
    link_up ppp0 203.0.113.11
    mh_hook -q sync
    link_up ppp0 203.0.113.10
}

# hold FILE SECONDS: in the background, from now on; $holder is who.
hold() {
    (
        exec 9>>"$1"
        flock 9
        pause $(($2 * 1000000))
        now >/run/lab/released
    ) &
    holder=$!
    lab_wait locked "$1"
}

# since_release: for how many microseconds the lock was free when the last call ended, which has just been.
since_release() {
    [[ -e /run/lab/released ]] || fail "it did not wait for the lock"
    echo "$((ended - $(cat /run/lab/released)))"
}

test_the_lock_of_iptables_is_held_for_3_s() {
    local wanted holder since
    lock_setup
    hold /run/xtables.lock 3
    ask_for "$UP"
    ((status == 0)) || fail "exit status $status: $said"
    expect_equal "up" "$wanted" "$(dump)"
    if is_legacy; then
        since=$(since_release)
        ((since > 0 && since < took)) || fail "it took $took µs, and ended $since µs after the lock was free"
    fi
    ((took < 30000000)) || fail "took $took µs"
    echo "figure: done after $((took / 1000)) ms"
}

test_the_lock_of_iptables_is_held_for_ever() {
    local wanted holder before
    lock_setup
    before=$(dump)
    hold /run/xtables.lock 1000
    ask_for "$UP"
    if is_legacy; then
        ((status == 1)) || fail "exit status $status: $said"
        [[ $said == *isp0*ppp0*iptables-restore*'exit status 4'*'xtables lock'* ]] || fail "its words: $said"
        expect_equal "the tables of iptables" "$(grep -E '^(mangle|nat|filter) ' <<<"$before")" "$(iptables-save | netfilter)"
        expect_foreign "$before" "$(dump)" || fail "others' entries changed"
    else
        ((status == 0)) || fail "exit status $status: $said"
    fi
    ((took < 30000000)) || fail "took $took µs"
    kill "$holder"
    wait "$holder" || true
    echo "figure: gave up after $((took / 1000)) ms"
    ask_for "$UP"
    ((status == 0 && took < PROMPT * 1000000)) || fail "the next call: exit status $status after $took µs: $said"
    expect_equal "the next call" "$wanted" "$(dump)"
}

test_our_own_lock_is_held_for_ever() {
    local wanted holder before
    lock_setup
    before=$(dump)
    hold /run/mh-hook.lock 1000
    ask_for "$UP"
    ((status == 1 && took < 30000000)) || fail "exit status $status after $took µs: $said"
    [[ $said == *'up ppp0'*/run/mh-hook.lock*fuser* ]] || fail "its words: $said"
    expect_equal "without the lock" "$before" "$(dump)"
    kill "$holder"
    wait "$holder" || true
    ask_for "$UP"
    ((status == 0 && took < PROMPT * 1000000)) || fail "the next call: exit status $status after $took µs: $said"
    expect_equal "the next call" "$wanted" "$(dump)"
}

## Another program, all the while

# churn: adds a rule of each kind, sees it, removes it and sees it gone; of every fourth the rules stay. Ends with the file
# /run/lab/stop, and leaves how far it came in /run/lab/churned.
churn() {
    local i=0 source
    local -a spec
    while [[ ! -e /run/lab/stop ]]; do
        i=$((i + 1))
        source=10.77.$((i / 250)).$((i % 250 + 1))
        spec=(-s "$source/32" -i ppp0 -m comment --comment "churn of mh-isp0" -j MARK --set-xmark 0x100/0x100)
        iptables -w -t mangle -A PREROUTING "${spec[@]}" || problem "churn $i: -A"
        ip rule add priority 100 from "$source" lookup 10 || problem "churn $i: ip rule add"
        iptables -w -t nat -I PREROUTING -s "$source/32" -j RETURN || problem "churn $i: -I"
        iptables -w -t mangle -C PREROUTING "${spec[@]}" || problem "churn $i: -C"
        if ((i % 4)); then
            iptables -w -t mangle -D PREROUTING "${spec[@]}" || problem "churn $i: -D"
            ip rule del priority 100 from "$source" lookup 10 || problem "churn $i: ip rule del"
            iptables -w -t nat -D PREROUTING -s "$source/32" -j RETURN || problem "churn $i: -D"
        fi
        echo "$i" >/run/lab/churned
    done 2>>/run/lab/churn.said
}

test_another_program_changes_the_same_tables_all_the_while() {
    local i wanted churner churned request left
    foreign
    configure 11 192.168.0.3 30
    mv "$LAB_CONFIG" /run/lab/two.toml
    configure 10 192.168.0.2 30
    mv "$LAB_CONFIG" /run/lab/one.toml
    LAB_CONFIG=/run/lab/one.toml
    mh_hook -q sync
    wanted=$(dump)
    mh_hook -q down ppp0
    churn &
    churner=$!
    for ((i = 0; i < 25; i++)); do
        for request in 'one up ppp0' 'two event up ppp0' 'none down ppp0' 'two up ppp0' 'one sync'; do
            LAB_CONFIG=/run/lab/${request%% *}.toml
            LAB_CONFIG=${LAB_CONFIG/none/one}
            ask_for "-q ${request#* }"
            ((status == 0)) || problem "$request: exit status $status: $said"
        done
    done
    touch /run/lab/stop
    wait "$churner"
    churned=$(cat /run/lab/churned)
    no_problems || fail "$(cat /run/lab/churn.said)"
    ((churned > 20)) || fail "it came to $churned only"
    left=$(dump)
    expect_equal "what stays of the other program" "$((3 * (churned / 4)))" "$(grep -c '10\.77\.' <<<"$left")"
    expect_equal "the rest" "$wanted" "$(grep -v '10\.77\.' <<<"$left")"
    echo "figure: 125 calls of ours, $churned rounds of the other's"
}
