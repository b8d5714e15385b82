# shellcheck shell=bash
# explain: its verdict is what a real packet finds out, fault by fault; and check or status names the fault.

FROM_CLIENT=(192.0.2.9 tcp/80 --to isp0)
OWN_SERVICE=(192.0.2.9 tcp/8080 --to isp0)

explain_up() {
    [[ -d $LAB_DIR/etc ]] || lab_etc
    configure "accept-forward = ${1-false}"$'\nforward = [{ port = 80, to = "192.168.0.2" }]'
    mh_hook up ppp0
    mh_hook up ppp1
}

# verdict ARGUMENT…: answered, fails or unsure. What each looks like as JSON is asked once in a test.
verdict() {
    local found
    mh_hook explain --json "$@" >"$LAB_DIR/explain.json" || true
    found=$(sed -n 's/^  "verdict": "\(.*\)",$/\1/p' "$LAB_DIR/explain.json")
    if [[ ! -e $LAB_DIR/explained.$found ]]; then
        expect_schema explain "$LAB_DIR/explain.json" || return 1
        touch "$LAB_DIR/explained.$found"
    fi
    echo "$found"
}

# found ask's ARGUMENT…: what a real packet finds out.
found() { if ask "$@" >/dev/null; then echo answered; else echo fails; fi; }

# agrees VERDICT ask's ARGUMENT… -- explain's ARGUMENT…
agrees() {
    local expected=$1 patience=1 packet=()
    shift
    while [[ $1 != -- ]]; do packet+=("$1"); shift; done
    shift
    [[ $expected != answered ]] || patience=$LAB_WAIT
    expect_equal "what a packet finds: ${packet[*]}" "$expected" "$(LAB_PATIENCE=$patience found "${packet[@]}")"
    expect_equal "explain $*" "$expected" "$(verdict "$@")" || { mh_hook explain "$@"; return 1; }
}

# all_agree VERDICT [VERDICT [VERDICT [VERDICT]]]: of the forward, the own service, a LAN host's own connection and a
# LAN host that asks the forward; answered, where left out.
all_agree() {
    agrees "${1-answered}" client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    agrees "${2-answered}" client tcp "$X" 8080 -- "${OWN_SERVICE[@]}"
    agrees "${3-answered}" lanhost tcp 192.0.2.9 80 -- --from-lan 192.168.0.3 192.0.2.9 tcp/80
    agrees "${4-answered}" lanhost tcp "$X" 80 -- --from-lan 192.168.0.3 "$X" tcp/80
}

# names PATTERN: check or status names the fault, and does not call it well.
names() {
    local said status=0
    said=$(mh_hook -v check 2>&1; mh_hook -v status 2>&1) || status=$?
    if mh_hook check >/dev/null 2>&1 && mh_hook status >/dev/null 2>&1; then fail "neither check nor status sees: $1"; fi
    grep -qE -e "$1" <<<"$said" || fail "neither check nor status names $1:"$'\n'"$said"
}

# names_nothing: neither finds anything wrong.
names_nothing() {
    mh_hook status >"$LAB_DIR/said" 2>&1 || fail "status: $(cat "$LAB_DIR/said")"
    mh_hook check >"$LAB_DIR/said" 2>&1 || fail "check: $(cat "$LAB_DIR/said")"
    ! grep -E '^(error|warning)' "$LAB_DIR/said" || fail "check: $(cat "$LAB_DIR/said")"
}

# explains PATTERN explain's ARGUMENT…: a line of what it says.
explains() {
    local said
    said=$(mh_hook explain "${@:2}" || true)
    grep -qE -e "$1" <<<"$said" || fail "explain ${*:2} does not say $1:"$'\n'"$said"
}

# mended explain's ARGUMENT…: by the commands that explain prints.
mended() {
    local commands command
    commands=$({ mh_hook explain "$@" || true; } | sed -n 's/^fix: //p')
    [[ $commands ]] || fail "explain $* has nothing to mend it"
    while read -r command; do
        case $command in
            'mh-hook sync') mh_hook sync ;;
            *) on_router sh -c "$command" ;;
        esac
    done <<<"$commands"
}

## Nothing is wrong

test_explain_in_the_healthy_router_agrees_and_nothing_is_named() {
    explain_up
    all_agree
    names_nothing
    agrees fails client tcp "$X" 81 -- 192.0.2.9 tcp/81 --to isp0
    agrees answered client tcp 198.51.100.20 8080 -- 192.0.2.9 tcp/8080 --to 198.51.100.20
}

test_explain_changes_nothing() {
    local before
    explain_up
    before=$(lab_dump)
    mh_hook explain "${FROM_CLIENT[@]}" >"$LAB_DIR/said"
    mh_hook explain --from-lan 192.168.0.3 "$X" tcp/80 >>"$LAB_DIR/said"
    expect_equal "after explain" "$before" "$(lab_dump)"
    expect_equal "connections" 0 "$(on_router sysctl --values net.netfilter.nf_conntrack_count)"
}

test_explain_names_each_rule_with_its_number_and_counter() {
    local said
    explain_up
    expect_forward_answered
    grep -qE 'nat +destination translated, by rule 1 of mh-isp0 in nat$' <<<"$(mh_hook explain 192.0.2.9)"
    said=$(mh_hook -v explain 192.0.2.9)
    grep -qE 'rule 1 of mh-isp0 in nat \(iptables-(nft|legacy)\): -p tcp -m tcp --dport 80 -j DNAT --to-destination 192\.168\.0\.2 \(1 packets\)' <<<"$said"
    grep -qE 'rule +99: from all fwmark 0xa/0xff lookup 10' <<<"$said"
    grep -qE 'route +dev ppp0, table 10' <<<"$said"
    grep -qE 'out +by ppp0 as 203\.0\.113\.10' <<<"$said"
    grep -qE '^answered: 192\.168\.0\.2:80 gets it' <<<"$said"
}

test_explain_without_a_word_takes_the_first_forward_and_asks_which_where_both_have_it() {
    local status=0
    explain_up
    expect_equal "verdict" answered "$(verdict 192.0.2.9)"
    mh_hook explain 192.168.0.3 2>"$LAB_DIR/said" || status=$?
    expect_equal "status for a LAN host" 2 "$status"
    grep -q -- '--from-lan 192.168.0.3' "$LAB_DIR/said"
    configure "$FORWARD_80" "table = 11"$'\n'"$FORWARD_80"
    status=0
    mh_hook explain 192.0.2.9 2>"$LAB_DIR/said" || status=$?
    expect_equal "status with two" 2 "$status"
    grep -q -- '--to isp0 or --to isp1' "$LAB_DIR/said"
}

## Each entry of ours missing

# lost TABLE PATTERN VERDICT…: without that entry all agree; status names it as a command; sync mends it.
lost() {
    leave_out "$1" "$2"
    all_agree "${@:3}"
    names "iptables .*${2//--/.*}"
    mh_hook sync
    all_agree
}

lost_rule() {
    leave_out_rule "$1"
    all_agree "${@:2}"
    names "ip rule add priority ${1%%:*}"
    mh_hook sync
    all_agree
}

test_explain_without_a_mark() {
    explain_up
    lost mangle 'CONNMARK --set-xmark' fails answered
    lost mangle 'PREROUTING -i ppp0 -j mh-isp0' fails answered
    lost mangle 'CONNMARK --restore-mark' fails answered
}

test_explain_without_nat() {
    explain_up
    lost nat 'dport 80 -j DNAT' fails answered answered fails
    lost nat 'PREROUTING -i ppp0 .*-j mh-isp0' fails
    lost nat "PREROUTING -d $X/32 -i eth1 -j mh-isp0" answered answered answered fails
    lost nat "ctorigdst $X" answered answered answered fails
    lost nat '-o ppp1 .*MASQUERADE' answered answered fails
}

test_explain_without_a_chain() {
    explain_up
    on_router /usr/sbin/iptables -t nat -F mh-isp0
    all_agree fails answered answered fails
    names 'iptables -t nat -A mh-isp0'
    mh_hook sync
    on_router /usr/sbin/iptables -t mangle -F
    all_agree fails
    names 'iptables -t mangle -A mh-isp0'
    mh_hook sync
    all_agree
}

test_explain_without_a_rule_or_route() {
    explain_up
    lost_rule '98: from all fwmark' fails
    lost_rule "98: from $X" answered
    lost_rule '99: ' fails
    # The mark, which OUTPUT restores, sends the router's own replies by the link, too.
    lost_rule '100: '
    on_router ip route del default dev ppp0 table 10
    # The closing route is behind it.
    all_agree fails fails
    names 'ip route (add|replace) default dev ppp0 table 10'
    mended "${FROM_CLIENT[@]}"
    all_agree
    on_router ip route del unreachable default table 10 metric 4278198272
    all_agree
    names 'ip route add unreachable default'
    mh_hook sync
    names_nothing
}

test_explain_without_accept_forward() {
    on_router /usr/sbin/iptables -P FORWARD DROP
    on_router /usr/sbin/iptables -A FORWARD -i eth1 -j ACCEPT
    on_router /usr/sbin/iptables -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
    explain_up true
    all_agree
    leave_out filter 'FORWARD -i ppp0 .*ctstate DNAT'
    all_agree fails
    names 'iptables -t filter -I FORWARD -i ppp0'
    mh_hook sync
    all_agree
}

## The kernel's settings

test_explain_with_reverse_path_filtering() {
    explain_up
    lab_sysctl router net.ipv4.conf.ppp0.rp_filter=1
    all_agree
    lab_sysctl router net.ipv4.conf.ppp0.src_valid_mark=0
    all_agree fails
    explains "^fails: strict rp_filter on ppp0 drops the packet from 192.0.2.9" "${FROM_CLIENT[@]}"
    names 'src_valid_mark'
    mended "${FROM_CLIENT[@]}"
    all_agree
    on_router /usr/sbin/iptables -t mangle -A PREROUTING -i ppp0 -j MARK --set-mark 0x100
    all_agree fails
    names 'MARK'
    mended "${FROM_CLIENT[@]}"
    all_agree
    # Strict on the LAN's side, which counts marks, too.
    lab_sysctl router net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.all.src_valid_mark=1
    all_agree
    lab_sysctl router net.ipv4.conf.{all,ppp0}.rp_filter=2
    all_agree
    ip -n router route del default dev ppp1
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    lab_sysctl router net.ipv4.conf.{all,ppp0}.src_valid_mark=0
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    explains "^fails: loose rp_filter on ppp0 drops the packet from 192.0.2.9" "${FROM_CLIENT[@]}"
    mended "${FROM_CLIENT[@]}"
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
}

test_explain_without_forwarding() {
    explain_up
    lab_sysctl router net.ipv4.ip_forward=0
    all_agree fails answered fails fails
    names 'ip_forward'
    lab_sysctl router net.ipv4.ip_forward=1
    all_agree
    lab_sysctl router net.ipv4.conf.eth1.forwarding=0
    all_agree fails answered fails fails
    names 'eth1.*forwarding'
    mended "${FROM_CLIENT[@]}"
    all_agree
}

## Other people's filters

test_explain_with_filters_of_others() {
    explain_up
    on_router /usr/sbin/iptables -P FORWARD DROP
    all_agree fails answered fails fails
    names 'FORWARD'
    on_router /usr/sbin/iptables -P FORWARD ACCEPT
    on_router /usr/sbin/iptables -A FORWARD -i ppp0 -o eth1 -m conntrack --ctstate NEW -j REJECT
    all_agree fails
    names 'FORWARD'
    on_router /usr/sbin/iptables -F FORWARD
    # Whether some clients are to be kept out nobody but the administrator knows.
    on_router /usr/sbin/iptables -A FORWARD -s 192.0.2.0/24 -o eth1 -m conntrack --ctstate NEW -j REJECT
    all_agree fails
    on_router /usr/sbin/iptables -F FORWARD
    on_router /usr/sbin/iptables -A INPUT -i ppp0 -p tcp --dport 8080 -j DROP
    agrees fails client tcp "$X" 8080 -- "${OWN_SERVICE[@]}"
    on_router /usr/sbin/iptables -F INPUT
    on_router /usr/sbin/iptables -t raw -A PREROUTING -i ppp0 -p tcp -m multiport --dports 22,80,443 -j DROP
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    mended "${FROM_CLIENT[@]}"
    on_router /usr/sbin/iptables -t mangle -A FORWARD -i eth1 -o ppp0 -m conntrack --ctstate ESTABLISHED -j DROP
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    mended "${FROM_CLIENT[@]}"
    all_agree
}

test_explain_with_chains_of_others() {
    explain_up
    on_router /usr/sbin/iptables-restore --noflush <<'EOR'
*filter
:jail - [0:0]
:web - [0:0]
-A FORWARD -i ppp+ -g web
-A FORWARD -i ppp+ -j DROP
-A web -p tcp -m tcp --syn --dport 80 -m addrtype ! --dst-type LOCAL -j RETURN
-A web -s 192.0.2.9 -j jail
-A web -j ACCEPT
-A jail -p udp -j RETURN
-A jail ! -d 192.168.0.0/24 -j RETURN
-A jail -j DROP
COMMIT
EOR
    # RETURN from a chain that was gone to ends in the policy; what follows the first packet is dropped.
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    explains "^fails: the connection's next packet is stopped by rule 3 of jail" "${FROM_CLIENT[@]}"
    on_router /usr/sbin/iptables -D web -s 192.0.2.9 -j jail
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    on_router /usr/sbin/iptables -D web -j ACCEPT
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    on_router /usr/sbin/iptables -D web -p tcp -m tcp --syn --dport 80 -m addrtype ! --dst-type LOCAL -j RETURN
    on_router /usr/sbin/iptables -R FORWARD 1 -i ppp+ -j web
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
}

test_explain_is_unsure_where_a_rule_depends_on_more_than_the_packet() {
    explain_up
    on_router /usr/sbin/iptables -A FORWARD -i ppp0 -m statistic --mode nth --every 2 --packet 0 -j DROP
    expect_equal "verdict" unsure "$(verdict "${FROM_CLIENT[@]}")"
    explains "^but: it can't be told whether rule 1 of FORWARD in filter" "${FROM_CLIENT[@]}"
    on_router /usr/sbin/iptables -F FORWARD
    # One that makes no difference, whether it matches or not.
    on_router /usr/sbin/iptables -A FORWARD -i ppp0 -m limit --limit 1/s -j LOG
    on_router /usr/sbin/iptables -A FORWARD -i ppp0 -m limit --limit 1/s -j ACCEPT
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
}

## Other people's routing

test_explain_with_rules_and_routes_of_others() {
    explain_up
    on_router ip rule add iif eth1 lookup main priority 50
    all_agree fails
    names 'ip rule del .*priority 50'
    mended "${FROM_CLIENT[@]}"
    all_agree
    # The wrong table.
    on_router ip route add default dev ppp1 table 20
    leave_out_rule '99: '
    on_router ip rule add iif eth1 fwmark 0xa/0xff lookup 20 priority 99
    all_agree fails
    names 'ip rule add priority 99'
    mh_hook sync
    on_router ip rule del iif eth1 fwmark 0xa/0xff lookup 20 priority 99 || true
    all_agree
    # Another's default route in ours.
    on_router ip route del default dev ppp0 table 10
    on_router ip route add default dev ppp1 table 10
    all_agree fails fails
    names 'default dev ppp1'
    mended "${FROM_CLIENT[@]}"
    mh_hook sync
    all_agree
    on_router ip route add blackhole 192.168.0.2
    all_agree fails answered answered fails
    names '192\.168\.0\.2'
    on_router ip route del blackhole 192.168.0.2
    all_agree
}

## Other people's marks

test_explain_with_marks_of_others() {
    explain_up
    on_router /usr/sbin/iptables -t mangle -A PREROUTING -i eth1 -j MARK --set-mark 0x1
    all_agree fails
    names 'MARK'
    mended "${FROM_CLIENT[@]}"
    all_agree
    # Requests carry our mark, so saving it changes nothing.
    on_router /usr/sbin/iptables -t mangle -A POSTROUTING -o eth1 -j CONNMARK --save-mark
    all_agree
    names_nothing
    on_router /usr/sbin/iptables -t mangle -A FORWARD -i ppp0 -j MARK --set-mark 0x1
    all_agree fails
    names 'MARK'
    mended "${FROM_CLIENT[@]}"
    all_agree
    on_router /usr/sbin/iptables -t mangle -F POSTROUTING
    on_router /usr/sbin/iptables -t mangle -A POSTROUTING -o eth1 -j CONNMARK --set-mark 0x7
    all_agree fails
    names 'CONNMARK'
    mended "${FROM_CLIENT[@]}"
    all_agree
    on_router /usr/sbin/iptables -t mangle -A PREROUTING -i ppp0 -j CONNMARK --set-mark 0x100
    all_agree fails
    names 'CONNMARK'
    mended "${FROM_CLIENT[@]}"
    all_agree
    # Other bits than ours.
    on_router /usr/sbin/iptables -t mangle -A PREROUTING -j MARK --set-xmark 0x40000/0xff0000
    on_router /usr/sbin/iptables -t mangle -A POSTROUTING -j CONNMARK --save-mark --nfmask 0xff0000 --ctmask 0xff0000
    all_agree
    names_nothing
}

test_explain_with_translations_of_others() {
    explain_up
    on_router /usr/sbin/iptables -t nat -I PREROUTING -i ppp0 -p tcp --dport 80 -j DNAT --to-destination 192.168.0.9
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    on_router /usr/sbin/iptables -t nat -D PREROUTING -i ppp0 -p tcp --dport 80 -j DNAT --to-destination 192.168.0.9
    # Their masquerade of everything does no harm: the server answers the router.
    on_router /usr/sbin/iptables -t nat -A POSTROUTING -o eth1 -j MASQUERADE
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    on_router /usr/sbin/iptables -t nat -F POSTROUTING
    mh_hook sync
    on_router /usr/sbin/iptables -t nat -I PREROUTING -i ppp0 -p tcp --dport 80 -j REDIRECT --to-ports 8080
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    on_router /usr/sbin/iptables -t nat -D PREROUTING 1
    on_router /usr/sbin/iptables -t raw -A PREROUTING -i ppp0 -p tcp --dport 80 -j NOTRACK
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
}

## The server

test_explain_with_a_server_that_is_off() {
    explain_up
    ip -n server link set eth0 down
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}" || { on_router ip neigh; return 1; }
    explains '^fails: 192.168.0.2 did not answer ARP on eth1' "${FROM_CLIENT[@]}"
}

test_explain_with_a_server_whose_default_gateway_is_elsewhere() {
    explain_up
    ip -n server route replace default via 192.168.0.3
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    explains '^fails: .*its default gateway is another' "${FROM_CLIENT[@]}"
    ip -n server route replace default via 192.168.0.1
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
}

test_explain_with_an_open_connection_from_before_the_gateway_changed() {
    explain_up
    # One that stays open, and its server's answers.
    in_ns client socat -u EXEC:'sleep 600' "TCP4:$X:80" &
    lab_wait tracks "$X" 80 ESTABLISHED
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    ip -n server route replace default via 192.168.0.3
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    explains '^fails: .*though it answers this router: its default gateway is another' "${FROM_CLIENT[@]}"
}

tracks() { on_router conntrack -L -p tcp -d "$1" --dport "$2" 2>/dev/null | grep "$3"; }

test_explain_with_a_server_that_refuses() {
    configure 'forward = [{ port = 81, to = "192.168.0.2" }]'
    mh_hook up ppp0
    mh_hook up ppp1
    agrees fails client tcp "$X" 81 -- 192.0.2.9 tcp/81 --to isp0
    explains '^fails: 192.168.0.2:81 refuses connections: nothing listens there' 192.0.2.9 tcp/81 --to isp0
    agrees fails lanhost tcp "$X" 81 -- --from-lan 192.168.0.3 "$X" tcp/81
    lab_listen server tcp 81
    agrees answered client tcp "$X" 81 -- 192.0.2.9 tcp/81 --to isp0
    # Nobody's but the client's are tracked.
    expect_equal "connections of the router's own" "" "$(on_router conntrack -L -s 192.168.0.1 2>/dev/null)"
}

test_explain_with_a_server_whose_own_firewall_drops() {
    explain_up
    in_ns server /usr/sbin/iptables -A INPUT -p tcp --dport 80 ! -s 192.168.0.0/24 -j DROP
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    explains '^fails: .*its own firewall drops what comes from outside' "${FROM_CLIENT[@]}"
    in_ns server /usr/sbin/iptables -F INPUT
    in_ns server /usr/sbin/iptables -A INPUT -p tcp --dport 80 -j DROP
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    # Nobody has asked: then only a request of the router's own tells.
    on_router conntrack -F 2>/dev/null
    expect_equal "verdict" unsure "$(verdict "${FROM_CLIENT[@]}")"
    explains '^but: 192.168.0.2:80 leaves a connection of this router.s unanswered' "${FROM_CLIENT[@]}"
    in_ns server /usr/sbin/iptables -F INPUT
    in_ns server /usr/sbin/iptables -A INPUT -p tcp --dport 80 -j REJECT --reject-with tcp-reset
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    in_ns server /usr/sbin/iptables -F INPUT
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
}

test_explain_asks_a_server_that_the_routers_own_firewall_lets_nobody_ask() {
    explain_up
    on_router /usr/sbin/iptables -A OUTPUT -o eth1 -p tcp --dport 80 -j DROP
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
}

## The link

test_explain_with_the_same_address_on_both_links() {
    explain_up
    lab_link_down ppp1
    lab_link_up ppp1 "$X"
    mh_hook sync
    agrees answered client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    agrees answered client tcp "$X" 8080 -- "${OWN_SERVICE[@]}"
    agrees fails lanhost tcp 192.0.2.9 80 -- --from-lan 192.168.0.3 192.0.2.9 tcp/80
    explains "^fails: it leaves by ppp1 with the source $X, which is an address of ppp0, too" \
        --from-lan 192.168.0.3 192.0.2.9 tcp/80
}

test_explain_with_a_link_that_is_down() {
    explain_up
    on_router ip address flush dev ppp0
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    names 'isp0'
    on_router ip link set ppp0 down
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    explains '^fails: isp0 has no link: ppp0 is down' "${FROM_CLIENT[@]}"
    lab_link_delete ppp0
    agrees fails client tcp "$X" 80 -- "${FROM_CLIENT[@]}"
    explains '^fails: isp0 has no link: ppp0 does not exist' "${FROM_CLIENT[@]}"
    explains "^fails: no link of this router has the address $X" 192.0.2.9 tcp/80 --to "$X"
}

test_explain_with_a_new_address_that_the_entries_do_not_know() {
    explain_up
    lab_link_down ppp0
    lab_link_up ppp0 203.0.113.99
    # The route went with the link.
    X=203.0.113.99 all_agree fails fails answered fails
    names 'from 203\.0\.113\.99'
    mended "${FROM_CLIENT[@]}"
    X=203.0.113.99 all_agree
}
