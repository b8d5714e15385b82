# shellcheck shell=bash
# ip-pre-up: the entries stand before the first packet, go again if the link never comes up, and are followed by a look
# at what became of it; sourced by tests/vm/story.

# load ADDRESS: from here on the client sends one packet after another, each from a port of its own. Nobody listens at
# the server: its answers are ICMP errors, which have to find their way just the same.
load() {
    # shellcheck disable=SC2016 # for another shell
    in_ns client "$BASH" -c 'exec 3<> <(:); while :; do echo >"/dev/udp/$0/27016"; read -rt 0.02 -u 3; done' \
        "$1" 2>/dev/null &
}

# flows_to ADDRESS: what the router made of it. flows_past ADDRESS: those that it took for its own.
flows_to() { on_router conntrack -L -p udp --orig-dst "$1" 2>/dev/null; }
more_than_ten_flows_to() { flows_to "$1" | sed -n 11p; }
flows_past() { on_router conntrack -L -p udp --orig-dst "$1" --reply-src "$1" 2>/dev/null; }

expect_flows_forwarded() {
    # Fewer would show nothing.
    lab_wait more_than_ten_flows_to "$1"
    expect_equal "flows past the forward" "" "$(flows_past "$1")"
}

test_with_pre_up_no_packet_is_ahead_of_the_entries() {
    dial isp1
    load "$X"
    load "$Y"
    isp_zero
    dial isp0
    expect_log daemon.notice 'mh-hook.*: isp0 about to be up on ppp0 203\.0\.113\.10: [1-9]'
    expect_log daemon.notice 'mh-hook.*: isp0 up on ppp0 203\.0\.113\.10: [1-9]'
    expect_flows_forwarded "$X"
    isp_offer isp0 "$Y"
    wait_event "up isp0 $Y"
    expect_flows_forwarded "$Y"
    expect_packets isp1 foreign none
}

test_without_pre_up_packets_are_ahead_and_ip_up_ends_their_flows() {
    hooks_off pre-up
    dial isp1
    hooks_wait ahead up
    load "$X"
    dial isp0
    expect_silence client udp "$X" 27015 --source 192.0.2.9:4000
    [[ $(flows_past "$X") ]] || fail "no flow past the forward, so this shows nothing"
    expect_packets isp1 foreign some
    hooks_go
    wait_event "up isp0 $X"
    expect_flows_forwarded "$X"
    expect_answer "server 192.0.2.9" client udp "$X" 27015 --source 192.0.2.9:4000
    expect_log daemon.info 'mh-hook.*: conntrack -D -p udp -s 192\.0\.2\.9 -d 203\.0\.113\.10 .* --sport 4000 '
}

test_a_link_that_never_comes_up_leaves_nothing() {
    local before mend
    dial isp1
    before=$(lab_dump)
    hooks_wait behind pre-up
    for mend in wait_followed "on_router mh-hook sync"; do
        dial isp0
        expect_source_rule "$X"
        [[ ! $(ip -n router link show ppp0 up) ]] || fail "the link is up, so this shows nothing"
        kill_pppd isp0
        $mend
        expect_equal "after kill -9 and $mend" "$before" "$(lab_dump)"
        # Or it would wait for the killed one, and refuse the next.
        isp_offer isp0 "$X"
    done
    wait_followed
    expect_equal "after a late look" "$before" "$(lab_dump)"
    ! has_event "up isp0" || fail "pppd got beyond ip-pre-up"
}

# While any hook in ip-up.d runs, ours or not, pppd's only further call is ip-pre-up.
test_a_redial_during_a_later_hook_is_followed() {
    dial isp1
    hooks_wait behind up
    dial isp0
    isp_zero
    isp_offer isp0 "$Y"
    wait_up isp0 "$Y"
    wait_followed
    expect_entries_for_y
    hooks_go
    wait_event "up isp0 $X"
    expect_entries_for_y
    expect_packets isp1 foreign none
    ! has_event "up isp0 $Y" || fail "pppd made a call for $Y, so this shows nothing: $(events)"
}

expect_entries_for_y() {
    expect_source_rule "$Y"
    expect_default_route ppp0
    expect_forward_answered "$Y"
}

test_a_redial_during_a_later_hook_is_missed_without_pre_up() {
    hooks_off pre-up
    dial isp1
    hooks_wait behind up
    dial isp0
    isp_offer isp0 "$Y"
    wait_up isp0 "$Y"
    hooks_go
    wait_event "up isp0 $X"
    expect_source_rule "$X"
    expect_forward_silent "$Y"
}
