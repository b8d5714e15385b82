# shellcheck shell=bash
# Other programs' entries beside ours, in the form in which these programs lay them out.

# beside_docker: Docker 28's daemon with its default bridge, and a container that publishes port 8888 (after
# integration/network/bridge/iptablesdoc in moby/moby). FORWARD's policy is DROP where it has turned forwarding on.
beside_docker() {
    ip -n router link add docker0 type bridge
    ip -n router address add 172.17.0.1/16 dev docker0
    ip -n router link set docker0 up
    in_ns router /usr/sbin/iptables-restore --noflush <<'EOF'
*raw
-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP
COMMIT
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8888 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-INTERNAL - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-INTERNAL
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
COMMIT
EOF
}

# beside_tailscale: tailscaled as a subnet router, with its rules, its table 52, and marks in bits of its own.
beside_tailscale() {
    ip -n router link add tailscale0 type bridge
    ip -n router address add 100.101.102.103/32 dev tailscale0
    ip -n router link set tailscale0 up
    ip -n router -batch - <<'EOF'
route add 100.100.100.100/32 dev tailscale0 table 52
route add 100.64.7.8/32 dev tailscale0 table 52
rule add priority 5210 fwmark 0x80000/0xff0000 lookup main
rule add priority 5230 fwmark 0x80000/0xff0000 lookup default
rule add priority 5250 fwmark 0x80000/0xff0000 unreachable
rule add priority 5270 lookup 52
EOF
    in_ns router /usr/sbin/iptables-restore --noflush <<'EOF'
*mangle
-A PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j CONNMARK --restore-mark --nfmask 0xff0000 --ctmask 0xff0000
-A OUTPUT -m conntrack --ctstate NEW -m mark ! --mark 0x0/0xff0000 -j CONNMARK --save-mark --nfmask 0xff0000 --ctmask 0xff0000
COMMIT
*nat
:ts-postrouting - [0:0]
-I POSTROUTING -j ts-postrouting
-A ts-postrouting -m mark --mark 0x40000/0xff0000 -j MASQUERADE
COMMIT
*filter
:ts-forward - [0:0]
:ts-input - [0:0]
-I FORWARD -j ts-forward
-I INPUT -j ts-input
-A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
-A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT
-A ts-forward -s 100.64.0.0/10 -o tailscale0 -j DROP
-A ts-forward -o tailscale0 -j ACCEPT
-A ts-input -s 100.101.102.103/32 -i lo -j ACCEPT
-A ts-input -s 100.115.92.0/23 ! -i tailscale0 -j RETURN
-A ts-input -s 100.64.0.0/10 ! -i tailscale0 -j DROP
-A ts-input -i tailscale0 -j ACCEPT
-A ts-input -p udp -m udp --dport 41641 -j ACCEPT
COMMIT
EOF
}

# beside_ufw: ufw 0.36 enabled with its defaults: nothing is forwarded but replies and some of ICMP.
beside_ufw() {
    in_ns router /usr/sbin/iptables-restore --noflush <<'EOF'
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:ufw-after-forward - [0:0]
:ufw-after-input - [0:0]
:ufw-after-logging-forward - [0:0]
:ufw-after-logging-input - [0:0]
:ufw-before-forward - [0:0]
:ufw-before-input - [0:0]
:ufw-before-logging-forward - [0:0]
:ufw-before-logging-input - [0:0]
:ufw-logging-deny - [0:0]
:ufw-not-local - [0:0]
:ufw-reject-forward - [0:0]
:ufw-reject-input - [0:0]
:ufw-skip-to-policy-input - [0:0]
:ufw-track-forward - [0:0]
:ufw-track-input - [0:0]
:ufw-user-forward - [0:0]
:ufw-user-input - [0:0]
-A INPUT -j ufw-before-logging-input
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-input
-A INPUT -j ufw-after-logging-input
-A INPUT -j ufw-reject-input
-A INPUT -j ufw-track-input
-A FORWARD -j ufw-before-logging-forward
-A FORWARD -j ufw-before-forward
-A FORWARD -j ufw-after-forward
-A FORWARD -j ufw-after-logging-forward
-A FORWARD -j ufw-reject-forward
-A FORWARD -j ufw-track-forward
-A ufw-after-input -p udp -m udp --dport 137 -j ufw-skip-to-policy-input
-A ufw-after-input -m addrtype --dst-type BROADCAST -j ufw-skip-to-policy-input
-A ufw-after-logging-forward -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW BLOCK] "
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 3 -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-forward -j ufw-user-forward
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j ufw-logging-deny
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -j ufw-user-input
-A ufw-logging-deny -m conntrack --ctstate INVALID -m limit --limit 3/min --limit-burst 10 -j RETURN
-A ufw-logging-deny -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW BLOCK] "
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m limit --limit 3/min --limit-burst 10 -j ufw-logging-deny
-A ufw-not-local -j DROP
-A ufw-skip-to-policy-input -j DROP
-A ufw-user-input -p tcp -m tcp --dport 8080 -j ACCEPT
COMMIT
EOF
}

test_sync_goes_on_past_an_uplink_in_trouble() {
    local status=0
    configure "$FORWARD_80" "table = 20
$FORWARD_80"
    mh_hook -q sync
    # Somebody's default route in the table of the one; and entries of both that are gone.
    on_router ip route replace default via 203.0.113.1 dev ppp0 onlink table 10
    on_router ip rule del priority 100 from 198.51.100.20 lookup 20 protocol 109
    on_router /usr/sbin/iptables -t nat -F
    mh_hook sync 2>"$LAB_DIR/said" || status=$?
    expect_equal "exit status" 1 "$status"
    grep -q 'ip route add default dev ppp0 table 10.*File exists' "$LAB_DIR/said" || fail "it said: $(cat "$LAB_DIR/said")"
    expect_forward_answered 198.51.100.20
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
}

test_a_lan_address_on_one_link_leaves_the_other_alone() {
    local status=0
    configure "$FORWARD_80" "table = 20
$FORWARD_80"
    sed -i 's|"192.168.0.0/24"|"192.168.0.0/24", "10.0.0.0/8"|' "$LAB_CONFIG"
    lab_link_down ppp0
    lab_link_up ppp0 10.64.3.9
    mh_hook sync 2>"$LAB_DIR/said" || status=$?
    expect_equal "exit status" 1 "$status"
    grep -q 'isp0: ppp0: 10.64.3.9 can.t be an uplink.s address: it lies in the LAN 10.0.0.0/8' "$LAB_DIR/said" ||
        fail "it said: $(cat "$LAB_DIR/said")"
    expect_forward_answered 198.51.100.20
    mh_hook status >"$LAB_DIR/status"
    grep -qE '^refused +isp0 ' "$LAB_DIR/status" || fail "$(cat "$LAB_DIR/status")"
    grep -qE '^up +isp1 ' "$LAB_DIR/status" || fail "$(cat "$LAB_DIR/status")"
}
