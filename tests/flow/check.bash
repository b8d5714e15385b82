# shellcheck shell=bash
# check: a fault put in is found by its name and weight, what it says mends it, and then it is gone; a router that
# works has none, whoever else is on it.

## The room: a router as Debian's packages leave it

# A copy of /etc with the hooks, pppd's peers and sysctl.d of a router that works; nothing else of this machine's.
lab_etc() {
    local folder event
    # --kill-child's namespace ends with the test, and with it these mounts.
    cp -a /etc "$LAB_DIR/etc"
    mount --bind "$LAB_DIR/etc" /etc
    rm -rf /etc/{ppp,sysctl.d,sysctl.conf,iptables,ufw} /etc/systemd/networkd.conf{,.d} \
        /etc/systemd/system/multi-user.target.wants/systemd-networkd.service
    for folder in /usr/lib/sysctl.d /usr/local/lib/sysctl.d /usr/lib/systemd/networkd.conf.d /boot; do
        if [[ -d $folder ]]; then mount -t tmpfs -o mode=0755 tmpfs "$folder"; fi
    done
    mkdir -p /etc/sysctl.d /etc/ppp/peers
    echo 'net.ipv4.ip_forward = 1' >/etc/sysctl.d/90-router.conf
    cp "$LAB_REPOSITORY/packaging/examples/peers-isp0" /etc/ppp/peers/isp0
    cp "$LAB_REPOSITORY/packaging/examples/peers-isp1" /etc/ppp/peers/isp1
    for event in ip-pre-up ip-up ip-down; do
        mkdir -p "/etc/ppp/$event.d"
        printf '#!/bin/sh\nrun-parts /etc/ppp/%s.d\n' "$event" >"/etc/ppp/$event"
        cp "$LAB_REPOSITORY/hooks/$event" "/etc/ppp/$event.d/0mh-hook"
        chmod 0755 "/etc/ppp/$event" "/etc/ppp/$event.d/0mh-hook"
    done
}

# up_and_checked [CONFIGURATION OF ISP0 [OF ISP1]]: a router that works, which check says, too.
up_and_checked() {
    if (($#)); then configure "$@"; fi
    [[ -d /etc/ppp/peers && -d $LAB_DIR/etc ]] || lab_etc
    mh_hook up ppp0
    mh_hook up ppp1
    expect_forward_answered
    expect_all_well
}

## Questions

# findings PYTHON: an expression for each finding f, a line each, of those for which it is not None.
findings() {
    mh_hook --json check >"$LAB_DIR/check.json" || true
    /usr/bin/python3 -c '
import json, sys
for f in json.load(open(sys.argv[1]))["findings"]:
    line = '"$1"'
    if line is not None:
        print(line)
' "$LAB_DIR/check.json"
}

# expect_found ID WEIGHT [TEXT THAT IT SAYS]
expect_found() {
    local found status=0
    found=$(findings 'f["severity"] + " " + " ".join([f["what"]] + f["entries"]) if f["id"] == "'"$1"'" else None')
    [[ $found == "$2 "*"${3-}"* ]] || fail "expected $1 ($2, '${3-}'), found '$found' among:"$'\n'"$(mh_hook check)"
    expect_schema check "$LAB_DIR/check.json"
    mh_hook check >"$LAB_DIR/check" || status=$?
    expect_equal "exit status, beside a finding that $2" "$(sed -n '/^error:/{p;q}' "$LAB_DIR/check" | wc -l)" "$status"
}

expect_not_found() {
    local found
    found=$(findings 'f["what"] if f["id"] == "'"$1"'" else None')
    [[ ! $found ]] || fail "expected no $1, found: $found"
}

# No error and no warning; an info may be there.
expect_all_well() {
    local found
    found=$(findings 'f["id"] + ": " + f["what"] if f["severity"] != "info" else None')
    [[ ! $found ]] || fail "expected no error and no warning, found: $found"
    mh_hook check >"$LAB_DIR/check" || fail "exit status $?"
}

# mend ID: runs the commands that it names.
mend() {
    local command
    findings '"\n".join(f["fix"]) if f["id"] == "'"$1"'" else None' >"$LAB_DIR/mend"
    [[ -s $LAB_DIR/mend ]] || fail "nothing mends $1"
    while read -r command; do
        if [[ $command == "mh-hook "* ]]; then
            # shellcheck disable=SC2086 # words of a command
            mh_hook ${command#mh-hook } </dev/null
        else
            on_router sh -c "$command" </dev/null
        fi
    done <"$LAB_DIR/mend"
}

# expect_mended ID WEIGHT [TEXT]: found, and gone once it is mended.
expect_mended() {
    expect_found "$@"
    mend "$1"
    expect_not_found "$1"
}

## The router that works

test_check_finds_nothing_in_a_router_that_works() {
    up_and_checked
    expect_equal "check" \
        "nothing found: 2 uplinks, 3 forwards" "$(sed 's/, [0-9]* routing rules.*//' "$LAB_DIR/check")"
    expect_schema check "$LAB_DIR/check.json"
    configure "$FORWARD_80" "table = 11"$'\n'"$FORWARD_80"
    mh_hook sync
    expect_all_well
    lab_sysctl router net.ipv4.conf.{all,eth1,ppp0,ppp1}.rp_filter=1
    mh_hook sync
    expect_forward_answered
    expect_all_well
    # As wg-quick sets it: strict filtering counts marks on the LAN's interface, too.
    lab_sysctl router net.ipv4.conf.all.src_valid_mark=1
    expect_forward_answered
    expect_all_well
}

test_check_changes_nothing() {
    local before
    up_and_checked
    before=$(lab_dump)
    mh_hook check
    mh_hook --json check >"$LAB_DIR/check.json"
    expect_equal "after check" "$before" "$(lab_dump)"
}

test_check_finds_nothing_beside_others() {
    local neighbour
    for neighbour in docker tailscale ufw; do
        lab_sysctl router net.ipv4.conf.all.rp_filter=0
        "beside_$neighbour"
    done
    configure "accept-forward = true"$'\n'"$FORWARD_80"
    up_and_checked
    expect_own_service_answered
    expect_packets isp1 foreign none
    configure "$FORWARD_80"
    mh_hook sync
    expect_forward_silent
    expect_mended_line forward-dropped error "$FORWARD_80" "FORWARD's policy"
    # They come last, as after a restart of theirs.
    mh_hook down ppp0
    mh_hook up ppp0
    expect_all_well
}

# expect_mended_line ID WEIGHT CONFIGURATION TEXT: what mends it is a line for the uplink, and then sync.
expect_mended_line() {
    local line
    expect_found "$1" "$2" "$4"
    line=$(findings 'f["fix"][0] if f["id"] == "'"$1"'" else None')
    [[ $line == "[uplink.isp0] "* ]] || fail "expected a line for [uplink.isp0], got '$line'"
    configure "${line#\[uplink.isp0\] }"$'\n'"$3"
    mh_hook sync
    expect_not_found "$1"
    expect_forward_answered
}

test_check_finds_nothing_beside_each_alone() {
    local neighbour
    lab_etc
    configure "accept-forward = true"$'\n'"$FORWARD_80"
    for neighbour in tailscale docker ufw; do
        mh_hook up ppp0
        mh_hook up ppp1
        "beside_$neighbour"
        if [[ $neighbour == ufw ]]; then mh_hook sync; fi
        expect_forward_answered
        expect_all_well
    done
}

## The configuration

test_check_tells_all_of_a_configuration_that_does_not_hold() {
    lab_etc
    configure $'mask = 3\nforward = [{ port = 0, to = "x" }]'
    lab_sysctl router net.ipv4.ip_forward=0
    expect_found configuration error "mh-hook.toml:"
    expect_equal "problems" 3 "$(findings '1 if f["id"] == "configuration" else None' | wc -l)"
    # What needs no configuration is looked at all the same.
    expect_mended ip-forward error
    lab_config </dev/null
    expect_found no-uplinks info
    expect_all_well
}

## Kernel parameters

test_check_finds_forwarding_off() {
    up_and_checked
    lab_sysctl router net.ipv4.ip_forward=0
    expect_forward_silent
    expect_mended ip-forward error
    expect_forward_answered
    on_router sh -c 'echo 0 >/proc/sys/net/ipv4/conf/ppp0/forwarding'
    expect_forward_silent
    expect_mended forwarding error ppp0
    expect_forward_answered
    on_router sh -c 'echo 0 >/proc/sys/net/ipv4/conf/eth1/forwarding'
    expect_forward_silent
    expect_mended forwarding error eth1
    expect_forward_answered
}

test_check_finds_what_the_next_boot_sets() {
    # Not every system has that of packages; /run is the lab's.
    local folder=/usr/lib/sysctl.d
    [[ -d $folder ]] || { folder=/run/sysctl.d; mkdir "$folder"; }
    up_and_checked
    printf '# of a hardening guide\nnet.ipv4.ip_forward=0\n' >/etc/sysctl.d/95-hard.conf
    expect_mended ip-forward-at-boot warning /etc/sysctl.d/95-hard.conf:2
    expect_equal "line 2" "net.ipv4.ip_forward = 1" "$(sed -n 2p /etc/sysctl.d/95-hard.conf)"
    # A file of the same name in an earlier folder takes its place.
    printf 'net.ipv4.ip_forward=0\n' >"$folder/99-package.conf"
    expect_mended ip-forward-at-boot warning "$folder/99-package.conf:1"
    ln -s /dev/null /etc/sysctl.d/99-package.conf
    rm /etc/sysctl.d/9[059]-[!p]*
    expect_mended ip-forward-at-boot info "no file of sysctl.d"
    rm /etc/sysctl.d/99-zz*
    # By the link in sysctl.d, and without systemd by itself.
    printf '\n\nnet/ipv4/ip_forward=1\n' >/etc/sysctl.conf
    ln -s ../sysctl.conf /etc/sysctl.d/99-sysctl.conf
    expect_not_found ip-forward-at-boot
    mkdir -p /run/systemd/system
    expect_not_found ip-forward-at-boot
    rm /etc/sysctl.d/99-sysctl.conf
    expect_found ip-forward-at-boot info
    rmdir /run/systemd/system
    rm /etc/sysctl.conf
    printf 'net.ipv4.conf.*.forwarding = 0\n' >/etc/sysctl.d/10-pattern.conf
    expect_mended ip-forward-at-boot warning /etc/sysctl.d/10-pattern.conf:1
    mkdir /etc/ufw
    echo ENABLED=yes >/etc/ufw/ufw.conf
    echo net/ipv4/ip_forward=0 >/etc/ufw/sysctl.conf
    expect_mended ip-forward-at-boot warning /etc/ufw/sysctl.conf:1
}

test_check_finds_nothing_in_strict_filtering() {
    up_and_checked
    lab_sysctl router net.ipv4.conf.ppp0.rp_filter=1 net.ipv4.conf.all.rp_filter=1
    expect_forward_answered
    expect_all_well
    lab_sysctl router net.ipv4.conf.ppp0.src_valid_mark=0
    expect_forward_silent
    expect_mended drift error src_valid_mark
    expect_forward_answered
}

## Links and entries

test_check_finds_links_that_carry_nothing() {
    up_and_checked
    ip -n router link set ppp0 down
    expect_found link error "ppp0 is down"
    [[ $(findings '" ".join(f["fix"]) if f["id"] == "link" else None') == "pon isp0" ]] || fail "expected pon isp0"
    rm /etc/ppp/peers/*
    expect_mended link error "ppp0 is down"
    mh_hook sync
    expect_all_well
    ip -n router address flush dev ppp0
    expect_found link error "ppp0 has no IPv4 address"
    ip -n router link delete ppp0
    expect_found link error "ppp0 does not exist"
    lab_link_down ppp1
    expect_found link error
    expect_equal "severities" "error warning" "$(findings 'f["severity"] if f["id"] == "link" else None' | xargs)"
    lab_link_up ppp0 "$X"
    lab_link_up ppp1 198.51.100.20
    mh_hook sync
    expect_all_well
    ip -n router link set eth1 down
    expect_found lan-interface error "eth1 is down"
    mend lan-interface
    expect_not_found lan-interface
    expect_forward_answered
    sed -i 's/interfaces = .*/interfaces = ["eth1", "eth7"]/' "$LAB_CONFIG"
    mh_hook sync
    expect_found lan-interface warning "eth7 does not exist"
}

test_check_finds_a_link_that_nothing_names() {
    lab_etc
    mh_hook up ppp1
    sed -i 's/^interface = "ppp0"/ipparam = "isp0"/' "$LAB_CONFIG"
    expect_mended link error "no installed entry tells which interface"
    expect_forward_answered
    expect_all_well
    sed -i 's|networks = .*|networks = ["192.168.0.0/24", "203.0.113.0/24"]|' "$LAB_CONFIG"
    expect_found address error "203.0.113.10 can't be an uplink's address"
}

test_check_finds_entries_that_are_missing_or_too_many() {
    local entry
    up_and_checked
    while read -r entry; do
        # shellcheck disable=SC2086 # words of a command
        on_router $entry
        expect_mended drift error
        expect_forward_answered
    done <<'EOF'
ip route del default dev ppp0 table 10
ip route del unreachable default table 10 metric 4278198272
ip rule del priority 98
ip rule del priority 99
ip rule del priority 100
/usr/sbin/iptables -t nat -D PREROUTING -i ppp0 -m addrtype --dst-type LOCAL -j mh-isp0
/usr/sbin/iptables -t nat -D mh-isp0 1
/usr/sbin/iptables -t mangle -D PREROUTING -i ppp0 -j mh-isp0
/usr/sbin/iptables -t mangle -F mh-isp0
EOF
    leave_out mangle 'PREROUTING ! -i ppp0 .*CONNMARK --restore-mark'
    expect_mended drift error
    on_router ip rule add priority 100 from 203.0.113.99 lookup 10 protocol 109
    expect_mended drift warning 203.0.113.99
    on_router ip rule add priority 100 from 203.0.113.99 lookup 12 protocol 109
    expect_mended orphans warning 203.0.113.99
    expect_all_well
}

# As the recipe is typed, in README and elsewhere.
test_check_finds_a_recipe_made_by_hand() {
    lab_etc
    configure "$FORWARD_80"
    on_router sh -e <<EOF
/usr/sbin/iptables -t nat -A POSTROUTING -s 192.168.0.0/24 -o ppp1 -j MASQUERADE
ip route add 0/0 dev ppp0 table 10
ip rule add from $X table 10 pref 100
/usr/sbin/iptables -A PREROUTING -t nat -p tcp -i ppp0 --dport 80 -j DNAT --to 192.168.0.2:80
/usr/sbin/iptables -t mangle -A PREROUTING -j CONNMARK --restore-mark
/usr/sbin/iptables -t mangle -A PREROUTING -i ppp0 -j MARK --set-mark 10
/usr/sbin/iptables -t mangle -A PREROUTING -j CONNMARK --save-mark
ip rule add iif eth1 fwmark 10 table 10 pref 99
EOF
    expect_forward_answered
    expect_found by-hand error "8 entries are made by hand"
    [[ $(head -n 1 "$LAB_DIR/check") == "error: 8 entries "* ]] || fail "the first line: $(cat "$LAB_DIR/check")"
    if mh_hook sync; then fail "sync did not meet the typed route"; fi
    expect_found by-hand error
    mend by-hand
    expect_not_found by-hand
    expect_forward_answered
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    expect_all_well
}

test_check_exits_with_1_for_a_warning_where_it_is_strict() {
    local status=0
    up_and_checked
    mh_hook check --strict >"$LAB_DIR/check" || fail "exit status $?"
    on_router ip rule add priority 100 from 203.0.113.99 lookup 12 protocol 109
    expect_found orphans warning
    mh_hook check --strict >"$LAB_DIR/check" || status=$?
    expect_equal "exit status" 1 "$status"
    expect_equal "health" warning "$(field "$LAB_DIR/check.json" health)"
}

test_check_finds_addresses_that_nobody_outside_reaches() {
    up_and_checked
    lab_link_down ppp0
    lab_link_up ppp0 100.70.1.2
    mh_hook sync
    expect_found address-not-public error 100.70.1.2
    lab_link_down ppp0
    lab_link_up ppp0 "$X"
    mh_hook sync
    expect_all_well
}

test_check_finds_a_default_route_by_the_servers_link() {
    up_and_checked
    on_router ip route replace default dev ppp0
    expect_mended default-by-servers warning "not by isp1's ppp1"
    expect_all_well
}

## Routing

test_check_finds_others_in_our_tables() {
    up_and_checked
    on_router ip route add default dev ppp1 table 10 metric 50
    expect_mended table-default warning
    on_router ip route del default dev ppp0 table 10
    on_router ip route add default dev ppp1 table 10
    expect_forward_silent
    expect_mended table-default error
    expect_forward_answered
    on_router ip route add 192.0.2.50 dev ppp1 table 10
    expect_found table-routes info 192.0.2.50
    expect_all_well
}

test_check_finds_rules_that_overtake_ours() {
    up_and_checked
    # As wg-quick's, which goes ahead of what is there.
    on_router ip route add default dev ppp1 table 51820
    on_router ip rule add not fwmark 51820 table 51820
    on_router ip rule add table main suppress_prefixlength 0
    expect_forward_silent
    expect_found reply-route error "table 51820"
    expect_found own-route warning "not from all fwmark 0xca6c"
    mend reply-route
    expect_forward_answered
    expect_all_well
    # Without the second, the LAN is behind the tunnel, too.
    on_router ip rule add priority 60 table 51820
    expect_forward_silent
    expect_mended target-route error '60: from all lookup 51820'
    expect_forward_answered
    on_router ip rule del priority 32765 from all lookup 51820
    expect_all_well
    on_router ip rule add priority 50 lookup 77
    expect_mended rule-ahead info
    on_router ip rule add priority 50 from 192.168.0.0/24 lookup 51820
    expect_forward_silent
    expect_mended reply-route error
    expect_forward_answered
}

test_check_finds_marks_that_others_use() {
    up_and_checked
    on_router ip rule add priority 200 fwmark 0xa lookup 77
    expect_found mark-rule warning "fwmark 0xa"
    on_router ip rule del priority 200
    on_router ip rule add priority 200 fwmark 0xb lookup 77
    on_router ip rule add priority 200 fwmark 0x100/0x100 lookup 77
    expect_all_well
}

test_check_finds_targets_that_nothing_reaches() {
    up_and_checked
    configure 'forward = [{ port = 80, to = "192.168.0.1:8080" }]'
    mh_hook sync
    expect_answer "router 192.0.2.9" client tcp "$X" 80
    expect_all_well
    configure 'forward = [{ port = 80, to = "192.168.7.2" }]'
    mh_hook sync
    expect_found target-route error "out of the uplink ppp1"
    on_router ip route add unreachable 192.168.7.0/24
    expect_found target-route error "no route"
    on_router ip route del unreachable 192.168.7.0/24
    beside_docker
    on_router /usr/sbin/iptables -P FORWARD ACCEPT
    # Replies are known by their mark, whatever interface they come in by.
    configure 'forward = [{ port = 80, to = "172.17.0.2" }]'
    mh_hook sync
    expect_all_well
    configure 'forward = [{ port = 80, to = "192.168.0.9" }]'
    mh_hook sync
    expect_all_well
    expect_forward_silent
    lab_wait on_router grep -E '^192\.168\.0\.9 .* 0x0 ' /proc/net/arp
    expect_found target-silent error 192.168.0.9
    configure "$FORWARD_80"
    sed -i 's|networks = .*|networks = ["192.168.0.0/24", "10.8.0.0/24"]|' "$LAB_CONFIG"
    mh_hook sync
    expect_found lan-network warning 10.8.0.0/24
}

test_check_finds_no_default_route() {
    up_and_checked
    on_router ip route del default dev ppp1
    expect_found default-route warning
    on_router ip route add 0.0.0.0/1 dev ppp1
    expect_all_well
}

## iptables

test_check_finds_what_drops_forwards() {
    up_and_checked
    on_router /usr/sbin/iptables -P FORWARD DROP
    expect_forward_silent
    expect_mended_line forward-dropped error "$FORWARD_80" "FORWARD's policy"
    # Ahead of ours.
    on_router /usr/sbin/iptables -I FORWARD -o ppp0 -j REJECT
    expect_forward_silent
    expect_mended forward-dropped error "-o ppp0 -j REJECT"
    expect_forward_answered
    on_router /usr/sbin/iptables -I FORWARD -s 198.51.100.0/24 -j DROP
    on_router /usr/sbin/iptables -I FORWARD -p udp -j DROP
    expect_forward_answered
    expect_all_well
    on_router /usr/sbin/iptables -t mangle -I PREROUTING -i ppp0 -p tcp --dport 80 -j DROP
    expect_forward_silent
    expect_found forward-dropped error "-t mangle -A PREROUTING"
}

test_check_finds_firewalls_that_let_forwards_through() {
    up_and_checked "$FORWARD_80"
    on_router /usr/sbin/iptables-restore --noflush <<'EOF'
*filter
:FORWARD DROP [0:0]
:web - [0:0]
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -i ppp+ -o eth1 -p tcp -m multiport --dports 80,443 -j web
-A web -d 192.168.0.0/30 -m conntrack --ctstate NEW -j ACCEPT
COMMIT
EOF
    expect_forward_answered
    expect_all_well
    on_router /usr/sbin/iptables -F web
    expect_forward_silent
    expect_found forward-dropped error "FORWARD's policy"
}

test_check_finds_rules_that_wipe_our_marks() {
    local rule
    up_and_checked
    while read -r rule; do
        # shellcheck disable=SC2086 # words of a rule
        on_router /usr/sbin/iptables -t mangle $rule
        expect_forward_silent
        expect_mended mark-wiped error
        expect_forward_answered
        on_router /usr/sbin/iptables -t mangle -F FORWARD
        # shellcheck disable=SC2086
        [[ $rule == *FORWARD* ]] || on_router /usr/sbin/iptables -t mangle -D PREROUTING "$(last_of PREROUTING)"
        mh_hook sync
        expect_all_well
    done <<'EOF'
-A PREROUTING -j CONNMARK --set-mark 0x5
-A FORWARD -i ppp0 -j CONNMARK --set-mark 0x100
-A PREROUTING -i eth1 -j MARK --set-mark 0x5
EOF
    # They leave ahead of ours.
    on_router /usr/sbin/iptables -t mangle -I PREROUTING -i ppp0 -j ACCEPT
    expect_forward_silent
    expect_mended mark-skipped error "-i ppp0 -j ACCEPT"
    expect_forward_answered
    on_router /usr/sbin/iptables -t mangle -I PREROUTING -i eth1 -j ACCEPT
    expect_forward_silent
    expect_mended mark-skipped error "-i eth1 -j ACCEPT"
    expect_forward_answered
    on_router /usr/sbin/iptables -t mangle -D PREROUTING -i ppp0 -j ACCEPT
    on_router /usr/sbin/iptables -t mangle -D PREROUTING -i eth1 -j ACCEPT
    # Some packets only, or nobody knows.
    on_router /usr/sbin/iptables -t mangle -A PREROUTING -s 198.51.100.0/24 -j CONNMARK --set-mark 0x5
    expect_forward_answered
    expect_mended mark-wiped warning
    # In step with ours: what is saved is what was restored.
    on_router /usr/sbin/iptables -t mangle -A PREROUTING -j CONNMARK --restore-mark
    on_router /usr/sbin/iptables -t mangle -A POSTROUTING -j CONNMARK --save-mark
    expect_forward_answered
    expect_all_well
}

last_of() { on_router /usr/sbin/iptables-save -t mangle | grep -c "^-A $1 "; }

test_check_finds_others_dnat_ahead_of_ours() {
    lab_etc
    mh_hook up ppp1
    beside_docker
    mh_hook up ppp0
    on_router /usr/sbin/iptables -P FORWARD ACCEPT
    expect_forward_answered
    expect_all_well
    on_router /usr/sbin/iptables -t nat -A DOCKER ! -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.17.0.2:80
    expect_forward_silent
    expect_found dnat-ahead error 172.17.0.2
}

test_check_finds_the_other_backend() {
    local other=nft
    up_and_checked
    [[ $(/usr/sbin/iptables -V) == *legacy* ]] || other=legacy
    on_router "/usr/sbin/iptables-$other" -A FORWARD -i eth7 -j ACCEPT
    expect_found both-backends info "iptables-$other"
    expect_all_well
    lab_backend "$other"
    mh_hook up ppp0
    expect_found ours-in-the-other-backend warning mh-isp0
    mend ours-in-the-other-backend
    expect_not_found ours-in-the-other-backend
    expect_forward_answered
}

## Forwards

test_check_notes_forwards_that_get_in_each_others_way() {
    configure "$FORWARD_80" $'table = 11\nforward = [{ port = "80-81", to = "192.168.0.3" }]'
    up_and_checked
    expect_found forwards-differ info tcp/80
    configure 'forward = [{ port = "8000-8100", to = "192.168.0.2" }, { port = 80, to = "192.168.0.2" }]'
    mh_hook sync
    expect_found local-service info tcp/8080
    configure 'forward = [{ port = 80, to = "192.168.0.2" }, { port = 8081, to = "192.168.0.2" }]'
    mh_hook sync
    in_ns router socat TCP4-LISTEN:8081,bind=127.0.0.1 - &
    lab_wait in_ns router ss -Hln --tcp "sport = :8081"
    expect_not_found local-service
    expect_not_found forwards-differ
    expect_all_well
}

## Files

test_check_finds_hooks_that_do_not_run() {
    local hook=/etc/ppp/ip-up.d/0mh-hook
    up_and_checked
    chmod -x "$hook"
    expect_mended hook-not-executable warning "$hook"
    chmod go+w "$hook"
    expect_mended hook-writable warning "$hook"
    chmod o+w /etc/ppp/ip-up.d
    expect_mended hook-writable warning /etc/ppp/ip-up.d
    chown nobody "$hook"
    expect_mended hook-writable warning "user 65534"
    mv "$hook" "$hook.sh"
    expect_mended hook-name warning "$hook.sh"
    mv "$hook" "$hook-of-mine"
    expect_all_well
    rm "$hook-of-mine"
    expect_mended hook-missing error /etc/ppp/ip-up.d
    [[ $(readlink "$hook") == */mh-hook ]] || fail "expected a link to mh-hook"
    rm "$hook"
    ln -s "$MH_HOOK" /etc/ppp/ip-up.d/any-name
    expect_all_well
    rm /etc/ppp/ip-pre-up.d/0mh-hook
    expect_mended hook-missing info /etc/ppp/ip-pre-up.d
    echo '#!/bin/sh' >/etc/ppp/ip-down
    expect_found hook-missing error "does not run"
    printf '#!/bin/sh\nexec /usr/sbin/mh-hook event down "$@"\n' >/etc/ppp/ip-down
    expect_all_well
}

test_check_finds_peers_that_fight() {
    up_and_checked
    sed -i s/nodefaultroute/defaultroute/ /etc/ppp/peers/isp0
    expect_mended peers-defaultroute warning /etc/ppp/peers/isp1
    sed -i s/nodefaultroute/replacedefaultroute/ /etc/ppp/peers/isp0
    expect_mended peers-replacedefaultroute warning /etc/ppp/peers/isp0
    sed -i s/nodefaultroute/defaultroute/ /etc/ppp/peers/isp0
    echo defaultroute-metric 100 >>/etc/ppp/peers/isp0
    expect_all_well
    # Known by what is said in the file.
    sed -i '/metric/d; s/unit 0/linkname servers/' /etc/ppp/peers/isp0
    expect_all_well
    sed -i 's/^interface = "ppp0"/linkname = "servers"/' "$LAB_CONFIG"
    expect_found peers-defaultroute warning
}

test_check_finds_services_that_undo_our_work() {
    up_and_checked
    mkdir -p /run/systemd/netif
    touch /run/systemd/netif/state
    expect_mended networkd-rules warning
    rm /run/systemd/netif/state
    mkdir -p /etc/systemd/system/multi-user.target.wants
    ln -s /lib/systemd/system/systemd-networkd.service /etc/systemd/system/multi-user.target.wants/
    rm -r /etc/systemd/networkd.conf.d
    printf '[DHCPv4]\nManageForeignRoutingPolicyRules=no\n' >/etc/systemd/networkd.conf
    expect_found networkd-rules warning
    printf '[Network]\nManageForeignRoutingPolicyRules = false\n' >/etc/systemd/networkd.conf
    expect_all_well
    mkdir /etc/iptables
    on_router /usr/sbin/iptables-save >/etc/iptables/rules.v4
    expect_mended persistent-rules warning /etc/iptables/rules.v4
    on_router /usr/sbin/iptables-restore --test /etc/iptables/rules.v4
}

# stand_in PROGRAM TEXT: for -V it prints the text, for all else it is itself.
stand_in() {
    local path
    path=$(readlink -f "$1")
    cp "$path" "$LAB_DIR/real-${1##*/}"
    cat >"$LAB_DIR/stand-in-${1##*/}" <<EOF
#!/bin/sh
if [ "\$1" = -V ]; then echo "$2"; exit; fi
exec "$LAB_DIR/real-${1##*/}" "\$@"
EOF
    chmod 0755 "$LAB_DIR/stand-in-${1##*/}"
    mount --bind "$LAB_DIR/stand-in-${1##*/}" "$path"
}

test_check_finds_tools_and_kernels_that_are_too_old() {
    local release backend stand_in_path
    release=$(uname -r)
    up_and_checked
    stand_in /usr/sbin/ip "ip utility, iproute2-ss171112"
    expect_found old-iproute2 error iproute2-ss171112
    expect_not_found old-iptables
    umount "$(readlink -f /usr/sbin/ip)"
    backend=$(readlink /etc/alternatives/iptables-save)
    stand_in_path=$LAB_DIR/${backend##*/}
    cat >"$stand_in_path" <<EOF
#!/bin/sh
if [ "\$1" = -V ]; then echo iptables-save v1.6.1; exit; fi
exec $backend "\$@"
EOF
    chmod 0755 "$stand_in_path"
    ln -sfn "$stand_in_path" /etc/alternatives/iptables-save
    expect_found old-iptables error v1.6.1
    ln -sfn "$backend" /etc/alternatives/iptables-save
    mkdir -p /boot
    printf '%s\n' CONFIG_NF_NAT=m '# CONFIG_NETFILTER_XT_CONNMARK is not set' >"/boot/config-$release"
    expect_found kernel error CONFIG_NETFILTER_XT_CONNMARK
    echo CONFIG_NETFILTER_XT_CONNMARK=m >"/boot/config-$release"
    expect_all_well
}

test_check_finds_a_table_of_connections_that_is_nearly_full() {
    local most folder=/proc/sys/net/netfilter
    up_and_checked
    most=$(on_router cat "$folder/nf_conntrack_max")
    echo $((most - most / 20)) >"$LAB_DIR/count"
    # In a mount namespace of its own, as ip netns exec makes it.
    on_router sh -c "mount --bind $LAB_DIR/count $folder/nf_conntrack_count; $MH_HOOK --config $LAB_CONFIG check" \
        >"$LAB_DIR/check"
    grep -q "^warning: .* of at most $most connections" "$LAB_DIR/check" || fail "$(cat "$LAB_DIR/check")"
}
