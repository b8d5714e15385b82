# shellcheck shell=bash
# No packet ahead of the rules: pppd's ip-pre-up runs while the link has its address and carries nothing yet.

# about_to_be_up: ppp0 as pppd has it then.
about_to_be_up() {
    lab_link_down ppp0
    ip -n router address add "$X" peer 203.0.113.1/32 dev ppp0
}

pre_up() { mh_hook event pre-up ppp0 /dev/null 0 "$X" 203.0.113.1 ''; }
up() { mh_hook event up ppp0 /dev/null 0 "$X" 203.0.113.1 ''; }

test_pre_up_makes_all_but_the_route_and_up_completes_it() {
    local before complete
    mh_hook up ppp0
    complete=$(lab_dump | grep -v '^default dev ppp0 ' | sort)
    mh_hook down ppp0
    about_to_be_up
    before=$(lab_dump)
    pre_up
    expect_equal "before the link is up" "$(grep -v 'dev ppp0' <<<"$complete")" "$(lab_dump | grep -v 'dev ppp0' | sort)"
    pre_up
    ip -n router link set ppp0 up
    up
    expect_forward_answered
    lab_link_down ppp0
    mh_hook event down ppp0
    ip -n router address add "$X" peer 203.0.113.1/32 dev ppp0
    expect_equal "after down" "$before" "$(lab_dump)"
}

# pppd leaves out ip-up where an earlier one still runs; a look of mh-hook's own follows pre-up.
test_after_pre_up_a_link_is_completed_without_ip_up() {
    about_to_be_up
    pre_up
    expect_equal "routes by ppp0 in table 10" "" "$(routes_by_ppp0)"
    ip -n router link set ppp0 up
    lab_wait routes_by_ppp0
    expect_forward_answered
    expect_own_service_answered
}

routes_by_ppp0() { on_router ip route show table 10 dev ppp0 2>/dev/null; }

test_of_a_link_that_never_comes_up_nothing_stays_although_nobody_calls() {
    local before
    about_to_be_up
    before=$(lab_dump)
    pre_up
    sleep 1
    [[ $(lab_dump) == *mh-isp0* ]] || fail "gone too early"
    lab_wait stands "$before"
}

# stands LISTING: says so when it is what lab_dump tells.
stands() { [[ $(lab_dump) != "$1" ]] || echo "as before"; }

test_of_a_link_that_never_comes_up_nothing_stays() {
    local before way
    mh_hook up ppp1
    lab_link_down ppp0
    before=$(lab_dump)
    for way in "event down ppp0" sync "down ppp0"; do
        about_to_be_up
        pre_up
        [[ $(lab_dump) == *mh-isp0* ]] || fail "pre-up made nothing"
        # pppd gives up.
        ip -n router address flush dev ppp0
        # shellcheck disable=SC2086 # a command and its arguments
        mh_hook $way
        expect_equal "after $way" "$before" "$(lab_dump)"
    done
    # While the address still stands, too.
    about_to_be_up
    pre_up
    mh_hook sync
    lab_link_down ppp0
    expect_equal "after sync" "$before" "$(lab_dump)"
}

# storm: by Perl, since it is part of every Debian and quick enough, a datagram each millisecond, every one a flow of its own, until it is told to end; what the router makes of them
# stands in $LAB_DIR/storm, as it began: what is deleted later was wrong nonetheless.
storm() {
    # With the other uplink's entries connections are tracked already.
    mh_hook up ppp1
    on_router conntrack -E -e NEW -p udp --buffer-size 8388608 >"$LAB_DIR/storm" 2>/dev/null &
    watch=$!
    lab_wait heard
    # shellcheck disable=SC2016 # variables of Perl
    in_ns client perl -MSocket -e '
        for my $port (10000 .. 60000) {
            socket(my $socket, PF_INET, SOCK_DGRAM, 0) or die;
            bind($socket, sockaddr_in($port, inet_aton("192.0.2.9"))) or die;
            send($socket, "storm\n", 0, sockaddr_in(27015, inet_aton($ARGV[0])));
            select(undef, undef, undef, 0.001);
        }' "$X" &
    wind=$!
}

heard() {
    in_ns lanhost socat -u - UDP4:192.168.0.1:9,shut-none <<<heard
    cat "$LAB_DIR/storm"
}

flows() { grep -c dport=27015 "$LAB_DIR/storm" || true; }
enough() { (($(flows) < $1)) || echo enough; }

# calm FLOWS: after at least so many.
calm() {
    lab_wait enough "$1"
    kill "$wind" "$watch"
    wait "$wind" "$watch" || true
}

# Flows that are not forwarded, or not marked.
wrong() { grep dport=27015 "$LAB_DIR/storm" | grep -cvE 'src=192\.168\.0\.2 .*mark=10\b' || true; }

test_with_pre_up_not_one_flow_begins_wrongly() {
    about_to_be_up
    pre_up
    storm
    ip -n router link set ppp0 up
    up
    calm 200
    expect_equal "flows that began wrongly" 0 "$(wrong)"
    expect_equal "packets to the wrong link" 0 "$(isp_packets isp1 foreign)"
}

test_without_pre_up_some_flows_begin_wrongly() {
    about_to_be_up
    storm
    ip -n router link set ppp0 up
    # Between the link and its hook pppd may run others.
    lab_wait enough 1
    up
    calm 200
    (($(wrong) > 0)) || fail "none of $(flows) flows began wrongly"
}
