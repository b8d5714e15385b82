# shellcheck shell=bash
# pin: hosts of the LAN whose own connections always leave by this uplink.

pinned() {
    configure 'pin = ["192.168.0.3"]
forward = [{ port = 80, to = "192.168.0.2" }]' 'table = 20
forward = [{ port = 80, to = "192.168.0.3" }]'
    mh_hook up ppp1
    mh_hook up ppp0
}

test_a_pinned_host_leaves_by_its_uplink_and_others_by_the_default_link() {
    mh_hook up ppp1
    mh_hook up ppp0
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    pinned
    isp_zero
    expect_answer "client $X" lanhost tcp 192.0.2.9 80
    expect_packets isp1 customer none
    expect_answer "client 198.51.100.20" server tcp 192.0.2.9 80
    expect_packets isp0 foreign none
    expect_packets isp1 foreign none
    leave_out_rule "101: from 192.168.0.3 "
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    mh_hook up ppp0
    expect_answer "client $X" lanhost tcp 192.0.2.9 80
}

test_a_pinned_prefix_holds_every_host_in_it() {
    mh_hook up ppp1
    mh_hook up ppp0
    expect_answer "client 198.51.100.20" server tcp 192.0.2.9 80
    configure 'pin = ["192.168.0.0/24"]'
    mh_hook up ppp0
    expect_answer "client $X" lanhost tcp 192.0.2.9 80
    expect_answer "client $X" server tcp 192.0.2.9 80
}

test_a_pinned_host_reaches_the_lans_and_the_router() {
    local address
    lan_host other eth2 192.168.1
    lab_listen other tcp 80
    pinned
    # The other LAN is one of [lan] networks, too.
    sed -i 's|"192.168.0.0/24"|"192.168.0.0/24", "192.168.1.0/24"|' "$LAB_CONFIG"
    mh_hook sync
    isp_zero
    expect_answer "server 192.168.0.3" lanhost tcp 192.168.0.2 80
    expect_answer "other 192.168.0.3" lanhost tcp 192.168.1.2 80
    for address in 192.168.0.1 192.168.1.1 "$X" 198.51.100.20; do
        expect_answer "router 192.168.0.3" lanhost tcp "$address" 8080
    done
    expect_nothing_at_the_isps
    leave_out_rule "98: from 192.168.0.3 to 192.168.1.0/24 "
    expect_silence lanhost tcp 192.168.1.2 80
}

test_what_came_to_a_pinned_host_by_the_other_uplink_is_answered_there() {
    lab_listen lanhost tcp 80
    pinned
    isp_zero
    expect_answer "lanhost 192.0.2.9" client tcp 198.51.100.20 80
    expect_packets isp1 customer some
    expect_packets isp0 foreign none
    expect_forward_answered
    leave_out_rule "99: .*lookup 20 "
    expect_silence client tcp 198.51.100.20 80
    expect_packets isp0 foreign some
}

test_a_pinned_host_reaches_nothing_outside_while_its_link_is_down() {
    pinned
    expect_answer "client $X" lanhost tcp 192.0.2.9 80
    lab_link_down ppp0
    mh_hook -q event down ppp0 /dev/null 0 "$X" 203.0.113.1
    isp_zero
    expect_silence lanhost tcp 192.0.2.9 80
    # Inside, and what came by the other uplink.
    expect_answer "server 192.168.0.3" lanhost tcp 192.168.0.2 80
    expect_answer "router 192.168.0.3" lanhost tcp 192.168.0.1 8080
    lab_listen lanhost tcp 80
    expect_answer "lanhost 192.0.2.9" client tcp 198.51.100.20 80
    expect_answer "client 198.51.100.20" server tcp 192.0.2.9 80
    mh_hook -q sync
    expect_silence lanhost tcp 192.0.2.9 80
    mh_hook status >"$LAB_DIR/status"
    grep -q '^isp0 is not up: its pinned hosts reach nothing outside: 192.168.0.3' "$LAB_DIR/status" ||
        fail "status says: $(cat "$LAB_DIR/status")"
    # A link that vanishes, and one that was never dialled.
    lab_link_up ppp0 "$X"
    mh_hook -q event up ppp0 /dev/null 0 "$X" 203.0.113.1
    expect_answer "client $X" lanhost tcp 192.0.2.9 80
    lab_link_delete ppp0
    expect_silence lanhost tcp 192.0.2.9 80
    mh_hook -q down ppp0
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    mh_hook -q sync
    expect_silence lanhost tcp 192.0.2.9 80
    # By its name, when it is known by what only pppd knows.
    sed -i '0,/^interface = "ppp0"/s//ipparam = "line0"/' "$LAB_CONFIG"
    mh_hook -q down isp0
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    mh_hook -q sync
    expect_silence lanhost tcp 192.0.2.9 80
    # The uplink is configured no longer.
    lab_config <<EOF
[lan]
interfaces = ["eth1"]
networks = ["192.168.0.0/24"]
[uplink.isp1]
interface = "ppp1"
EOF
    mh_hook -q sync
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    mh_hook -q down ppp1
    expect_equal "rules and routes of ours" "" "$(lab_dump | grep 'proto 109' || true)"
}
