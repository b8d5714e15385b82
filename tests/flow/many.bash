# shellcheck shell=bash
# Ten thousand forwards: each is found, whichever comes, and who asks for none of them does not pay for them.

# many FORWARDS: so many, of one port each, from 20001 on; in the middle and at the end those that the server has.
many() {
    local port
    echo 'forward = ['
    for ((port = 20001; port <= 20000 + $1; port++)); do
        echo "  { port = $port, to = \"192.168.0.3\" },"
        ((port != 20000 + $1 / 2)) || echo '  { proto = "udp", port = 27015, to = "192.168.0.2" },'
    done
    echo '  { port = 80, to = "192.168.0.2" },
]'
}

# met PATTERN [TABLE]: how many packets the rules of isp0 that fit this have counted.
met() {
    on_router /usr/sbin/iptables-save --counters ${2:+--table "$2"} |
        awk -F '\\[|:' -v of="$1" '/mh-isp0/ && !/^:/ && $0 ~ of { packets += $2 } END { print packets + 0 }'
}

test_of_ten_thousand_forwards_each_is_answered() {
    configure "$(many 10000)"
    mh_hook -q up ppp0
    expect_forward_answered
    expect_answer "server 192.0.2.9" client udp "$X" 27015
    lab_listen lanhost tcp 20001 30000
    expect_answer "lanhost 192.0.2.9" client tcp "$X" 20001
    expect_answer "lanhost 192.0.2.9" client tcp "$X" 30000
    expect_silence client tcp "$X" 30001
    expect_own_service_answered
    expect_packets isp1 foreign none
    mh_hook down ppp0
    expect_forward_silent
}

test_a_connection_meets_its_forwards_once_and_one_of_another_link_never() {
    configure "$(many 1000)"
    mh_hook -q up ppp0
    on_router /usr/sbin/iptables -t nat -Z
    on_router /usr/sbin/iptables -t mangle -Z
    # One connection, of fifty packets. Each waits for its answer: none is under way when they are counted, nor sent back by
    # a port that has closed.
    in_ns client /usr/bin/python3 - "$X" "$LAB_WAIT" <<'EOF'
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.settimeout(int(sys.argv[2]))
    client.bind(("192.0.2.9", 5000))
    client.connect((sys.argv[1], 27015))
    for line in range(50):
        client.send(b"%d\n" % line)
        client.recv(100)
EOF
    expect_equal "packets at the mangle table's jump" 50 "$(met '-A PREROUTING -i ppp0 -j mh-isp0' mangle)"
    # In the nat table the first alone is asked, and by one forward of the thousand and their hundreds.
    expect_equal "packets at the nat table's jump" 1 "$(met '-A PREROUTING -i ppp0 .* -j mh-isp0' nat)"
    expect_equal "packets at its forward" 1 "$(met 'udp --dport 27015 ' nat)"
    expect_equal "packets that a forward took, this one or another" 1 "$(met '-j DNAT' nat)"
    expect_equal "packets at the lines of hundreds" 0 "$(met '--dport .*:.* -j mh-isp0' nat)"

    on_router /usr/sbin/iptables -t nat -Z
    on_router /usr/sbin/iptables -t mangle -Z
    mh_hook up ppp1
    expect_answer "router 192.0.2.9" client tcp 198.51.100.20 8080
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    expect_equal "packets of isp1 at rules of isp0" 0 "$(met '-')"
}
