# shellcheck shell=bash
# Uplinks by identity: whose link it is tells pppd, not the interface's number.

# configure_identity ISP0 ISP1: what each is known by.
configure_identity() {
    lab_config <<EOF
[lan]
interfaces = ["eth1"]
networks = ["192.168.0.0/24"]

[uplink.isp0]
$1
table = 10
$FORWARD_80

[uplink.isp1]
$2
table = 20
EOF
}

# change_places: the same two sessions, each on the other's interface, as after a boot in the other order.
change_places() {
    local link
    for link in ppp0 ppp1; do lab_link_down "$link"; done
    ip -n router -batch - <<EOF
link set ppp0 name old
link set ppp1 name ppp0
link set old name ppp1
address add $X peer 203.0.113.1/32 dev ppp1
address add 198.51.100.20 peer 198.51.100.1/32 dev ppp0
link set ppp1 up
link set ppp0 up
route add default dev ppp0
EOF
}

# called ISP DIRECTION IF: pppd's call for that ISP, by all that may tell it.
called() {
    local address=$X peer=203.0.113.1
    if [[ $1 == isp1 ]]; then address=198.51.100.20 peer=198.51.100.1; fi
    LINKNAME="line-$1" CALL_FILE="call-$1" mh_hook event "$2" "$3" /dev/null 0 "$address" "$peer" "param-$1"
}

expect_isp0_on() {
    expect_forward_answered
    expect_own_service_answered
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    expect_packets isp1 foreign none
    local other=ppp0
    if [[ $1 == ppp0 ]]; then other=ppp1; fi
    expect_equal "entries of isp0 by $other" "" "$(lab_dump | grep -E "mh-isp0|table 10 " | grep -w "$other" || true)"
    expect_equal "entries of isp1 by $1" "" "$(lab_dump | grep -E "mh-isp1|table 20 " | grep -w "$1" || true)"
}

test_the_entries_follow_the_isp_when_the_links_change_places() {
    local identities
    for identities in ipparam=param linkname=line peer=call; do
        configure_identity "${identities%=*} = \"${identities#*=}-isp0\"" "${identities%=*} = \"${identities#*=}-isp1\""
        called isp0 up ppp0
        called isp1 up ppp1
        isp_zero
        expect_isp0_on ppp0
        change_places
        isp_zero
        expect_forward_silent
        called isp1 up ppp0
        called isp0 up ppp1
        isp_zero
        expect_isp0_on ppp1
        # Back, in order: pppd says that each is down.
        change_places_back
    done
}

change_places_back() {
    called isp0 down ppp1
    called isp1 down ppp0
    local link
    for link in ppp0 ppp1; do
        lab_link_down "$link"
        mh_hook down "$link"
    done
    ip -n router -batch - <<EOF
link set ppp0 name old
link set ppp1 name ppp0
link set old name ppp1
EOF
    lab_link_up ppp0 "$X"
    lab_link_up ppp1 198.51.100.20
}

test_what_stands_after_changed_places_is_as_if_it_were_fresh() {
    local found
    configure_identity 'ipparam = "param-isp0"' 'ipparam = "param-isp1"'
    called isp0 up ppp0
    called isp1 up ppp1
    change_places
    # In the worse order: isp0 takes the interface that isp1's entries still name.
    called isp0 up ppp1
    called isp1 up ppp0
    found=$(lab_dump | sort)
    mh_hook down ppp0
    mh_hook down ppp1
    called isp0 up ppp1
    called isp1 up ppp0
    expect_equal "as if it were fresh" "$(lab_dump | sort)" "$found"
}

test_by_hand_and_in_sync_the_binding_is_kept() {
    local stands
    configure_identity 'ipparam = "param-isp0"' 'ipparam = "param-isp1"'
    change_places
    called isp0 up ppp1
    called isp1 up ppp0
    stands=$(lab_dump)
    mh_hook sync
    expect_equal "after sync" "$stands" "$(lab_dump)"
    mh_hook up ppp1
    mh_hook up ppp0
    expect_equal "after up by hand" "$stands" "$(lab_dump)"
    on_router ip rule del priority 99
    expect_forward_silent
    mh_hook sync
    expect_forward_answered
    on_router ip rule del priority 99
    mh_hook up ppp1
    expect_forward_answered
    isp_zero
    # Even its route's loss leaves the iptables entries that tell.
    on_router ip route flush table 10
    mh_hook sync
    expect_isp0_on ppp1
}

test_by_hand_the_uplink_is_named_where_nothing_tells() {
    local before
    configure_identity 'ipparam = "param-isp0"' 'ipparam = "param-isp1"'
    change_places
    before=$(lab_dump)
    mh_hook up ppp1
    mh_hook sync
    expect_equal "after up of nobody's link" "$before" "$(lab_dump)"
    mh_hook up ppp1 --uplink isp0
    expect_forward_answered
    mh_hook up ppp1
    expect_forward_answered
    mh_hook down ppp1
    expect_equal "after down" "$before" "$(lab_dump)"
}

test_all_that_is_given_must_match() {
    local before
    before=$(lab_dump)
    configure_identity $'interface = "ppp0"\nipparam = "param-isp0"' 'ipparam = "param-isp1"'
    called isp1 up ppp1
    change_places
    mh_hook event up ppp1 /dev/null 0 "$X" 203.0.113.1 param-isp0
    expect_forward_silent
    called isp1 up ppp0
    expect_forward_silent
    mh_hook down ppp0
    lab_dump | grep -v 'default dev ppp' >"$LAB_DIR/found"
    expect_equal "after down" "$(grep -v 'default dev ppp' <<<"$before")" "$(sed 's/ppp1/tmp/; s/ppp0/ppp1/; s/tmp/ppp0/' "$LAB_DIR/found")"
}

test_a_call_that_two_uplinks_match_is_an_error_and_changes_nothing() {
    local before status=0 output
    configure_identity 'linkname = "line-isp0"' 'ipparam = "param-isp1"'
    called isp0 up ppp0
    before=$(lab_dump)
    output=$(LINKNAME=line-isp0 mh_hook event up ppp0 /dev/null 0 "$X" 203.0.113.1 param-isp1 2>&1) || status=$?
    expect_equal "exit status" 2 "$status"
    [[ $output == *isp0*isp1* ]] || fail "expected both names in: $output"
    expect_equal "after the error" "$before" "$(lab_dump)"
    expect_forward_answered
}
