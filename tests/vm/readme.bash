# shellcheck shell=bash
# Both READMEs to the letter, on a router that is Debian and nothing else; sourced by tests/vm/story after package.bash.

README_CHECKOUT=/root/mh-hook

# readme_take FILE: its configurations into toml.1 and toml.2, its commands, block by block, into commands.1 and so on.
readme_take() {
    mkdir "$LAB_DIR/readme"
    awk -v dir="$LAB_DIR/readme" '
        /^```/ {
            if (fence) fence = ""
            else if ($0 == "```toml") fence = dir "/toml." ++configurations
            else fence = "/dev/null"
            next
        }
        fence { print >fence; next }
        /^    / {
            if (!block) block = dir "/commands." ++blocks
            print substr($0, 5) >block
            next
        }
        { block = "" }' "$1"
    expect_equal "blocks of $1" "$(printf '%s\n' commands.{1..6} toml.{1,2})" "$(ls "$LAB_DIR/readme")"
    # Those are for a machine with Rust and a network: the tier demo, and all tiers.
    expect_equal "blocks for another machine" $'tests/demo\ntests/run' "$(cat "$LAB_DIR"/readme/commands.[12])"
}

# paste NUMBER: each line of that block as a person would paste it who answers y. What it prints is left in PASTED.
paste() {
    local line
    PASTED=
    while read -r line; do
        PASTED+="# $line"$'\n'
        # shellcheck disable=SC2016 # the inner shell's
        PASTED+=$(on_router bash -c 'cd "$1" && exec bash -c "$2" < <(yes)' paste "$README_CHECKOUT" "$line" 2>&1)$'\n' ||
            fail "$line: $PASTED"
    done <"$LAB_DIR/readme/commands.$1"
}

# expect_pasted TEXT…: in what has just been printed.
expect_pasted() {
    local text
    for text; do [[ $PASTED == *"$text"* ]] || fail "no '$text' in what was printed:"$'\n'"$PASTED"; done
}

# write_configuration NUMBER: where README says, and as it says.
write_configuration() { cat "$LAB_DIR/readme/toml.$1" >"$ROOT/etc/mh-hook.toml"; }

# The servers and the clients that README's configurations name, where the lab has none.
readme_net() {
    lab_listen lanhost udp 27015
    ip -n client address add 198.51.100.77/32 dev lo
    ip -n isp0 route add 198.51.100.77 dev client
    ip -n lanhost address add 192.168.0.25/24 dev eth0
    ip netns add dmz
    ip -n dmz link set lo up
    ip link add eth1.10 netns router type veth peer eth0 netns dmz
    ip -n router address add 192.168.10.1/24 dev eth1.10
    ip -n router link set eth1.10 up
    ip -n dmz address add 192.168.10.9/24 dev eth0
    ip -n dmz link set eth0 up
    ip -n dmz route add default via 192.168.10.1
    lab_listen dmz tcp 4000
}

# readme_checkout: what the newcomer has cloned. A guest has no network, so that the package is one that has been built
# already, by the same packaging/build-deb.
readme_checkout() {
    mkdir -p "$ROOT$README_CHECKOUT/packaging"
    cp "$PACKAGE_DIR/first.deb" "$ROOT$README_CHECKOUT"
    printf '#!/bin/sh\necho building\necho %s/first.deb\n' "$README_CHECKOUT" >"$ROOT$README_CHECKOUT/packaging/build-deb"
    chmod 0755 "$ROOT$README_CHECKOUT/packaging/build-deb"
}

# peers_as_in_the_examples: with what the package has in its examples, and what tells the lab's ISPs apart.
peers_as_in_the_examples() {
    local number
    for number in 0 1; do
        sed "s/^eth[0-9]*$/wan$number rp_pppoe_ac isp$number/" \
            "$ROOT/usr/share/doc/mh-hook/examples/peers-isp$number" >"$ROOT/etc/ppp/peers/isp$number"
        printf '%s\n' "linkname isp$number" "holdoff 1" "$LINKS_OPTIONS" >>"$ROOT/etc/ppp/peers/isp$number"
    done
}

# follow FILE THEN: a newcomer with two links that are up, through the first configuration and THEN, until nothing is left.
follow() {
    local files before
    readme_take "$1"
    readme_net
    lab_sysctl router net.ipv4.ip_forward=0
    booted_router
    readme_checkout
    files=$(files)
    before=$(lab_dump)
    dial isp0 isp1

    # Set it up
    grep -o 'net\.ipv4\.ip_forward = 1' "$1" >"$ROOT/etc/sysctl.d/router.conf"
    on_router systemctl restart systemd-sysctl.service
    expect_silence lanhost tcp 192.0.2.9 80
    paste 3
    expect_pasted "Setting up mh-hook"
    write_configuration 1
    expect_forward_silent
    paste 4
    expect_pasted "ip rule add priority 100 from $X lookup 10" "iptables -t nat -A mh-isp0"
    expect_the_first_configuration

    # How to see that it works
    paste 5
    expect_pasted "up     isp0" "isp0 up on ppp0 $X: " "# nothing to change" "from $X lookup 10" "default dev ppp0" "-A mh-isp0"
    hang_up isp0 isp1
    expect_equal "kernel while no link is up" "$before" "$(lab_dump)"
    "$2"
    hang_up isp0 isp1

    # Take it away
    cp /etc/ppp/peers/isp[01] "$ROOT/etc/ppp/peers"
    rm "$ROOT/etc/sysctl.d/router.conf"
    paste 6
    expect_pasted "Purging configuration files for mh-hook"
    expect_equal "kernel after purge" "$before" "$(lab_dump)"
    expect_equal "files after purge" "$files" "$(files)"
}

expect_the_first_configuration() {
    expect_forward_answered
    expect_answer "server 198.51.100.77" client tcp "$X" 2222 --source 198.51.100.77
    expect_silence client tcp "$X" 2222
    expect_answer "lanhost 192.0.2.9" client udp "$X" 27015
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
}

dial_again() {
    dial isp0 isp1
    expect_the_first_configuration
}

# The second configuration, where Docker has been.
change_the_configuration() {
    on_router iptables -P FORWARD DROP
    peers_as_in_the_examples
    write_configuration 2
    dial isp0 isp1
    expect_answer "server 198.51.100.77" client tcp "$X" 22 --source 198.51.100.77
    expect_answer "dmz 192.0.2.9" client tcp "$X" 4000
    on_router iptables -P FORWARD ACCEPT
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    expect_answer "client $X" lanhost tcp 192.0.2.9 80 --source 192.168.0.25
    expect_equal "isp1's table" "default dev ppp1" \
        "$(on_router ip route list table 20 type unicast | sed 's/ proto .*//')"
}

# Both have the same commands and configurations, says tests/manual.rs.
test_a_newcomer_follows_the_readme() { follow "$LAB_REPOSITORY/README.md" dial_again; }
test_a_newcomer_follows_the_readme_in_japanese() { follow "$LAB_REPOSITORY/README.ja.md" change_the_configuration; }
