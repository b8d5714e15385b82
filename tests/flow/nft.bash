# shellcheck shell=bash
# Rules of nftables that iptables does not list: explain's verdict is what a packet finds out, and check names what drops,
# with a command that lets the forward pass.

# native LINE…: a table of nftables with these chains and rules.
native() {
    printf '%s\n' "$@" >"$LAB_DIR/native"
    on_router nft -f "$LAB_DIR/native"
}

# cured ID: by the first command of the finding, pasted.
cured() {
    local command
    command=$(findings 'f["fix"][0] if f["id"] == "'"$1"'" else None')
    on_router sh -c "$command"
    expect_not_found "$1"
}

# drops TEXT: the forward is dropped, explain and check say by what, and the command that they name lets it pass.
drops() {
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    explains "$1" "${FROM_CLIENT[@]}"
    expect_found forward-dropped error "$1"
    cured forward-dropped
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
}

nft_up() {
    explain_up
    all_agree
    expect_all_well
}

test_nft_policies_that_drop() {
    nft_up
    native 'table inet strict {' \
        'chain forward { type filter hook forward priority 0; policy drop; ct state established,related accept; iifname "eth1" accept; }' '}'
    drops 'the policy drop of forward in inet strict'
    # In a table that is named as one of iptables.
    native 'delete table inet strict'
    native 'table ip filter {' 'chain forward { type filter hook forward priority 0; policy drop; ct state established accept; iifname "eth1" accept; }' '}'
    drops 'the policy drop of forward in ip filter'
    all_agree
}

test_nft_rules_that_drop() {
    local rule
    nft_up
    for rule in 'iifname "ppp0" drop' 'iifname { "ppp0", "ppp1" } drop' 'iifname "ppp*" tcp dport 80 drop' \
        'tcp dport { 79-81 } drop' 'tcp dport vmap { 22 : accept, 80 : drop }' \
        'tcp dport vmap @ports' 'meta l4proto { tcp, udp } th dport 80 jump closed' 'ip daddr 192.168.0.2 ct state new drop' \
        'ct state vmap { established : accept, new : drop }' 'oifname "ppp0" ip saddr 192.168.0.2 reject' \
        'meta mark & 0xff == 0xa drop' 'ct mark & 0xff == 0xa counter drop' 'ct original ip daddr 203.0.113.10 drop' \
        'iifname != "eth1" drop' 'ct direction reply iifname "eth1" drop'; do
        native 'table inet strict {' 'set clients { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.0.2.9 } }' \
            'map ports { type inet_service : verdict; elements = { 80 : drop } }' 'chain closed { drop; }' \
            "chain forward { type filter hook forward priority 10; policy accept; $rule; }" '}'
        drops 'of (forward|closed) in inet strict' || { echo "the rule: $rule"; return 1; }
        native 'delete table inet strict'
    done
}

# Whom they are about is known only where a client is named.
test_nft_rules_that_drop_some_clients() {
    local rule
    nft_up
    for rule in 'ip saddr 192.0.2.0/24 drop' 'ip saddr @clients drop' 'ip saddr { 192.0.2.1-192.0.2.9, 10.0.0.0/8 } drop' \
        'ip saddr . tcp dport { 192.0.2.9 . 80 } drop'; do
        native 'table inet strict {' 'set clients { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 192.0.2.9 } }' \
            "chain forward { type filter hook forward priority 10; policy accept; $rule; }" '}'
        if [[ $rule == *' . '* ]]; then
            expect_forward_silent
            expect_equal "verdict beside $rule" unsure "$(verdict "${FROM_CLIENT[@]}")"
        else
            agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
            expect_not_found forward-dropped
            mended "${FROM_CLIENT[@]}"
            agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
        fi
        native 'delete table inet strict'
    done
}

test_nft_drops_ahead_of_iptables_are_deleted() {
    nft_up
    native 'table netdev early {' 'chain in { type filter hook ingress device "ppp0" priority 0; policy accept; tcp dport 80 drop; }' '}'
    expect_forward_silent
    # An nft that does not tell the device in JSON leaves it open.
    [[ $(verdict "${FROM_CLIENT[@]}") != answered ]] || fail "$(mh_hook explain "${FROM_CLIENT[@]}")"
    native 'delete table netdev early'
    native 'table ip early {' 'chain pre { type filter hook prerouting priority -500; iifname "ppp0" tcp dport 80 drop; }' '}'
    drops 'of pre in ip early'
}

test_nft_input_that_drops() {
    nft_up
    native 'table inet strict {' 'chain input { type filter hook input priority 0; policy drop; ct state established accept; iifname { "lo", "eth1" } accept; }' '}'
    agrees fails client tcp "$X" 8080 -- "${OWN_SERVICE[@]}"
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    mended "${OWN_SERVICE[@]}"
    all_agree
}

test_nft_rules_that_are_harmless() {
    nft_up
    native 'table inet firewalld {' \
        'chain pre { type filter hook prerouting priority -140; ct state established,related accept; fib daddr type local accept; }' \
        'chain nat { type nat hook prerouting priority -90; }' \
        'chain post { type nat hook postrouting priority 110; oifname "ppp1" masquerade; }' \
        'chain zone { tcp dport 22 accept; }' \
        'chain forward { type filter hook forward priority 10; policy accept; ct state { established, related } accept; ct status dnat accept; iifname "lo" accept; iifname "eth1" goto zone; ct state invalid drop; log prefix "x"; reject; }' '}'
    # Its last rule rejects the LAN's own connections: not by the forward.
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    agrees answered client tcp "$X" 8080 -- "${OWN_SERVICE[@]}"
    expect_all_well
    expect_not_found nftables
    native 'delete table inet firewalld'
    native 'table inet filter {' 'chain forward { type filter hook forward priority 0; policy accept; }' 'chain input { type filter hook input priority 0; policy accept; }' '}'
    all_agree
    expect_all_well
}

test_nft_rules_that_depend_on_more_than_the_packet() {
    local rule
    nft_up
    for rule in 'limit rate over 1000/second drop' 'meta skuid 0 drop' 'ip ttl 1 drop' 'tcp option maxseg size 1 drop'; do
        native 'table inet strict {' "chain forward { type filter hook forward priority 10; policy accept; $rule; }" '}'
        expect_answer "server 192.0.2.9" client tcp "$X" 80
        expect_equal "verdict beside $rule" unsure "$(verdict "${FROM_CLIENT[@]}")"
        explains "^but: it can't be told whether rule handle [0-9]+ of forward in inet strict" "${FROM_CLIENT[@]}"
        expect_all_well
        native 'delete table inet strict'
    done
}

test_nft_marks_that_touch_ours() {
    nft_up
    native 'table inet marks {' 'chain pre { type filter hook prerouting priority -140; iifname "eth1" meta mark set 0x5; }' '}'
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    expect_found mark-wiped error 'of pre in inet marks'
    cured mark-wiped
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    native 'delete table inet marks'
    # Other bits are nobody's business.
    native 'table inet marks {' 'chain pre { type filter hook prerouting priority -140; iifname "eth1" meta mark set meta mark | 0x10000 accept; }' '}'
    all_agree
    expect_all_well
}

test_nft_dnat_ahead_of_ours() {
    nft_up
    native 'table ip others {' 'chain pre { type nat hook prerouting priority -110; iifname "ppp0" tcp dport 80 dnat to 192.168.0.77; }' '}'
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    expect_found dnat-ahead error 'of pre in ip others'
}
