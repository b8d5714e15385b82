# shellcheck shell=bash
# Interfaces change places, and the entries follow the ISP; sourced by tests/vm/story.

# dial_in_order ISP…: the first has ppp0.
dial_in_order() {
    local isp
    for isp; do dial "$isp"; done
    expect_equal "interface of $1" ppp0 "$(interface_of "$1")"
}

# expect_isp0_at INTERFACE: its entries are there, and stay when nothing but the kernel tells whose interface that is.
expect_isp0_at() {
    local before
    expect_source_rule "$X"
    expect_default_route "$1"
    expect_forward_answered
    before=$(lab_dump)
    on_router mh-hook sync
    expect_equal "after sync" "$before" "$(lab_dump)"
}

test_entries_follow_the_isp_when_interfaces_change_places() {
    local before
    before=$(lab_dump)
    links_in_order_of_dialling
    configure 'ipparam = "line0"' 'ipparam = "line1"'
    dial_in_order isp1 isp0
    expect_isp0_at ppp1
    expect_packets isp1 foreign none
    hang_up isp0 isp1
    configure 'linkname = "isp0"' 'linkname = "isp1"'
    dial_in_order isp0 isp1
    expect_isp0_at ppp0
    hang_up isp0 isp1
    expect_equal "after both links went down" "$before" "$(lab_dump)"
    configure 'peer = "isp0"' 'peer = "isp1"'
    dial_in_order isp1 isp0
    expect_isp0_at ppp1
    hang_up isp0 isp1
    expect_equal "after both links went down" "$before" "$(lab_dump)"
}

test_an_interface_for_identity_is_fooled_when_interfaces_change_places() {
    links_in_order_of_dialling
    dial_in_order isp1 isp0
    expect_source_rule 198.51.100.20
    expect_forward_silent
}

# pppd may run ip-down when the interface is another ISP's already.
test_late_downs_of_interfaces_that_changed_places_change_nothing() {
    local before
    links_in_order_of_dialling
    configure 'peer = "isp0"' 'peer = "isp1"'
    dial_in_order isp0 isp1
    hooks_wait ahead down
    hang_up isp0 isp1
    dial_in_order isp1 isp0
    expect_isp0_at ppp1
    before=$(lab_dump)
    hooks_go
    wait_event "down isp0 $X ppp0"
    wait_event "down isp1 198.51.100.20 ppp1"
    expect_equal "after late downs" "$before" "$(lab_dump)"
    expect_forward_answered
}
