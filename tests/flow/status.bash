# shellcheck shell=bash
# `mh-hook status`: what stands against what should, what the forwards have seen; and that looking changes nothing.

STATUS=/run/lab/status

# status 0|1 [ARGUMENT…]: text with all details in $STATUS, and without in $STATUS.brief, JSON in $STATUS.json, whose form must
# be that of the schema. It changes nothing.
status() {
    local expected=$1 before form code
    local -A files=([-v]=$STATUS [-q]=$STATUS.brief [--json]=$STATUS.json)
    shift
    before=$(lab_dump)
    for form in "${!files[@]}"; do
        code=0
        mh_hook "$form" status "$@" >"${files[$form]}" || code=$?
        ((code == expected)) || fail "exit status $code: status $* $form: $(cat "${files[$form]}")"
    done
    expect_schema status "$STATUS.json"
    expect_equal "after status" "$before" "$(lab_dump)"
}

# row PATTERN: the line of the text that matches, its columns a space apart.
row() { grep -E -- "$1" "$STATUS.brief" | tr -s ' '; }

# isp0_field KEY…: of the first uplink.
isp0_field() { field "$STATUS.json" uplinks 0 "$@"; }

# isp0_fields KEY…: several, a space apart.
isp0_fields() {
    local key
    for key; do isp0_field "$key"; done | paste -sd ' '
}

# forward_fields INDEX KEY…: the same of a forward of isp0.
forward_fields() {
    local key
    for key in "${@:2}"; do isp0_field forwards "$1" "$key"; done | paste -sd ' '
}

# expect_in_step [UPLINK]: as the text, the JSON and the exit status say.
expect_in_step() {
    status 0 "$@"
    expect_equal "in step" true "$(field "$STATUS.json" in_step)"
    expect_equal "what is not, in the text" "" "$(grep -E 'drifted|^#|^ip |^iptables |^echo |mh-hook' "$STATUS" || true)"
}

# expect_drift EXTRA MISSING: the commands for isp0, line by line; pasted, they bring it in step again.
expect_drift() {
    status 1
    expect_equal "extra" "$1" "$(isp0_field surplus)"
    expect_equal "missing" "$2" "$(isp0_field missing)"
    expect_equal "in step" false "$(isp0_field in_step)"
    expect_equal "the other in step" true "$(field "$STATUS.json" uplinks 1 in_step)"
    expect_equal "commands in the text" "$(printf '%s\n' "$1" "$2" | grep .)" \
        "$(grep -E '^(ip|iptables|echo) ' "$STATUS")"
    [[ $(row ' isp0 +ppp0') == "drifted "* ]] || fail "the state in the text: $(row isp0)"
    expect_drift_line "$(grep -c . <<<"$2")" "$(grep -c . <<<"$1")"
    paste_commands
    expect_in_step
}

# expect_drift_line MISSING EXTRA: in the text, with the numbers that check has, too.
expect_drift_line() {
    local line
    line=$(row '^isp0: ')
    case $1,$2 in
        0,1) [[ $line == "isp0: 1 entry extra: mh-hook sync" ]] ;;
        0,*) [[ $line == "isp0: $2 entries extra: mh-hook sync" ]] ;;
        *,0) [[ $line == "isp0: $1 of "*" entries missing: mh-hook sync" ]] ;;
        *) [[ $line == "isp0: $1 of "*" entries missing, $2 extra: mh-hook sync" ]] ;;
    esac || fail "expected $1 missing and $2 extra: $line"
    [[ $(tail -n 1 "$STATUS.brief") == "see what is wrong: mh-hook check" ]] || fail "the last line: $(cat "$STATUS.brief")"
    mh_hook check >"$LAB_DIR/check" || true
    grep -qF ": $line" "$LAB_DIR/check" || fail "check does not count so: $line"$'\n'"$(cat "$LAB_DIR/check")"
}

# From the first heading to the end, as a person would.
paste_commands() { sed -n '/^#/,$p' "$STATUS" | on_router sh -e; }

up_both() {
    mh_hook -q up ppp0
    mh_hook -q up ppp1
}

# seconds_out: ages as a letter, and columns a space apart.
seconds_out() { sed -E 's/ [0-9]+ s / S /; s/  +/ /g'; }

test_status_tells_each_uplink_and_its_forwards() {
    local title column
    up_both
    expect_in_step
    expect_equal "the text" "state uplink link address up for table mark connections
up isp0 ppp0 $X S 10 0xa/0xff 0
 tcp/80 to 192.168.0.2 0 served 0 open
 tcp/2222 to 192.168.0.2:22 0 served 0 open from 192.0.2.77/32
 udp/27015-27030 to 192.168.0.2 0 served 0 open
up isp1 ppp1 198.51.100.20 S - - -" "$(seconds_out <"$STATUS.brief")"
    expect_equal "with all details" "$(seconds_out <"$STATUS.brief")" "$(seconds_out <"$STATUS")"
    # Each column begins where its title does.
    for title in uplink link address table mark connections; do
        column=$(head -n 1 "$STATUS" | grep -bow "$title" | cut -d : -f 1)
        grep -qE "^.{$((column - 2))}  [^ ]" <(sed -n 2p "$STATUS") || fail "$title: $(cat "$STATUS")"
    done
    expect_equal "lines of more than 80 columns" "" "$(grep -E '^.{81}' "$STATUS.brief" || true)"
    expect_equal "in JSON" "isp0 ppp0 up $X 10 10 0" \
        "$(isp0_fields name interface link address table mark marked)"
    expect_equal "a forward in JSON" "tcp/2222 192.0.2.77/32 192.168.0.2:22 0 0 null" \
        "$(forward_fields 1 service from to connections open open_bytes)"
}

test_status_tells_for_how_long_the_link_has_had_its_address() {
    local first second told dialled
    up_both
    sleep 2
    status 0
    first=$(isp0_field up_seconds)
    # The link is younger than this shell.
    ((first >= 2 && first <= SECONDS + 1)) || fail "up for $first s"
    sleep 1.1
    status 0
    second=$(isp0_field up_seconds)
    ((second > first)) || fail "up for $second s after $first s"
    # The text has been written between the two.
    told=$(row ' isp0 +ppp0' | sed -nE 's/.* ([0-9]+) s .*/\1/p')
    ((told >= first && told <= second)) || fail "in the text: $(row isp0)"
    # Dialled again with the same address.
    lab_link_down ppp0
    dialled=$SECONDS
    lab_link_up ppp0 "$X"
    mh_hook -q up ppp0
    status 0
    (($(isp0_field up_seconds) <= SECONDS - dialled + 1)) || fail "up for $(isp0_field up_seconds) s after a redial"
    (($(field "$STATUS.json" uplinks 1 up_seconds) >= second)) || fail "the other link: $(cat "$STATUS.json")"
}

test_status_names_what_is_missing_and_the_commands_mend_it() {
    up_both
    on_router ip rule del priority 100
    on_router ip route del default dev ppp0 table 10
    leave_out mangle 'PREROUTING ! -i ppp0 .*CONNMARK --restore-mark'
    expect_forward_silent
    expect_drift '' "ip route add default dev ppp0 table 10 proto 109
ip rule add priority 100 from $X lookup 10 proto 109
iptables -t mangle -A PREROUTING '!' -i ppp0 -m connmark --mark 0xa/0xff -m comment --comment mh-isp0 \
-j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff"
    expect_forward_answered
}

test_status_puts_a_missing_forward_where_it_belongs() {
    up_both
    leave_out nat 'dport 80 '
    expect_forward_silent
    expect_drift '' 'iptables -t nat -I mh-isp0 1 -p tcp -m tcp --dport 80 -j DNAT --to-destination 192.168.0.2'
    expect_forward_answered
    # The same entries in another order are not the same.
    leave_out nat 'dport 80 '
    on_router /usr/sbin/iptables -t nat -A mh-isp0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 192.168.0.2
    status 1
    paste_commands
    expect_in_step
}

test_status_names_what_is_extra_and_the_commands_mend_it() {
    up_both
    on_router ip rule add priority 200 from 192.0.2.50 lookup 10 protocol 109
    on_router /usr/sbin/iptables -t nat -A mh-isp0 -p tcp -m tcp --dport 81 -j DNAT --to-destination 192.168.0.2
    on_router /usr/sbin/iptables -t mangle -A FORWARD -i ppp0 -p tcp -m tcp --tcp-flags SYN,RST SYN \
        -m comment --comment mh-isp0 -j TCPMSS --set-mss 1400
    expect_drift 'iptables -t mangle -D FORWARD -i ppp0 -p tcp -m tcp --tcp-flags SYN,RST SYN -m comment --comment mh-isp0 -j TCPMSS --set-mss 1400
iptables -t nat -D mh-isp0 -p tcp -m tcp --dport 81 -j DNAT --to-destination 192.168.0.2
ip rule del priority 200 from 192.0.2.50 lookup 10 proto 109' ''
}

test_status_of_a_new_address_is_drifted_until_the_commands_are_pasted() {
    up_both
    lab_link_down ppp0
    lab_link_up ppp0 203.0.113.99
    status 1
    expect_equal "address" 203.0.113.99 "$(isp0_field address)"
    expect_equal "extra rules" 2 "$(isp0_field surplus | grep -c "^ip rule del .* from $X ")"
    expect_equal "missing rules" 2 "$(isp0_field missing | grep -c '^ip rule add .* from 203.0.113.99 ')"
    expect_equal "orphans" "" "$(field "$STATUS.json" orphans)"
    expect_forward_silent 203.0.113.99
    paste_commands
    expect_in_step
    expect_forward_answered 203.0.113.99
}

test_status_before_the_first_up_misses_all_and_the_commands_make_it() {
    status 1
    expect_equal "extra" "" "$(isp0_field surplus)"
    expect_equal "what the forward was given" null "$(forward_fields 0 connections)"
    expect_forward_silent
    paste_commands
    expect_in_step
    expect_forward_answered
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    mh_hook up ppp0 2>"$LAB_DIR/log"
    [[ $(cat "$LAB_DIR/log") == *": 0 added, 0 removed"* ]] || fail "after the commands: $(cat "$LAB_DIR/log")"
}

test_status_of_src_valid_mark() {
    up_both
    expect_in_step
    lab_sysctl router net.ipv4.conf.ppp0.src_valid_mark=0
    expect_drift '' 'echo 1 > /proc/sys/net/ipv4/conf/ppp0/src_valid_mark'
}

test_status_of_a_link_that_is_down() {
    local before
    before=$(lab_dump)
    up_both
    lab_link_down ppp0
    status 1
    expect_equal "missing" "" "$(isp0_field missing)"
    expect_equal "the link and its address" "down null null" "$(isp0_fields link address up_seconds)"
    expect_equal "open connections" null "$(isp0_field forwards 0 open)"
    [[ $(row ' isp0 +ppp0') == "drifted "* ]] || fail "in the text: $(row isp0)"
    paste_commands
    expect_in_step
    [[ $(row ' isp0 +ppp0') == "down "* ]] || fail "in the text: $(row isp0)"
    expect_equal "what the forward was given" null "$(isp0_field forwards 0 connections)"
    lab_link_delete ppp0
    expect_in_step
    expect_equal "the link" missing "$(isp0_field link)"
    lab_link_up ppp0 "$X"
    mh_hook -q down ppp1
    expect_equal "after all" "$before" "$(lab_dump)"
    on_router ip address flush dev ppp0
    status 1
    expect_equal "the link" no-address "$(isp0_field link)"
}

test_status_of_an_uplink_that_is_known_by_ipparam() {
    configure "$FORWARD_80"
    sed -i 's/^interface = "ppp0"/ipparam = "line0"/' "$LAB_CONFIG"
    mh_hook -q up ppp1
    # A link of pppd's is up, and nothing tells that it is another's.
    status 1
    expect_equal "before any call" "unknown null" "$(isp0_fields link interface)"
    mh_hook -q event up ppp0 /dev/null 0 "$X" 203.0.113.1 line0
    expect_in_step
    expect_equal "after it" "up ppp0 $X" "$(isp0_fields link interface address)"
}

test_status_tells_orphans_apart() {
    up_both
    expect_in_step
    sed -i 's/^\[uplink\.isp0\]/[uplink.other]/; s/^table = 10/table = 11/' "$LAB_CONFIG"
    status 1
    expect_equal "the new one's extra entries" "" "$(field "$STATUS.json" uplinks 1 surplus)"
    field "$STATUS.json" orphans >"$LAB_DIR/orphans"
    expect_equal "in the text" "$(cat "$LAB_DIR/orphans")" "$(sed '1,/^# of no/d' "$STATUS" | grep -v '^#')"
    expect_equal "its chains" 2 "$(grep -c ' -X mh-isp0$' "$LAB_DIR/orphans")"
    # By its mark and its table; the fourth rule, from the address to the LAN, is the new one's, too.
    expect_equal "its rules" 3 "$(grep -c '^ip rule del ' "$LAB_DIR/orphans")"
    expect_equal "its routes" 2 "$(grep -c '^ip route del ' "$LAB_DIR/orphans")"
    status 0 isp1
    expect_equal "orphans, where one uplink is asked for" null "$(field "$STATUS.json" orphans)"
    status 1
    on_router sh -e "$LAB_DIR/orphans"
    expect_equal "entries of the old name" "" "$(lab_dump | grep mh-isp0 || true)"
    status 1
    expect_equal "orphans" "" "$(field "$STATUS.json" orphans)"
    paste_commands
    expect_in_step
    expect_forward_answered
}

test_status_leaves_to_a_renamed_uplink_what_it_wants_itself() {
    up_both
    sed -i 's/^\[uplink\.isp0\]/[uplink.other]/' "$LAB_CONFIG"
    status 1
    expect_equal "routes and rules" "" "$(grep -E '^ip |^echo ' "$STATUS" || true)"
    paste_commands
    expect_in_step
    expect_forward_answered
}

test_status_of_one_uplink() {
    local output code=0
    up_both
    on_router ip rule del priority 100
    expect_in_step isp1
    expect_equal "uplinks" isp1 "$(field "$STATUS.json" uplinks 0 name)"
    expect_equal "isp0 in the text" "" "$(row isp0 || true)"
    status 1 isp0
    expect_equal "isp1 in the text" "" "$(row isp1 || true)"
    output=$(mh_hook status isp2 2>&1) || code=$?
    expect_equal "an unknown one" "2 there is no [uplink.isp2]" "$code ${output##*: }"
}

test_status_counts_what_a_forward_has_seen() {
    local _
    up_both
    for _ in 1 2 3; do expect_forward_answered; done
    expect_answer "server 192.0.2.9" client udp "$X" 27015
    expect_answer "server 192.0.2.9" client udp "$X" 27030
    expect_answer "server 192.0.2.77" client tcp "$X" 2222 --source 192.0.2.77
    expect_silence client tcp "$X" 2222 --source 192.0.2.9
    # By the uplink's address from the LAN, too.
    expect_answer "server 192.168.0.1" lanhost tcp "$X" 80
    status 0
    expect_equal "connections" "4 1 2" "$(for i in 0 1 2; do isp0_field forwards "$i" connections; done | paste -sd ' ')"
    expect_equal "in the text" " tcp/80 to 192.168.0.2 4 served" "$(row tcp/80 | cut -d ' ' -f 1-6)"
}

test_forwards_that_stay_keep_their_counters_when_others_change() {
    local ports=''
    mh_hook -q up ppp0
    expect_forward_answered
    configure 'forward = [
  { port = 443, to = "192.168.0.2" },
  { port = 80, to = "192.168.0.2" },
  { proto = "udp", port = "27015-27030", to = "192.168.0.3" },
]'
    mh_hook -q sync
    status 0
    expect_equal "443, 80" "0 1" "$(for i in 0 1; do isp0_field forwards "$i" connections; done | paste -sd ' ')"
    # So many changes are made by writing the chain anew.
    for port in {1000..1040}; do ports+="{ port = $port, to = \"192.168.0.2\" }, "; done
    configure "forward = [$ports{ port = 80, to = \"192.168.0.2\" }]"
    mh_hook -q sync
    status 0
    expect_equal "80, in a chain written anew" 0 "$(isp0_field forwards 41 connections)"
    expect_forward_answered
}

test_status_sums_up_the_rules_of_one_forward() {
    configure 'forward = [
  { proto = ["tcp", "udp"], port = "80-27015", to = "192.168.0.2", from = ["192.0.2.9", "192.0.2.77"] },
]'
    up_both
    expect_answer "server 192.0.2.9" client udp "$X" 27015
    expect_forward_answered
    expect_answer "server 192.0.2.77" client tcp "$X" 80 --source 192.0.2.77
    status 0
    expect_equal "its connections" 3 "$(isp0_field forwards 0 connections)"
    [[ $(row 'tcp\+udp') == " tcp+udp/80-27015 to 192.168.0.2 3 served "*" open from 192.0.2.9/32, 192.0.2.77/32" ]] ||
        fail "in the text: $(row 'tcp\+udp')"
    leave_out nat '192.0.2.77.*tcp'
    status 1
    expect_equal "without one of its rules" 2 "$(isp0_field forwards 0 connections)"
}

test_status_counts_open_connections_and_their_bytes() {
    # A flow from before the forward, which it did not make, and one of another's forward to the same host and port.
    mh_hook -q up ppp1
    mh_hook -q up ppp0
    on_router conntrack -I -p udp -s 192.0.2.9 -d "$X" --sport 4000 --dport 27015 -r "$X" -q 192.0.2.9 \
        --reply-port-src 27015 --reply-port-dst 4000 -t 300 >/dev/null 2>&1
    on_router /usr/sbin/iptables -t nat -A PREROUTING -i ppp1 -p udp -j DNAT --to-destination 192.168.0.2
    expect_answer "server 192.0.2.9" client udp 198.51.100.20 27015
    expect_equal "flows beside" 2 \
        "$({ tracked -p udp --orig-port-src 4000; tracked --orig-dst 198.51.100.20; } | wc -l)"
    lab_sysctl router net.netfilter.nf_conntrack_acct=1
    expect_answer "server 192.0.2.9" client udp "$X" 27015
    expect_answer "server 192.0.2.9" client udp "$X" 27022
    # A datagram for a port beside, and a connection of the LAN's own.
    expect_silence client udp "$X" 27031
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    status 0
    expect_equal "open" "0 0 2" "$(for i in 0 1 2; do isp0_field forwards "$i" open; done | paste -sd ' ')"
    expect_equal "open bytes" "$(tracked -p udp --orig-dst "$X" --reply-src 192.168.0.2 |
        grep -o 'bytes=[0-9]*' | awk -F = '{ sum += $2 } END { print sum }')" "$(isp0_field forwards 2 open_bytes)"
    expect_equal "open bytes of none" 0 "$(isp0_field forwards 0 open_bytes)"
    expect_equal "marked" "3 $(tracked --mark 10/255 | wc -l)" "$(isp0_field marked) 3"
    lab_sysctl router net.netfilter.nf_conntrack_acct=0
    status 0
    expect_equal "open bytes without accounting" null "$(isp0_field forwards 2 open_bytes)"
    on_router conntrack -D -p udp --orig-dst "$X" >"$LAB_DIR/log" 2>&1
    status 0
    expect_equal "open and marked, when they have ended" "0 0" "$(forward_fields 2 open) $(isp0_field marked)"
    expect_equal "what there have been" 2 "$(isp0_field forwards 2 connections)"
}

test_status_counts_marks_by_our_bits_only() {
    on_router /usr/sbin/iptables -t mangle -A PREROUTING -i ppp0 -j CONNMARK --set-xmark 0x100/0x100
    up_both
    expect_answer "server 192.0.2.9" client udp "$X" 27015
    status 0
    expect_equal "marked" 1 "$(isp0_field marked)"
}

# on_terminal [NAME=VALUE…]: what status prints there.
on_terminal() {
    script --quiet --return --command "env $* ip netns exec router $MH_HOOK --config $LAB_CONFIG status" \
        /dev/null </dev/null | tr -d '\r'
}

test_status_has_colours_on_a_terminal_only() {
    local plain escape=$'\e['
    up_both
    status 0
    plain=$(seconds_out <"$STATUS.brief")
    [[ $plain != *"$escape"* ]] || fail "colours in a pipe"
    [[ $(on_terminal TERM=xterm) == *"${escape}32mup${escape}0m"* ]] || fail "no green: $(on_terminal TERM=xterm)"
    expect_equal "without its colours" "$plain" "$(on_terminal TERM=xterm | sed -E 's/\x1b\[[0-9]*m//g' | seconds_out)"
    expect_equal "with NO_COLOR" "$plain" "$(on_terminal TERM=xterm NO_COLOR=1 | seconds_out)"
    expect_equal "on a dumb terminal" "$plain" "$(on_terminal TERM=dumb | seconds_out)"
    [[ $(on_terminal TERM=xterm NO_COLOR=) == *"$escape"* ]] || fail "an empty NO_COLOR counts as none"
    # The columns stand where they stand without.
    expect_equal "columns" "$(on_terminal TERM=dumb | sed -n 5,8p)" \
        "$(on_terminal TERM=xterm | sed -E 's/\x1b\[[0-9]*m//g' | sed -n 5,8p)"
    on_router ip rule del priority 100
    [[ $(on_terminal TERM=xterm || true) == *"${escape}31mdrifted"* ]] || fail "no red: $(on_terminal TERM=xterm)"
}

test_status_writes_nothing() {
    up_both
    monitor_start route rule address
    mh_hook status >"$STATUS"
    mh_hook status --json >"$STATUS"
    expect_equal "what the monitors saw" "" "$(monitor_seen)"
}

test_status_has_metrics_for_prometheus() {
    up_both
    expect_forward_answered
    on_router ip rule del priority 100
    mh_hook status --prometheus >"$LAB_DIR/metrics" && fail "exit status 0"
    /usr/bin/python3 - "$LAB_DIR/metrics" >"$LAB_DIR/samples" <<'EOF'
import sys
from prometheus_client.parser import text_string_to_metric_families
for family in text_string_to_metric_families(open(sys.argv[1]).read()):
    for sample in family.samples:
        labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
        print(family.type, sample.name, labels, sample.value)
EOF
    grep -qxF "gauge mh_hook_in_step  0.0" "$LAB_DIR/samples"
    grep -qxF "gauge mh_hook_uplink_up interface=ppp0,uplink=isp0 1.0" "$LAB_DIR/samples"
    grep -qxF "gauge mh_hook_uplink_missing_entries uplink=isp0 1.0" "$LAB_DIR/samples"
    grep -qxF "gauge mh_hook_uplink_in_step uplink=isp1 1.0" "$LAB_DIR/samples"
    grep -qxF "counter mh_hook_forward_connections_total forward=tcp/80,from=,to=192.168.0.2,uplink=isp0 1.0" "$LAB_DIR/samples"
    # isp1 has no mark, so nobody can count its connections.
    expect_equal "marked" 1 "$(grep -c mh_hook_uplink_connections "$LAB_DIR/samples")"
}
