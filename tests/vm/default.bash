# shellcheck shell=bash
# The default link is the one that fails, which is why people have a second one; sourced by tests/vm/story.

test_the_servers_link_works_whatever_the_default_link_does() {
    local filter
    for filter in 0 1 2; do
        # What a link takes over when it comes up; strict is Debian's own choice, loose that of systemd.
        lab_sysctl router net.ipv4.conf.{all,default}.rp_filter="$filter"
        isp_zero
        # Never dialled.
        dial isp0
        expect_all_of_isp0
        dial isp1
        expect_all_of_isp0
        expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
        # It dies, without a word from pppd. The ISP knows only after a while that its session has ended, unless it begins anew.
        kill_pppd isp1
        expect_all_of_isp0
        isp_offer isp1 198.51.100.20
        dial isp1
        expect_all_of_isp0
        expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
        hang_up isp1
        expect_all_of_isp0
        expect_packets isp1 foreign none
        hang_up isp0
    done
}

# A forward, a UDP range, and the router's own service, from outside and from the LAN.
expect_all_of_isp0() {
    expect_forward_answered
    expect_answer "server 192.0.2.9" client udp "$X" 27022
    expect_answer "router 192.0.2.9" client tcp "$X" 8080
    expect_answer "server 192.168.0.1" lanhost tcp "$X" 80
    expect_answer "router 192.168.0.3" lanhost tcp "$X" 8080
}

# As when the package is installed, or the hooks are made, while the links are up.
test_sync_knows_links_that_were_dialled_before_by_what_their_pppds_were_told() {
    local by
    links_in_order_of_dialling
    for by in ipparam=line linkname=isp peer=isp; do
        configure "${by%=*} = \"${by#*=}0\"" "${by%=*} = \"${by#*=}1\""
        hooks_off
        dial isp1
        dial isp0
        expect_forward_silent
        on_router mh-hook sync
        expect_source_rule "$X"
        expect_default_route "$(interface_of isp0)"
        expect_forward_answered
        expect_equal "the next sync" "# nothing to change" "$(on_router mh-hook --dry-run sync)"
        hooks_on
        hang_up isp0 isp1
    done
    # By its address, which needs no word of pppd's.
    configure "address = \"$X\"" 'linkname = "isp1"'
    hooks_off
    dial isp1
    dial isp0
    on_router mh-hook sync
    expect_forward_answered
    hooks_on
    hang_up isp0 isp1
}
