# shellcheck shell=bash
# hairpin: the LAN reaches the forwards by the public address.

test_the_lan_and_the_server_itself_reach_a_forward_by_the_public_address() {
    expect_silence lanhost tcp "$X" 80
    mh_hook up ppp1
    mh_hook up ppp0
    isp_zero
    # The router stands between: the server answers to it, not to a neighbour that asked somebody else.
    expect_answer "server 192.168.0.1" lanhost tcp "$X" 80
    expect_answer "server 192.168.0.1" server tcp "$X" 80
    expect_answer "server 192.168.0.1" lanhost udp "$X" 27015
    expect_answer "router 192.168.0.3" lanhost tcp "$X" 8080
    expect_answer "router 192.168.0.2" server tcp "$X" 8080
    expect_nothing_at_the_isps
    expect_forward_answered
}

test_without_the_key_hairpin_the_lan_reaches_no_forward() {
    configure "hairpin = false"$'\n'"$FORWARD_80"
    mh_hook up ppp0
    expect_silence lanhost tcp "$X" 80
    expect_silence server tcp "$X" 80
    expect_answer "router 192.168.0.3" lanhost tcp "$X" 8080
    expect_forward_answered
    configure "$FORWARD_80"
    mh_hook up ppp0
    expect_answer "server 192.168.0.1" lanhost tcp "$X" 80
    configure "hairpin = false"$'\n'"$FORWARD_80"
    mh_hook up ppp0
    expect_silence lanhost tcp "$X" 80
}

test_without_one_entry_of_the_hairpin_the_lan_reaches_no_forward() {
    local entry
    for entry in "-d $X/32 -i eth1 -j mh-isp0" "-o eth1 .*--ctorigdst $X "; do
        mh_hook up ppp0
        expect_answer "server 192.168.0.1" lanhost tcp "$X" 80
        leave_out nat "$entry"
        expect_silence lanhost tcp "$X" 80
        expect_silence server tcp "$X" 80
        expect_forward_answered
    done
}

test_the_hairpin_follows_the_address() {
    mh_hook up ppp0
    expect_answer "server 192.168.0.1" lanhost tcp "$X" 80
    lab_link_down ppp0
    lab_link_up ppp0 203.0.113.99
    expect_silence lanhost tcp 203.0.113.99 80
    mh_hook up ppp0
    expect_answer "server 192.168.0.1" lanhost tcp 203.0.113.99 80
    expect_answer "server 192.168.0.1" server tcp 203.0.113.99 80
    expect_silence lanhost tcp "$X" 80
}
