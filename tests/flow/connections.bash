# shellcheck shell=bash
# Connections that began before a change: those that contradict it end, and no other. A UDP flow is a fixed source port.

# once SOURCE_PORT ADDRESS PORT: one more datagram of the flow, and what is answered. Its port is free again thereafter.
once() {
    local answer
    answer=$(ask client udp "$2" "$3" --source "192.0.2.9:$1") || return 1
    echo "${answer% *}"
}

expect_once() { expect_equal "answer to $*" "$1 192.0.2.9" "$(LAB_PATIENCE=$LAB_WAIT once "${@:2}" || true)"; }
expect_none() { expect_equal "answer to $*" "" "$(once "$@" || true)"; }

tracked() { on_router conntrack -L -o id "$@" 2>/dev/null; }
# The identities of the connections through our first forward, and of all UDP flows but those to port 27015.
untouched() {
    {
        tracked -p tcp --state ESTABLISHED --orig-dst "$X"
        tracked -p udp | sed '/dport=27015/d'
    } | grep -o ' id=[0-9]*' | sort
}

configure_udp() {
    configure "forward = [{ proto = \"udp\", port = 27015, to = \"192.168.0.$1\" }]"
}

test_a_flow_older_than_its_forward_is_answered_at_once() {
    mh_hook up ppp1
    expect_none 4000 "$X" 27015
    isp_zero
    mh_hook up ppp0
    expect_once server 4000 "$X" 27015
    expect_packets isp1 foreign none
}

test_a_flow_of_a_redirected_forward_reaches_the_new_host() {
    lab_listen lanhost udp 27015
    configure_udp 2
    mh_hook up ppp0
    expect_once server 4000 "$X" 27015
    configure_udp 3
    mh_hook up ppp0
    expect_once lanhost 4000 "$X" 27015
}

test_a_flow_of_a_removed_forward_ends() {
    configure_udp 2
    mh_hook up ppp0
    expect_once server 4000 "$X" 27015
    configure "$FORWARD_80"
    mh_hook up ppp0
    expect_none 4000 "$X" 27015
    expect_equal "what is tracked of it" "" "$(tracked -p udp --reply-src 192.168.0.2)"
}

test_flows_of_a_former_address_end() {
    configure_udp 2
    mh_hook up ppp0
    expect_once server 4000 "$X" 27015
    expect_answer "server 192.168.0.1" lanhost udp "$X" 27015
    lab_link_down ppp0
    mh_hook event down ppp0
    # The address may come again: until another does, nothing contradicts.
    [[ $(tracked -p udp --orig-dst "$X" --reply-src 192.168.0.2) ]] || fail "ended by down"
    lab_link_up ppp0 203.0.113.99
    mh_hook event up ppp0 /dev/null 0 203.0.113.99 203.0.113.1 ''
    expect_equal "what is tracked for $X" "" "$(tracked -p udp --orig-dst "$X" --reply-src 192.168.0.2)"
    expect_once server 4000 203.0.113.99 27015
}

test_flows_of_an_address_that_changed_unseen_end() {
    configure_udp 2
    mh_hook up ppp0
    expect_once server 4000 "$X" 27015
    lab_link_down ppp0
    lab_link_up ppp0 203.0.113.99
    mh_hook event up ppp0 /dev/null 0 203.0.113.99 203.0.113.1 ''
    expect_equal "what is tracked for $X" "" "$(tracked -p udp --orig-dst "$X" --reply-src 192.168.0.2)"
}

test_connections_that_no_change_concerns_live_on() {
    local ids answer
    on_router /usr/sbin/iptables -t nat -A PREROUTING -i ppp0 -p udp --dport 9999 -j DNAT --to-destination 192.168.0.2:27031
    configure "$FORWARD_80"
    mh_hook up ppp0
    mh_hook up ppp1
    # A connection through our forward, another's forward, the LAN's own, and one of the router's.
    mkfifo "$LAB_DIR/line"
    in_ns client socat -t "$LAB_WAIT" - "TCP4:$X:80" <"$LAB_DIR/line" >"$LAB_DIR/answer_later" &
    exec 3>"$LAB_DIR/line"
    lab_wait on_router conntrack -L -p tcp --state ESTABLISHED --orig-dst "$X" 2>/dev/null
    expect_once server 4000 "$X" 9999
    lab_listen client udp 53
    # UDP answers by the address that routing chooses, if it is not told.
    lab_answer router "UDP4-RECVFROM:5000,bind=$X,fork" "$LAB_DIR/answer router"
    lab_wait on_router ss -Hlnu "sport = :5000"
    expect_answer "client 198.51.100.20" lanhost udp 192.0.2.9 53
    expect_once router 4000 "$X" 5000
    # And one that the change does concern.
    expect_none 4000 "$X" 27015
    ids=$(untouched)
    expect_equal "connections" 4 "$(wc -l <<<"$ids")"
    configure 'forward = [
  { port = 80, to = "192.168.0.2" },
  { proto = "udp", port = 27015, to = "192.168.0.2" },
]'
    mh_hook up ppp0
    expect_equal "connections after a change" "$ids" "$(untouched)"
    expect_once server 4000 "$X" 27015
    configure "$FORWARD_80"
    mh_hook up ppp0
    mh_hook up ppp1
    expect_equal "connections after another" "$ids" "$(untouched)"
    echo later >&3
    exec 3>&-
    lab_wait cat "$LAB_DIR/answer_later"
    read -r answer <"$LAB_DIR/answer_later"
    expect_equal "answer" "server 192.0.2.9 later" "$answer"
}

test_what_the_lan_began_before_its_masquerade_ends() {
    configure "$FORWARD_80"
    lab_listen client udp 5060
    on_router /usr/sbin/iptables -t nat -A POSTROUTING -s 172.17.0.0/16 -o ppp1 -j MASQUERADE
    # Late: the link carries the LAN's packets before pppd calls. The ISP drops them.
    in_ns lanhost socat -u - UDP4:192.0.2.9:5060,sourceport=5060 <<<early
    # And one to another network, which leaves by no link of ours.
    lab_wire router eth9 isp1 inside
    ip -n router address add 10.99.0.1/24 dev eth9
    in_ns lanhost socat -u - UDP4:10.99.0.7:5061,sourceport=5061 <<<elsewhere
    [[ $(tracked -p udp --orig-port-src 5060) == *'dst=192.168.0.3 sport=5060 dport=5060'* ]] || fail "nothing is tracked"
    mh_hook -q event up ppp1 /dev/null 0 198.51.100.20 198.51.100.1
    expect_equal "what is tracked of it" "" "$(tracked -p udp --orig-port-src 5060)"
    [[ $(tracked -p udp --orig-port-src 5061) ]] || fail "a connection by another link is ended"
    expect_answer "client 198.51.100.20" lanhost udp 192.0.2.9 5060 --source 192.168.0.3:5060
}

test_thousands_of_connections_end_at_once() {
    local count
    configure 'forward = [{ proto = "any", to = "192.168.0.2" }]'
    mh_hook -q sync
    in_ns client /usr/bin/python3 -c "
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('192.0.2.9', 4000))
for port in range(1, 3001): s.sendto(b'x', ('$X', port))"
    lab_wait tracked -p udp --orig-dst "$X" --orig-port-dst 3000
    lab_link_down ppp0
    lab_link_up ppp0 203.0.113.99
    count=$(processes "$MH_HOOK" --config "$LAB_CONFIG" -q event up ppp0 /dev/null 0 203.0.113.99 203.0.113.1)
    expect_equal "processes, however many connections there are" 3 "$count"
    expect_equal "connections of the former address" "" "$(tracked -p udp --orig-dst "$X")"
}

# A zone has connections of its own (iptables-extensions(8), CT).
test_a_connection_in_a_zone_ends_too() {
    on_router /usr/sbin/iptables -t raw -A PREROUTING -j CT --zone 7
    lab_listen lanhost udp 27015
    configure_udp 2
    mh_hook up ppp0
    expect_once server 4000 "$X" 27015
    [[ $(tracked -p udp --orig-dst "$X") == *zone=7* ]] || fail "no zone: $(tracked -p udp)"
    configure_udp 3
    mh_hook up ppp0
    expect_once lanhost 4000 "$X" 27015
}
