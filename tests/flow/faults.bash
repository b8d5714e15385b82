# shellcheck shell=bash
# Faults that are put in one at a time: the first line of check names the cause, its commands, pasted, cure it, and explain's
# verdict is what a packet finds out: for the forward, the router's own service, and a LAN host's own connection.

# fault FIRST-LINE VERDICT VERDICT VERDICT COMMAND: put in by the shell's COMMAND on the router.
fault() {
    local first
    on_router sh -e -c "$5"
    agrees "$2" client tcp "$X" 80 -- "${FROM_CLIENT[@]}" || { echo "beside: $5"; return 1; }
    agrees "$3" client tcp "$X" 8080 -- "${OWN_SERVICE[@]}" || { echo "beside: $5"; return 1; }
    agrees "$4" lanhost tcp 192.0.2.9 80 -- --from-lan 192.168.0.3 192.0.2.9 tcp/80 || { echo "beside: $5"; return 1; }
    mh_hook check >"$LAB_DIR/check" || true
    first=$(head -n 1 "$LAB_DIR/check")
    [[ $first =~ $1 ]] || fail "expected '$1' first, beside $5: $(cat "$LAB_DIR/check")"
}

# cured: by what the first finding names; a line of the configuration is written there.
cured_by_the_first() {
    local line
    mh_hook --json check >"$LAB_DIR/check.json" || true
    /usr/bin/python3 -c '
import json, sys
print(*json.load(open(sys.argv[1]))["findings"][0]["fix"], sep="\n")' "$LAB_DIR/check.json" >"$LAB_DIR/fixes"
    while read -r line; do
        case $line in
            '[uplink.isp0] accept-forward = true') sed -i 's/^accept-forward = false/accept-forward = true/' "$LAB_CONFIG" ;;
            'mh-hook '*)
                # shellcheck disable=SC2086 # words of a command
                mh_hook ${line#mh-hook } </dev/null
                ;;
            *) on_router sh -e -c "$line" </dev/null ;;
        esac
    done <"$LAB_DIR/fixes"
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    agrees answered client tcp "$X" 8080 -- "${OWN_SERVICE[@]}"
    agrees answered lanhost tcp 192.0.2.9 80 -- --from-lan 192.168.0.3 192.0.2.9 tcp/80
    expect_all_well
}

# faults: each line of the standard input, as the first line's pattern, three verdicts and a command.
faults() {
    local first verdicts command
    explain_up
    all_agree
    while IFS='|' read -r first verdicts command; do
        # shellcheck disable=SC2086 # three words
        fault "$first" $verdicts "$command"
        cured_by_the_first
    done
}

test_faults_of_our_own_entries() {
    faults <<'EOF'
isp0: 1 of 20 entries missing: mh-hook sync|fails fails answered|ip route del default dev ppp0 table 10
isp0: 1 of 20 entries missing|fails answered answered|ip rule del priority 99
isp0: 1 of 20 entries missing|answered answered answered|ip rule del priority 100
isp0: 1 of 20 entries missing|fails answered answered|iptables -t nat -D PREROUTING -i ppp0 -m addrtype --dst-type LOCAL -j mh-isp0
isp0: 1 of 20 entries missing|fails answered answered|iptables -t nat -F mh-isp0
isp0: 1 of 20 entries missing|fails answered answered|iptables -t mangle -D PREROUTING -i ppp0 -j mh-isp0
isp0: 2 of 20 entries missing|fails answered answered|iptables -t mangle -F mh-isp0
isp0: 1 of 20 entries missing|fails answered answered|sysctl -qw net.ipv4.conf.ppp0.rp_filter=1 net.ipv4.conf.ppp0.src_valid_mark=0
EOF
}

test_faults_of_others_rules_and_routes() {
    faults <<'EOF'
are dropped: tcp/80 by "-t filter -A FORWARD -i ppp0 -j DROP"|fails answered answered|iptables -A FORWARD -i ppp0 -j DROP
error: .*replies of 192.168.0.2 .* do not leave by ppp0.*50: from 192.168.0.2|fails answered answered|ip rule add priority 50 from 192.168.0.2 lookup 50; ip route add default dev ppp1 table 50
a foreign default route in the uplink's table 10|fails fails answered|ip route del default dev ppp0 table 10; ip route add default dev ppp1 table 10
changes bits of our mask|fails answered answered|iptables -t mangle -A PREROUTING -i eth1 -j MARK --set-mark 0x5
keeps tcp/80 of 203.0.113.10 from our forwards|fails answered answered|iptables -t nat -I PREROUTING -i ppp0 -p tcp --dport 80 -j DNAT --to-destination 192.168.0.99
keeps tcp/80 of 203.0.113.10 from our forwards|fails answered answered|iptables -t raw -A PREROUTING -i ppp0 -p tcp --dport 80 -j NOTRACK
are dropped: tcp/80 by rule handle [0-9]+ of forward in inet strict|fails answered answered|nft 'table inet strict { chain forward { type filter hook forward priority 0; iifname "ppp0" drop; }; }'
EOF
}

test_faults_of_the_kernel_and_the_lan() {
    faults <<'EOF'
forwards nothing|fails answered fails|sysctl -qw net.ipv4.ip_forward=0
the LAN's interface eth1 is down|fails answered fails|ip link set eth1 down
EOF
}

# What no command on the router cures.
test_faults_beyond_the_router() {
    explain_up
    all_agree
    ip -n server link set eth0 down
    on_router ip neigh flush dev eth1
    fault 'target 192.168.0.2: off, or elsewhere: nobody on eth1 answers ARP' fails answered answered true
    ip -n server link set eth0 up
    ip -n server route replace default via 192.168.0.1
    on_router ip neigh flush dev eth1
    all_agree
    on_router ip link set ppp0 down
    fault 'the uplink.s link ppp0 is down' fails fails answered true
    [[ $(sed -n 2p "$LAB_DIR/check") == "    pon isp0" ]] || fail "the cure: $(cat "$LAB_DIR/check")"
}
