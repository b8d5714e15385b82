# shellcheck shell=bash
# Several LANs: more of them behind a bridge or a VLAN's name, and a tunnel to a prefix behind another router.

# lan_host NAMESPACE INTERFACE 192.168.N: one more LAN at the router, with one host, .2.
lan_host() {
    new_host "$1"
    case $2 in
        br-*)
            ip -n router link add "$2" type bridge
            ip link add "$1" netns router type veth peer eth0 netns "$1"
            ip -n router link set "$1" master "$2" up
            ;;
        # A kernel may lack VLANs; their names are what matters here.
        *) ip link add "$2" netns router type veth peer eth0 netns "$1" ;;
    esac
    ip -n router address add "$3.1/24" dev "$2"
    ip -n router link set "$2" up
    ip -n "$1" address add "$3.2/24" dev eth0
    ip -n "$1" link set eth0 up
    ip -n "$1" route add default via "$3.1"
}

# A tunnel that has no addresses; 10.8.0.0/24 lies behind it.
tunnel() {
    new_host remote
    lab_wire router wg0 remote wg0
    ip -n remote address add 10.8.0.2/32 dev lo
    ip -n remote route add default dev wg0 src 10.8.0.2
    ip -n router route add 10.8.0.0/24 dev wg0
}

new_host() {
    ip netns add "$1"
    lab_sysctl "$1" net.ipv4.conf.{all,default}.rp_filter=0 net.ipv6.conf.{all,default}.disable_ipv6=1
    ip -n "$1" link set lo up
}

# several_lans [ISP0]: each with a host that listens, and a forward to it.
several_lans() {
    lan_host second br-lan2 192.168.1
    lan_host vlan eth1.10 192.168.10
    tunnel
    lab_listen second tcp 80
    lab_listen vlan tcp 80
    lab_listen remote tcp 80
    lab_config <<EOF
[lan]
interfaces = ["eth1", "br-lan2", "eth1.10", "wg0"]
networks = ["192.168.0.0/24", "192.168.1.0/24", "192.168.10.0/24", "10.8.0.0/24"]

[uplink.isp0]
interface = "ppp0"
table = 10
${1-}
forward = [
  { port = 80, to = "192.168.0.2" },
  { port = 81, to = "192.168.1.2:80" },
  { port = 82, to = "192.168.10.2:80" },
  { port = 83, to = "10.8.0.2:80" },
]

[uplink.isp1]
interface = "ppp1"
EOF
}

test_forwards_to_every_lan_are_answered() {
    local place
    several_lans
    mh_hook up ppp0
    expect_forward_answered
    expect_answer "second 192.0.2.9" client tcp "$X" 81
    expect_answer "vlan 192.0.2.9" client tcp "$X" 82
    expect_answer "remote 192.0.2.9" client tcp "$X" 83
    expect_packets isp1 foreign none
    isp_zero
    leave_out mangle '-A PREROUTING ! -i ppp0 '
    for place in 80 81 82 83; do
        expect_silence client tcp "$X" "$place"
    done
    expect_packets isp1 foreign some
}

# Nobody need list the bridge of containers or the tunnel that a forward's target is behind.
test_forwards_to_hosts_behind_interfaces_that_the_lan_does_not_name_are_answered() {
    several_lans
    sed -i 's/^interfaces = .*/interfaces = ["eth1"]/; s/^networks = .*/networks = ["192.168.0.0\/24"]/' "$LAB_CONFIG"
    mh_hook up ppp0
    expect_forward_answered
    expect_answer "second 192.0.2.9" client tcp "$X" 81
    expect_answer "vlan 192.0.2.9" client tcp "$X" 82
    expect_answer "remote 192.0.2.9" client tcp "$X" 83
    expect_packets isp1 foreign none
}

test_lans_reach_each_other_and_nothing_of_that_leaves_by_an_uplink() {
    several_lans 'pin = ["192.168.0.3", "10.8.0.2"]'
    mh_hook up ppp1
    mh_hook up ppp0
    isp_zero
    expect_answer "second 192.168.0.3" lanhost tcp 192.168.1.2 80
    expect_answer "vlan 192.168.1.2" second tcp 192.168.10.2 80
    expect_answer "remote 192.168.0.2" server tcp 10.8.0.2 80
    expect_answer "server 10.8.0.2" remote tcp 192.168.0.2 80
    expect_answer "router 10.8.0.2" remote tcp "$X" 8080
    # By the public address, from a LAN to another, which sees the router.
    expect_answer "server 192.168.0.1" second tcp "$X" 80
    expect_answer "second 192.168.1.1" lanhost tcp "$X" 81
    expect_answer "second 192.168.1.1" remote tcp "$X" 81
    expect_answer "vlan 192.168.10.1" second tcp "$X" 82
    expect_nothing_at_the_isps
}

test_every_lan_goes_out_masqueraded() {
    local namespace
    several_lans
    expect_silence second tcp 192.0.2.9 80
    expect_silence remote tcp 192.0.2.9 80
    mh_hook up ppp1
    mh_hook up ppp0
    isp_zero
    for namespace in lanhost second vlan remote; do
        expect_answer "client 198.51.100.20" "$namespace" tcp 192.0.2.9 80
    done
    expect_packets isp1 foreign none
    expect_packets isp0 customer none
    leave_out nat '-s 10.8.0.0/24 -o ppp1 '
    expect_silence remote tcp 192.0.2.9 80
}
