# shellcheck shell=bash
# Links with several addresses, with one of the LAN's, and uplinks that are known by their address.

SECOND=203.0.113.11

# isp_gives PREFIX: it is the customer's, too.
isp_gives() {
    ip -n isp0 route add "$1" dev customer
    in_ns isp0 /usr/sbin/iptables -I FORWARD -s "$1" -m comment --comment more -j ACCEPT
}

# second_address: the link has one more.
second_address() {
    isp_gives "$SECOND"
    ip -n router address add "$SECOND/32" dev ppp0
}

test_each_address_of_a_link_has_all_that_the_first_one_has() {
    local before address
    lab_listen server tcp 443
    lab_listen lanhost tcp 443
    second_address
    before=$(lab_dump)
    configure "forward = [
  { port = 80, to = \"192.168.0.2\" },
  { port = 443, to = \"192.168.0.2\", address = \"$X\" },
  { port = 443, to = \"192.168.0.3\", address = \"$SECOND\" },
]"
    mh_hook up ppp1
    mh_hook up ppp0
    isp_zero
    for address in "$X" "$SECOND"; do
        expect_forward_answered "$address"
        expect_own_service_answered "$address"
        # The LAN: the router's own service, and the forward.
        expect_answer "router 192.168.0.3" lanhost tcp "$address" 8080
        expect_answer "server 192.168.0.1" lanhost tcp "$address" 80
        expect_answer "server $address" router tcp "$address" 80
    done
    expect_answer "server 192.0.2.9" client tcp "$X" 443
    expect_answer "lanhost 192.0.2.9" client tcp "$SECOND" 443
    expect_packets isp1 foreign none
    expect_answer "client $SECOND" router tcp 192.0.2.9 80 --source "$SECOND"
    leave_out_rule "100: from $SECOND "
    expect_silence router tcp 192.0.2.9 80 --source "$SECOND"
    mh_hook sync
    leave_out_rule "98: from $SECOND "
    expect_silence lanhost tcp "$SECOND" 8080
    mh_hook -q down ppp0
    mh_hook -q down ppp1
    expect_equal "after down" "$before" "$(lab_dump)"
}

test_an_address_that_comes_or_goes_is_seen_by_the_next_event() {
    configure "$FORWARD_80"
    mh_hook up ppp1
    mh_hook up ppp0
    expect_silence client tcp "$SECOND" 8080
    second_address
    mh_hook -q event up ppp0 /dev/null 0 "$X" 203.0.113.1
    expect_own_service_answered "$SECOND"
    expect_forward_answered "$SECOND"
    ip -n router address del "$SECOND/32" dev ppp0
    mh_hook -q sync
    expect_equal "what is left of it" "" "$(lab_dump | grep "$SECOND" || true)"
    expect_forward_answered
}

# The provider routes a prefix, and its customer's router has one address of it on both sides.
test_an_unnumbered_link_has_the_address_of_the_lan() {
    local before
    isp_gives 203.0.113.12
    ip -n router address add "$X/29" dev eth1
    ip -n server address add 203.0.113.12/29 dev eth0
    ip -n server route replace default via "$X"
    configure "pin = [\"203.0.113.8/29\"]
masquerade = false
$FORWARD_80"
    sed -i 's|"192.168.0.0/24"|"192.168.0.0/24", "203.0.113.8/29"|' "$LAB_CONFIG"
    before=$(lab_dump)
    mh_hook up ppp1
    mh_hook up ppp0
    isp_zero
    expect_own_service_answered
    expect_forward_answered
    # The server's own address is routed, and not translated.
    expect_answer "server 192.0.2.9" client tcp 203.0.113.12 80
    expect_answer "client 203.0.113.12" server tcp 192.0.2.9 80
    expect_answer "router 203.0.113.12" server tcp "$X" 8080
    expect_packets isp1 foreign none
    mh_hook -q down ppp0
    mh_hook -q down ppp1
    expect_equal "after down" "$before" "$(lab_dump)"
}

test_a_forward_to_another_port_of_this_router() {
    lab_listen router tcp 8443
    configure 'forward = [
  { port = 443, to = ":8443", from = ["192.0.2.9", "192.168.0.0/24", "203.0.113.10"] },
  { port = [80, "2000-2002"], to = "192.168.0.2" },
]'
    lab_listen server tcp 2001
    mh_hook up ppp1
    mh_hook up ppp0
    isp_zero
    expect_answer "router 192.0.2.9" client tcp "$X" 443
    expect_answer "router 192.168.0.3" lanhost tcp "$X" 443
    expect_silence client tcp "$X" 443 --source 192.0.2.77
    expect_answer "server 192.0.2.9" client tcp "$X" 2001
    expect_forward_answered
    expect_packets isp1 foreign none
    mh_hook status --json >"$LAB_DIR/json"
    expect_schema status "$LAB_DIR/json"
    expect_equal "in status" ":8443" "$(field "$LAB_DIR/json" uplinks 0 forwards 0 to)"
}

## Known by the address

known_by_address() {
    lab_config <<EOF
[lan]
interfaces = ["eth1"]
networks = ["192.168.0.0/24"]

[uplink.isp0]
address = "$X"
table = 10
$FORWARD_80

[uplink.isp1]
interface = "ppp1"
EOF
}

test_an_uplink_is_wherever_its_address_is() {
    known_by_address
    # As after a boot: nothing is installed, and no event has come.
    mh_hook -q sync
    expect_forward_answered
    expect_own_service_answered
    ip -n router link set ppp0 down
    ip -n router link set ppp0 name ppp7
    ip -n router link set ppp7 up
    mh_hook -q event up ppp7 /dev/null 0 "$X" 203.0.113.1
    expect_forward_answered
    expect_own_service_answered
    expect_equal "what names the former interface" "" "$(lab_dump | grep -w ppp0 | grep mh- || true)"
    mh_hook -q down ppp7
    expect_equal "after down" "" "$(lab_dump | grep -E 'mh-isp0|proto 109.*table 10' || true)"
}

test_a_link_that_comes_with_another_address_is_not_the_uplink() {
    known_by_address
    sed -i "s/^address = .*/interface = \"ppp0\"\n&/" "$LAB_CONFIG"
    mh_hook -q up ppp0
    expect_forward_answered
    lab_link_down ppp0
    mh_hook -q event down ppp0 /dev/null 0 "$X" 203.0.113.1
    # Behind the provider's own translation (RFC 6598).
    lab_link_up ppp0 100.64.3.2
    mh_hook event up ppp0 /dev/null 0 100.64.3.2 100.64.0.1 2>"$LAB_DIR/said"
    grep -q "ppp0 has come up with the address 100.64.3.2, so it is not isp0, whose address is $X" "$LAB_DIR/said" ||
        fail "it said: $(cat "$LAB_DIR/said")"
    expect_equal "entries of isp0" "" "$(lab_dump | grep mh-isp0 || true)"
    if mh_hook up ppp0 2>"$LAB_DIR/said"; then fail "by hand it is taken for isp0"; fi
    grep -q "ppp0 does not have $X, the address of isp0" "$LAB_DIR/said" || fail "it said: $(cat "$LAB_DIR/said")"
}

test_a_local_address_that_the_link_does_not_have_is_refused() {
    local before
    configure "$FORWARD_80"
    before=$(lab_dump)
    if mh_hook up ppp0 --local "$SECOND" 2>"$LAB_DIR/said"; then fail "entries are made for it"; fi
    grep -q "ppp0 does not have the address $SECOND, but $X" "$LAB_DIR/said" || fail "it said: $(cat "$LAB_DIR/said")"
    expect_equal "what is changed" "$before" "$(lab_dump)"
}
