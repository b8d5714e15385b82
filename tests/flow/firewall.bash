# shellcheck shell=bash
# accept-forward: a firewall that lets nothing through but what it knows, laid out as Docker's.

lock_up() {
    on_router /usr/sbin/iptables-restore <<'EOF'
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A FORWARD -i ppp0 -m comment --comment "all else" -j REJECT
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
-A DOCKER-FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -o docker0 -j DOCKER
-A DOCKER-FORWARD -i docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
EOF
}

# Everybody else's rules and chains, in their order.
others() { on_router /usr/sbin/iptables-save -t "$1" | grep '^[-:*]' | grep -v mh- | sed 's/ \[.*//'; }
everybody_else() { others nat; others filter; }

test_forwards_pass_a_locked_firewall_with_accept_forward_only() {
    local others
    lock_up
    others=$(everybody_else)
    configure "$FORWARD_80"
    mh_hook up ppp0
    expect_equal "others' rules" "$others" "$(everybody_else)"
    expect_forward_silent
    expect_silence lanhost tcp "$X" 80
    configure "accept-forward = true"$'\n'"$FORWARD_80"
    mh_hook up ppp0
    expect_equal "others' rules" "$others" "$(everybody_else)"
    expect_forward_answered
    expect_answer "server 192.168.0.1" lanhost tcp "$X" 80
    expect_answer "server 192.168.0.1" server tcp "$X" 80
    configure "$FORWARD_80"
    mh_hook up ppp0
    expect_equal "others' rules" "$others" "$(everybody_else)"
    expect_forward_silent
    mh_hook down ppp0
    expect_equal "others' rules" "$others" "$(everybody_else)"
}

test_a_locked_firewall_lets_nothing_through_but_the_forwards() {
    in_ns isp0 ip route add 192.168.0.0/24 dev customer
    in_ns client ip route add 192.168.0.0/24 dev isp0
    in_ns router ip route replace default dev ppp0
    configure "accept-forward = true"$'\n'"$FORWARD_80"
    mh_hook up ppp0
    # The open firewall: not by our doing, but it tells that the way is there.
    expect_answer "client $X" lanhost tcp 192.0.2.9 80
    lab_wait on_router conntrack -L 2>/dev/null
    lock_up
    mh_hook up ppp0
    expect_forward_answered
    expect_silence lanhost tcp 192.0.2.9 80
    expect_silence client tcp 192.168.0.2 80
}

test_without_one_entry_a_locked_firewall_stays_locked() {
    local entry
    lock_up
    configure "accept-forward = true"$'\n'"hairpin = false"$'\n'"$FORWARD_80"
    for entry in "-i ppp0 .*ACCEPT" "-o ppp0 .*ACCEPT"; do
        mh_hook up ppp0
        expect_forward_answered
        leave_out filter "$entry"
        expect_forward_silent
    done
    configure "accept-forward = true"$'\n'"$FORWARD_80"
    mh_hook up ppp0
    expect_answer "server 192.168.0.1" lanhost tcp "$X" 80
    leave_out filter "-i eth1 .*ACCEPT"
    expect_silence lanhost tcp "$X" 80
    expect_forward_answered
}
