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
    local event
    busybox syslogd -n -O "$LINKS_SYSLOG" &
    cp -a /etc/ppp "$LAB_DIR/ppp"
    mount --bind "$LAB_DIR/ppp" /etc/ppp
    mount --bind "$LAB_CONFIG" /etc/mh-hook.toml
    for event in "${LINKS_HOOKS[@]}"; do links_hooks "$event"; done
    # The ISPs' pppd must not run them: ip-netns(8) gives each of them an /etc/ppp of its own, with nothing in it.
    mkdir -p /etc/netns/isp{0,1}/ppp
    echo "$LINKS_OPTIONS" >"$LAB_DIR/isp.options"
    links_wire 0 nodefaultroute
    links_wire 1 defaultroute
    lab_wait ls /run/log
}

LINKS_HOOKS=(pre-up up down)

# links_hooks pre-up|up|down: ours as the package has it, ahead of it and behind it one that hooks_wait holds, and last
# one that takes notes.
links_hooks() {
    local dir=/etc/ppp/ip-$1.d place
    local -A hook=([ahead]=00wait [behind]=1wait)
    install -m 0755 "$LAB_REPOSITORY/hooks/ip-$1" "$dir/0mh-hook"
    for place in "${!hook[@]}"; do
        cat >"$dir/${hook[$place]}" <<EOF
#!/bin/sh
[ ! -e $LAB_DIR/wait.$1.$place ] || echo "held $1 \$LINKNAME" >>$LINKS_EVENTS
while [ -e $LAB_DIR/wait.$1.$place ]; do sleep 0.1; done
EOF
    done
    cat >"$dir/z-note" <<EOF
#!/bin/sh
echo "$1 \$LINKNAME \$PPP_LOCAL \$PPP_IFACE" >>$LINKS_EVENTS
EOF
    chmod 0755 "$dir/00wait" "$dir/1wait" "$dir/z-note"
}

# hooks_off, hooks_on [pre-up|up|down]…: run-parts(8) passes over what is not executable.
# shellcheck disable=SC2120 # arguments are for those who want some
hooks_off() { hooks_mode 0644 "$@"; }
# shellcheck disable=SC2120
hooks_on() { hooks_mode 0755 "$@"; }
hooks_mode() {
    local event
    (($# > 1)) || set -- "$1" "${LINKS_HOOKS[@]}"
    for event in "${@:2}"; do chmod "$1" "/etc/ppp/ip-$event.d/0mh-hook"; done
}

# hooks_wait ahead|behind pre-up|up|down: such a call stands still before or after our hook, until hooks_go.
hooks_wait() { touch "$LAB_DIR/wait.$2.$1"; }
hooks_go() { rm "$LAB_DIR"/wait.*; }
is_held() { compgen -G "$LAB_DIR/wait.$1.*" >/dev/null; }

# links_wire NUMBER OPTION…: the cable to an ISP, and how pppd is to use it.
links_wire() {
    ip link add "wan$1" netns router type veth peer wan netns "isp$1"
    ip -n router link set "wan$1" up
    ip -n "isp$1" link set wan up
    cat >"/etc/ppp/peers/isp$1" <<EOF
plugin rp-pppoe.so wan$1 rp_pppoe_ac isp$1
unit $1
linkname isp$1 ipparam line$1
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

# Without `unit` each pppd takes the first that is free: who dials first has ppp0.
links_in_order_of_dialling() { sed -i '/^unit /d' /etc/ppp/peers/isp[01]; }

# dial ISP…, all at once: until each link is up and its hooks have run, or stand waiting.
dial() {
    local isp
    rm -f "$LINKS_EVENTS"
    for isp; do
        on_router pon "$isp" updetach >"$LAB_DIR/pon.$isp" 2>&1 || fail "pon $isp: $(<"$LAB_DIR/pon.$isp")" &
    done
    for isp; do
        if is_held pre-up; then
            wait_event "held pre-up $isp"
        elif is_held up; then
            wait_event "held up $isp"
        else
            wait_event "up $isp"
        fi
    done
    is_held pre-up || wait_followed
}

# hang_up ISP…, all at once: until the hooks have run, or stand waiting, and pppd has ended.
hang_up() {
    local isp
    local -a pids=()
    rm -f "$LINKS_EVENTS"
    for isp; do
        pids+=("$(pppd_pid "$isp")")
        on_router poff "$isp"
    done
    for isp; do is_held down || wait_event "down $isp"; done
    wait_end "${pids[@]}"
}

kill_pppd() {
    local pid
    pid=$(pppd_pid "$1")
    kill -9 "$pid"
    wait_end "$pid"
}

# The file that `linkname` is for, pppd(8): the process, and on its second line the interface.
pppd_pid() { sed -n 1p "/run/ppp-$1.pid"; }
interface_of() { sed -n 2p "/run/ppp-$1.pid" 2>/dev/null; }

wait_end() {
    local pid
    for pid; do lab_wait has_ended "$pid"; done
}
has_ended() { [[ -e /proc/$1 ]] || echo yes; }

# wait_up ISP [ADDRESS]: until its link carries traffic, and has that address.
wait_up() { lab_wait addresses_up "$1" ${2:+to "$2"}; }
addresses_up() { ip -n router -4 address show dev "$(interface_of "$1")" up "${@:2}" 2>/dev/null; }

# Until no mh-hook is left that ip-pre-up's started: its look at the link might mend what a test breaks.
wait_followed() {
    local deadline=$((SECONDS + LAB_WAIT))
    while pgrep --full 'event follow' >/dev/null; do
        ((SECONDS < deadline)) || fail "it does not end: $(pgrep --full --list-full 'event follow')"
        sleep 0.1
    done
}

# What pppd has called since the last dial or hang_up: lines `[held] pre-up|up|down ISP [ADDRESS INTERFACE]`.
events() { if [[ -e $LINKS_EVENTS ]]; then cat "$LINKS_EVENTS"; fi; }

# wait_event LINE, or its beginning
wait_event() {
    local deadline=$((SECONDS + LAB_WAIT))
    until has_event "$1"; do
        ((SECONDS < deadline)) || fail "no '$1' among the events '$(events)'"
        sleep 0.1
    done
}

has_event() { [[ $'\n'$(events) == *$'\n'"$1"* ]]; }

# event up|down INTERFACE ADDRESS: Debian's script with the arguments and the environment that pppd gives.
event() {
    local peer=${3%.*}.1
    in_ns router env -i IFNAME="$2" DEVICE="wan${2#ppp}" IPLOCAL="$3" IPREMOTE="$peer" \
        "/etc/ppp/ip-$1" "$2" "wan${2#ppp}" 0 "$3" "$peer"
}

# expect_log FACILITY.LEVEL PATTERN
expect_log() {
    grep -q " $1 $2" "$LINKS_SYSLOG" || fail "no '$1 $2' in the syslog"
}

# fail MESSAGE…: as everywhere, and with what pppd and mh-hook said.
fail() {
    echo "failed: $*" >&2
    lab_show >&2
    echo "--- syslog, without each connection's end" >&2
    grep -v ': conntrack -D' "$LINKS_SYSLOG" >&2
    return 1
}
