# shellcheck shell=bash
# proto: beyond TCP and UDP; forwards without a port; the order in which they stand.

# Each line of a raw protocol is a packet. GRE takes the low bits of its second byte for a version, and 'p' for version 0.
ask_raw() {
    local line="pp $SRANDOM" answer
    answer=$(lab_ask "${LAB_PATIENCE:-1}" client "IP4-SENDTO:$X:$1" "$line")
    [[ $answer == *" $line" ]] || return 1
    echo "${answer%" $line"}"
}

expect_raw_answer() { expect_equal "answer to protocol $2" "pp-$1 192.0.2.9" "$(LAB_PATIENCE=$LAB_WAIT ask_raw "$2" || true)"; }
expect_raw_silence() {
    local answer
    ! answer=$(ask_raw "$1") || fail "protocol $1 got '$answer'"
}

# listen_raw NAMESPACE PROTOCOL COMMAND
listen_raw() {
    lab_answer "$1" "IP4-RECVFROM:$2,fork" "$3"
    lab_wait in_ns "$1" ss -Hanw "sport = :$2"
}

test_gre_and_esp_are_forwarded() {
    local number
    for number in 47 50; do listen_raw lanhost "$number" "$LAB_DIR/answer pp-lanhost"; done
    configure 'forward = [{ proto = "gre", to = "192.168.0.3" }]'
    expect_raw_silence 47
    mh_hook up ppp0
    expect_raw_answer lanhost 47
    expect_raw_silence 50
    configure 'forward = [{ proto = "esp", to = "192.168.0.3" }]'
    mh_hook up ppp0
    expect_raw_answer lanhost 50
    expect_raw_silence 47
    expect_packets isp0 customer some
    mh_hook down ppp0
    expect_raw_silence 50
}

# This kernel may lack SCTP's sockets; raw packets with a right checksum (CRC32c) do for DNAT and connection tracking:
# from port 5000 to 5000 and 5001 an INIT (RFC 9260, 3.3.2), and the INIT ACK to the first.
SCTP_INIT_5000='\x13\x88\x13\x88\x00\x00\x00\x00\xfa\x3a\x35\x69\x01\x00\x00\x14\x00\x00\x00\x01\x00\x01\x00\x00\x00\x01\x00\x01\x00\x00\x00\x01'
SCTP_INIT_5001='\x13\x88\x13\x89\x00\x00\x00\x00\xdf\xf1\xee\x9e\x01\x00\x00\x14\x00\x00\x00\x01\x00\x01\x00\x00\x00\x01\x00\x01\x00\x00\x00\x01'
SCTP_INIT_ACK='\x13\x88\x13\x88\x00\x00\x00\x01\x10\xb6\xb8\x0f\x02\x00\x00\x1c\x00\x00\x00\x02\x00\x01\x00\x00\x00\x01\x00\x01\x00\x00\x00\x01\x00\x07\x00\x08\x00\x00\x00\x00'

# sent_and_got PROTOCOL BYTES SECONDS: all that comes back in so many, in hexadecimal.
sent_and_got() {
    # shellcheck disable=SC2059 # bytes
    { printf "$2" | in_ns client socat -t "$3" - "IP4-SENDTO:$X:$1,shut-none" 2>/dev/null || true; } | od -A n -t x1 | tr -d ' \n'
}

test_sctp_is_forwarded_by_its_port() {
    local ack
    # shellcheck disable=SC2059 # bytes
    printf "$SCTP_INIT_ACK" >"$LAB_DIR/init_ack"
    ack=$(od -A n -t x1 "$LAB_DIR/init_ack" | tr -d ' \n')
    printf '#!/bin/sh\nhead --bytes=1 >/dev/null\ncat %s\n' "$LAB_DIR/init_ack" >"$LAB_DIR/acknowledge"
    chmod 0755 "$LAB_DIR/acknowledge"
    listen_raw lanhost 132 "$LAB_DIR/acknowledge"
    configure 'forward = [{ proto = "sctp", port = 5000, to = "192.168.0.3" }]'
    expect_equal "INIT without a forward" "" "$(sent_and_got 132 "$SCTP_INIT_5000" 1)"
    mh_hook up ppp0
    expect_equal "INIT" "$ack" "$(sent_and_got 132 "$SCTP_INIT_5000" 4)"
    expect_equal "INIT to the port beside it" "" "$(sent_and_got 132 "$SCTP_INIT_5001" 1)"
}

# echo request 1 of the client 1, with its checksum; and the reply.
ECHO_REQUEST='\x08\x00\xf7\xfd\x00\x01\x00\x01'
ECHO_REPLY=0000fffd00010001

test_icmp_is_forwarded() {
    configure 'forward = [{ proto = "icmp", to = "192.168.0.3" }]'
    lab_sysctl router net.ipv4.icmp_echo_ignore_all=1
    in_ns lanhost /usr/sbin/iptables -A INPUT -p icmp --icmp-type echo-request -m comment --comment echo
    expect_equal "echo without a forward" "" "$(sent_and_got 1 "$ECHO_REQUEST" 1)"
    mh_hook up ppp0
    expect_equal "echo" "$ECHO_REPLY" "$(sent_and_got 1 "$ECHO_REQUEST" 4)"
    [[ $(in_ns lanhost /usr/sbin/iptables-save -c) == *"[1:28] -A INPUT"* ]] || fail "the LAN host has counted no echo request"
}

test_a_list_of_protocols_forwards_each() {
    lab_listen server tcp 53
    lab_listen server udp 53
    configure 'forward = [{ proto = ["tcp", "udp"], port = 53, to = "192.168.0.2" }]'
    mh_hook up ppp0
    expect_answer "server 192.0.2.9" client tcp "$X" 53
    expect_answer "server 192.0.2.9" client udp "$X" 53
    leave_out nat '-A mh-isp0 -p udp '
    expect_answer "server 192.0.2.9" client tcp "$X" 53
    expect_silence client udp "$X" 53
}

test_without_a_port_all_of_the_protocol_is_forwarded() {
    configure 'forward = [{ proto = "tcp", to = "192.168.0.2" }]'
    mh_hook up ppp0
    expect_answer "server 192.0.2.9" client tcp "$X" 22
    expect_answer "server 192.0.2.9" client tcp "$X" 80
    expect_silence client udp "$X" 27015
    configure 'forward = [{ proto = ["tcp", "udp"], to = "192.168.0.2" }]'
    mh_hook up ppp0
    expect_answer "server 192.0.2.9" client udp "$X" 27015
}

test_an_exposed_host_gets_all_but_what_stands_ahead_of_it() {
    lab_listen lanhost tcp 80 443
    lab_listen lanhost udp 5353
    listen_raw lanhost 50 "$LAB_DIR/answer pp-lanhost"
    configure "$FORWARD_80"
    mh_hook up ppp0
    expect_silence client tcp "$X" 443
    configure 'forward = [
  { port = 80, to = "192.168.0.2" },
  { proto = "any", to = "192.168.0.3" },
]'
    mh_hook up ppp0
    expect_forward_answered
    expect_answer "lanhost 192.0.2.9" client tcp "$X" 443
    expect_answer "lanhost 192.0.2.9" client udp "$X" 5353
    expect_raw_answer lanhost 50
    expect_answer "server 192.168.0.1" lanhost tcp "$X" 80
    expect_answer "lanhost 192.168.0.1" server tcp "$X" 443
    # The router's own connections from that address still get their answers.
    expect_answer "client $X" router tcp 192.0.2.9 80 --source "$X"
    leave_out nat '-A mh-isp0 .*--dport 80 '
    expect_answer "lanhost 192.0.2.9" client tcp "$X" 80
}
