# shellcheck shell=bash
# All keys at once.

test_with_everything_switched_on_up_up_down_leaves_the_router_as_it_was() {
    local before up link
    lock_up
    several_lans
    lab_sysctl router net.ipv4.conf.ppp0.rp_filter=1
    lab_config <<'EOF'
[lan]
interfaces = ["eth1", "br-lan2", "eth1.10", "wg0"]
networks = ["192.168.0.0/24", "192.168.1.0/24", "192.168.10.0/24", "10.8.0.0/24"]

[mark]
mask = 0xff00

[priority]
local = 1001
mark = 1002
source = 1003
pin = 1004

[uplink.isp0]
interface = "ppp0"
ipparam = "param-isp0"
linkname = "line-isp0"
peer = "call-isp0"
table = 10
mark = 0x1200
masquerade = true
hairpin = true
clamp-mss = true
accept-forward = true
pin = ["192.168.0.3", "10.8.0.0/24"]
forward = [
  { port = 80, to = "192.168.0.2" },
  { port = 2222, to = "192.168.0.2:22", from = ["192.0.2.77/32", "198.51.100.0/24"] },
  { proto = "udp", port = "27015-27030", to = "192.168.0.2" },
  { proto = ["tcp", "udp"], port = 53, to = "192.168.1.2" },
  { proto = "sctp", port = 5000, to = "192.168.0.3" },
  { proto = ["gre", "esp", "icmp"], to = "192.168.10.2" },
  { proto = "any", to = "10.8.0.2" },
]

[uplink.isp1]
interface = "ppp1"
table = 20
mark = 0x1300
accept-forward = true
forward = [{ port = 80, to = "192.168.0.2" }]
EOF
    before=$(lab_dump)
    called isp0 up ppp0
    called isp1 up ppp1
    expect_forward_answered
    expect_forward_answered 198.51.100.20
    expect_answer "server 192.0.2.77" client tcp "$X" 2222 --source 192.0.2.77
    expect_answer "server 192.168.0.1" lanhost tcp "$X" 80
    up=$(lab_dump)
    called isp0 up ppp0 2>"$LAB_DIR/log"
    called isp1 up ppp1 2>>"$LAB_DIR/log"
    expect_equal "second up" "$up" "$(lab_dump)"
    expect_equal "what the second up said" "" "$(cat "$LAB_DIR/log")"
    for link in ppp0 ppp1; do mh_hook down "$link"; done
    expect_equal "after down" "$before" "$(lab_dump)"
    expect_equal "rp_filter of ppp0 after down" 1 "$(rp_filter ppp0)"
    expect_equal "src_valid_mark of ppp0 after down" 0 "$(src_valid_mark ppp0)"
}
