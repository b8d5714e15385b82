# shellcheck shell=bash
# All that can be configured, at once; sourced by tests/vm/story.

configure_everything() {
    lab_config <<'TOML'
[lan]
interfaces = ["eth1", "eth1.10"]
networks = ["192.168.0.0/24", "10.8.0.0/24"]

[uplink.isp0]
interface = "ppp0"
peer = "isp0"
table = 10
accept-forward = true
pin = ["192.168.0.3", "10.8.0.128/25"]
forward = [
  { port = 2222, to = "192.168.0.2:22", from = ["192.0.2.77/32"] },
  { proto = ["tcp", "udp"], port = 53, to = "192.168.0.4" },
  { proto = "sctp", port = "5000-5010", to = "192.168.0.4" },
  { proto = ["gre", "esp", "icmp"], to = "192.168.0.4" },
  { proto = "any", to = "192.168.0.2" },
]

[uplink.isp1]
ipparam = "line1"
table = 300
mark = 0x20
accept-forward = true
forward = [
  { port = 80, to = "192.168.0.2" },
  { proto = "udp", port = "27015-27030", to = "192.168.0.2" },
]
TOML
}

# A firewall with others' chains that lets nothing through, and strict filtering.
lock_up() {
    lab_sysctl router net.ipv4.conf.{all,default}.rp_filter=1
    on_router /usr/sbin/iptables-restore --noflush <<'EOF'
*filter
:FORWARD DROP [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -i docker0 -j ACCEPT
-A FORWARD -i ppp0 -m comment --comment "all else" -j REJECT
-A DOCKER-USER -s 192.168.0.0/24 -d 192.0.2.9/32 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-USER -s 192.0.2.9/32 -p tcp -m tcp --sport 80 -m conntrack --ctstate ESTABLISHED -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
*nat
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
COMMIT
EOF
}

test_everything_switched_on_leaves_what_was_there_before() {
    local before port address
    configure_everything
    lock_up
    foreign_entries
    before=$(lab_dump)
    dial isp0 isp1
    for address in "$X" 198.51.100.20; do
        expect_forward_answered "$address"
        for port in 27015 27022; do
            expect_answer "server 192.0.2.9" client udp "$address" "$port"
        done
        expect_answer "server 192.168.0.1" lanhost tcp "$address" 80
        expect_answer "server 192.168.0.1" server tcp "$address" 80
    done
    expect_answer "server 192.0.2.77" client tcp "$X" 2222 --source 192.0.2.77
    expect_answer "client $X" lanhost tcp 192.0.2.9 80
    expect_answer "client 198.51.100.20" server tcp 192.0.2.9 80
    expect_packets isp0 foreign none
    expect_packets isp1 foreign none
    hang_up isp0
    expect_forward_answered 198.51.100.20
    hang_up isp1
    # Pinned hosts reach nothing outside until a person says so.
    [[ $(on_router ip rule list priority 101) == *'from 192.168.0.3 lookup 10'* ]] || fail "$(on_router ip rule)"
    free_pins
    expect_equal "after both links went down" "$before" "$(lab_dump)"
    dial isp1 isp0
    expect_forward_answered
    hang_up isp0 isp1
    free_pins
    expect_equal "after both went down at once" "$before" "$(lab_dump)"
}

free_pins() {
    on_router mh-hook -q down ppp0
    on_router mh-hook -q down ppp1
}
