# shellcheck shell=bash
# The lab's links with pppd at both ends; sourced after tests/lab.bash, whose lab_links has cables in their place.
#
#   isp0 wan ── PPPoE ── wan0 router      pppoe-server, one session, with the address that isp_offer names
#   isp1 wan ── PPPoE ── wan1 router      Debian's pon and poff; ppp1 takes the default route

LINKS_SYSLOG=/run/lab/syslog
LINKS_EVENTS=/run/lab/events
# A question that got lost is asked again after 1 s instead of 3.
LINKS_OPTIONS="noauth noipv6 lcp-restart 1 ipcp-restart 1"

# links_setup, after lab_net and lab_config: everything that goes before the first dial.
links_setup() {
    busybox syslogd -n -O "$LINKS_SYSLOG" &
    cp -a /etc/ppp "$LAB_DIR/ppp"
    mount --bind "$LAB_DIR/ppp" /etc/ppp
    mount --bind "$LAB_CONFIG" /etc/mh-hook.toml
    links_hooks up
    links_hooks down
    # The ISPs' pppd see the same /etc/ppp, but its hooks are not theirs.
    echo "$LINKS_OPTIONS ip-up-script /bin/true ip-down-script /bin/true" >"$LAB_DIR/isp.options"
    links_wire 0 nodefaultroute
    links_wire 1 defaultroute
    lab_wait ls /run/log
}

# links_hooks up|down: ours as the package has it, before it one that hooks_wait holds, after it one that takes notes.
links_hooks() {
    local dir=/etc/ppp/ip-$1.d
    install -m 0755 "$LAB_REPOSITORY/hooks/ip-$1" "$dir/0mh-hook"
    cat >"$dir/00wait" <<'EOF'
#!/bin/sh
while [ -e /run/lab/wait ]; do sleep 0.1; done
EOF
    cat >"$dir/z-note" <<EOF
#!/bin/sh
echo "$1 \$PPP_IFACE \$PPP_LOCAL" >>$LINKS_EVENTS
EOF
    chmod 0755 "$dir/00wait" "$dir/z-note"
}

# run-parts(8) passes over what is not executable.
hooks_off() { chmod 0644 /etc/ppp/ip-{up,down}.d/0mh-hook; }
hooks_on() { chmod 0755 /etc/ppp/ip-{up,down}.d/0mh-hook; }

hooks_wait() { touch "$LAB_DIR/wait"; }
hooks_go() { rm "$LAB_DIR/wait"; }

# links_wire NUMBER OPTION…: the cable to an ISP, and how pppd is to use it.
links_wire() {
    ip link add "wan$1" netns router type veth peer wan netns "isp$1"
    ip -n router link set "wan$1" up
    ip -n "isp$1" link set wan up
    cat >"/etc/ppp/peers/isp$1" <<EOF
plugin rp-pppoe.so wan$1 rp_pppoe_ac isp$1
unit $1 linkname isp$1
noipdefault ${*:2}
persist maxfail 0 holdoff 1
$LINKS_OPTIONS
EOF
}

# isp_offer ISP ADDRESS: what its customer gets from now on. A session that stands ends, and pppd, by `persist`, redials.
isp_offer() {
    local pid
    if pid=$(cat "$LAB_DIR/$1.pid" 2>/dev/null); then
        kill "$pid"
        wait_end "$pid"
    fi
    lab_customer "$1" "$2"
    in_ns "$1" pppoe-server -F -I wan -C "$1" -L "${2%.*}.1" -R "$2" -N 1 \
        -O "$LAB_DIR/isp.options" -X "$LAB_DIR/$1.pid" &
}

# dial ISP…, all at once: until each link is up and its hooks have run, or stand waiting.
dial() {
    local isp
    rm -f "$LINKS_EVENTS"
    for isp; do
        in_ns router pon "$isp" updetach >"$LAB_DIR/pon.$isp" 2>&1 || fail "pon $isp: $(<"$LAB_DIR/pon.$isp")" &
    done
    for isp; do
        if [[ -e $LAB_DIR/wait ]]; then
            wait_address "ppp${isp#isp}"
        else
            wait_event "up ppp${isp#isp}"
        fi
    done
}

# hang_up ISP…, all at once: until the hooks have run and pppd has ended.
hang_up() {
    local isp
    local -a pids=()
    rm -f "$LINKS_EVENTS"
    for isp; do
        pids+=("$(pppd_pid "$isp")")
        in_ns router poff "$isp"
    done
    for isp; do wait_event "down ppp${isp#isp}"; done
    wait_end "${pids[@]}"
}

kill_pppd() {
    local pid
    pid=$(pppd_pid "$1")
    kill -9 "$pid"
    wait_end "$pid"
}

# The file that `linkname` is for, pppd(8).
pppd_pid() { head -n 1 "/run/ppp-$1.pid"; }

wait_end() {
    local pid
    for pid; do timeout 15 tail --sleep-interval=0.1 --pid="$pid" -f /dev/null; done
}

# wait_address INTERFACE [ADDRESS]
wait_address() { LAB_WAIT=30 lab_wait ip -n router -4 address show dev "$1" ${2:+to "$2"} 2>/dev/null; }

# What ip-up and ip-down were called for since the last dial or hang_up: lines `up|down INTERFACE ADDRESS`.
events() { if [[ -e $LINKS_EVENTS ]]; then cat "$LINKS_EVENTS"; fi; }

# wait_event "up|down INTERFACE [ADDRESS]"
wait_event() {
    local deadline=$((SECONDS + 30))
    until [[ $(events) == *"$1"* ]]; do
        ((SECONDS < deadline)) || fail "no '$1' among the events '$(events)'; the syslog:"$'\n'"$(<"$LINKS_SYSLOG")"
        sleep 0.1
    done
}

# event up|down INTERFACE ADDRESS: Debian's script with the arguments and the environment that pppd gives.
event() {
    local peer=${3%.*}.1
    in_ns router env -i IFNAME="$2" DEVICE="wan${2#ppp}" IPLOCAL="$3" IPREMOTE="$peer" \
        "/etc/ppp/ip-$1" "$2" "wan${2#ppp}" 0 "$3" "$peer"
}

# expect_log FACILITY.LEVEL PATTERN
expect_log() {
    grep -q " $1 $2" "$LINKS_SYSLOG" || fail "no '$1 $2' in the syslog:"$'\n'"$(<"$LINKS_SYSLOG")"
}

# From here on what changes is noted; monitor_seen tells it.
monitor_start() {
    in_ns router stdbuf -oL ip monitor link address route rule >"$LAB_DIR/monitor.ip" &
    in_ns router stdbuf -oL nft monitor >"$LAB_DIR/monitor.nft" &
    sleep 1
}

monitor_seen() {
    sleep 0.5
    cat "$LAB_DIR/monitor.ip" "$LAB_DIR/monitor.nft"
}
