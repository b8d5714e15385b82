# shellcheck shell=bash
# clamp-mss: large data pass a link with a small MTU although nobody is told of it. Segments that a sender leaves whole
# for the device to split (TSO) make no difference: the kernel measures them as they will be (ip_exceeds_mtu, ip_forward.c).

MEGABYTES=3

# small_link MTU: of the link, at both its ends; the "fragmentation needed" of either is lost.
small_link() {
    local namespace
    ip -n router link set ppp0 mtu "$1"
    ip -n isp0 link set customer mtu "$1"
    for namespace in router isp0; do
        in_ns "$namespace" /usr/sbin/iptables -C OUTPUT -p icmp --icmp-type fragmentation-needed -j DROP 2>/dev/null ||
            in_ns "$namespace" /usr/sbin/iptables -A OUTPUT -p icmp --icmp-type fragmentation-needed -j DROP
    done
}

# Ports 81 and 82 of the server: one sends, one tells how much it got.
serve_megabytes() {
    lab_answer server TCP4-LISTEN:81,fork,reuseaddr "head --bytes=${MEGABYTES}M /dev/zero" 2>/dev/null
    lab_answer server TCP4-LISTEN:82,fork,reuseaddr "wc --bytes" 2>/dev/null
    lab_wait in_ns server ss -Hlnt "sport = :81"
    lab_wait in_ns server ss -Hlnt "sport = :82"
}

received() { in_ns client timeout "$1" socat -u "TCP4:$X:81" - | wc --bytes || true; }
sent() {
    head --bytes="${MEGABYTES}M" /dev/zero | in_ns client timeout "$1" socat -t "$LAB_WAIT" - "TCP4:$X:82" || true
}

expect_download() { expect_equal "bytes from the server" $((MEGABYTES << 20)) "$(received "$LAB_WAIT")"; }
expect_upload() { expect_equal "bytes to the server" $((MEGABYTES << 20)) "$(sent "$LAB_WAIT")"; }

# The connection is there, its large segments are not. Those that pass take much less than 3 s.
expect_download_hangs() {
    local bytes
    bytes=$(received 3)
    ((bytes < 10000)) || fail "$bytes bytes came from the server"
}
expect_upload_hangs() { expect_equal "bytes to the server" "" "$(sent 3)"; }

configure_megabytes() {
    configure "$1"'
forward = [{ port = "81-82", to = "192.168.0.2" }]'
}

test_large_data_pass_a_small_link_both_ways() {
    local mtu
    serve_megabytes
    for mtu in 1492 1454; do
        small_link "$mtu"
        configure_megabytes ""
        mh_hook up ppp0
        expect_download
        expect_upload
        configure_megabytes "clamp-mss = false"
        mh_hook up ppp0
        expect_download_hangs
        expect_upload_hangs
    done
}

test_large_data_pass_where_both_links_are_small() {
    serve_megabytes
    small_link 1492
    ip -n router link set ppp1 mtu 1492
    configure_megabytes ""
    mh_hook up ppp0
    expect_download
    expect_upload
}

test_each_direction_of_large_data_has_its_entry() {
    serve_megabytes
    small_link 1454
    configure_megabytes ""
    mh_hook up ppp0
    leave_out mangle '-i ppp0 .*TCPMSS'
    expect_download_hangs
    expect_upload
    mh_hook up ppp0
    leave_out mangle '-o ppp0 .*TCPMSS'
    expect_download
    expect_upload_hangs
}

lan_sends() {
    head --bytes="${MEGABYTES}M" /dev/zero | in_ns lanhost timeout "$1" socat -t "$LAB_WAIT" - TCP4:192.0.2.9:82 || true
}

test_large_data_of_the_lan_pass_a_small_link() {
    lab_answer client TCP4-LISTEN:82,fork,reuseaddr "wc --bytes" 2>/dev/null
    lab_wait in_ns client ss -Hlnt "sport = :82"
    small_link 1492
    ip -n router route replace default dev ppp0
    configure "clamp-mss = false"
    mh_hook up ppp0
    expect_equal "bytes to the client" "" "$(lan_sends 3)"
    configure ""
    mh_hook up ppp0
    expect_equal "bytes to the client" $((MEGABYTES << 20)) "$(lan_sends "$LAB_WAIT")"
}
