# shellcheck shell=bash
# What the program costs: whole processes beside its tools with ready-made input, and beside other ways to the same
# end. Sourced by tests/bench.
#
# Each call is measured from the same state, beside its limit. All calls take turns, PROCESSES_ROUNDS times, so that a
# busy moment of the machine hits all alike; the table has medians over all runs.

PROCESSES_ROUNDS=${PROCESSES_ROUNDS:-3}
FOREIGN_RULES=10000
# With more forwards than this other ways take minutes.
OTHERS_AT_MOST=1000

# bench_program: what is the same on every backend.
bench_program() {
    local round
    local -a OF=(program start-up)
    local DIR=$LAB_DIR/bench
    bench_new_lab
    mkdir -p "$DIR"
    note program binary mh-hook 1 "$(stat --dereference --format %s "$MH_HOOK" | awk '{ print $1 / 1048576 }')"
    for ((round = 0; round < PROCESSES_ROUNDS; round++)); do
        RUNS=100 timed mh-hook : "$MH_HOOK --version"
        RUNS=100 timed "dash -c :" : "dash -c :"
    done
}

# bench_processes BACKEND FORWARDS…
bench_processes() {
    local BACKEND=$1 FOREIGN=0 FORWARDS DIR=$LAB_DIR/bench
    bench_new_lab
    mkdir -p "$DIR"
    for FORWARDS in "${@:2}"; do
        bench_forwards
    done
    foreign_rules
    FOREIGN=$FOREIGN_RULES FORWARDS=1 bench_forwards
    FOREIGN=0
    for FORWARDS in "${@:2}"; do
        ((FORWARDS > OTHERS_AT_MOST)) || bench_shorewall
    done
}

# bench_forwards: all calls with FORWARDS forwards and FOREIGN rules of others.
bench_forwards() {
    # shellcheck disable=SC2034 # for lab_config and mh_hook; packets.bash has its own
    local LAB_CONFIG RUNS=8 round name
    local -a NAMES=() OF=() limit
    local -A BEFORE=() OURS=() LIMIT=()
    local address="ip address flush dev ppp0; ip address add peer 203.0.113.1/32 dev ppp0"
    local same="$address local 203.0.113.10" other="$address local 203.0.113.99"
    local mh="$MH_HOOK -q --config $DIR/one.toml"
    local down="$same; $mh down ppp0" up="$same; $mh up ppp0"
    configuration "$FORWARDS" >"$DIR/one.toml"
    configuration "$FORWARDS" 8080 >"$DIR/changed.toml"

    call "first up" "$down" one plan up ppp0
    call "up, nothing to do" "$up" one look up ppp0
    call "one forward changed" "$up" changed chains up ppp0
    call "new address" "$up; $other" one plan up ppp0
    call "down" "$up" one plan down ppp0
    call "sync, nothing to do" "$up" one look sync

    ((FORWARDS > 1000)) || RUNS=10
    ((FORWARDS > 100 || FOREIGN)) || RUNS=20
    for ((round = 0; round < PROCESSES_ROUNDS; round++)); do
        for name in "${NAMES[@]}"; do
            OF=(calls "$BACKEND" "$FOREIGN" "$FORWARDS" "$name")
            timed mh-hook "${BEFORE[$name]}" "${OURS[$name]}"
            mapfile -t limit <<<"${LIMIT[$name]}"
            timed limit "${BEFORE[$name]}" "${limit[@]}"
        done
    done

    before "$down"
    ((FORWARDS > OTHERS_AT_MOST)) || typed_recipe
}

## Calls

# configuration FORWARDS [PORT OF THE LAST ONE'S TARGET]
configuration() {
    local i
    printf '%s\n' '[lan]' 'interfaces = ["eth1"]' 'networks = ["192.168.0.0/24"]' '' \
        '[uplink.isp0]' 'interface = "ppp0"' 'table = 10' 'forward = ['
    for ((i = 1; i < $1; i++)); do
        echo "  { port = $((20000 + i)), to = \"192.168.0.$((2 + i % 250))\" },"
    done
    printf '%s\n' "  { port = 80, to = \"192.168.0.2:${2-80}\" }," ']'
}

# call NAME BEFORE CONFIGURATION plan|chains|look ARGUMENT…: a call to measure, from the state that the script BEFORE
# leaves. Its limit is what its tools take for the same plan, or to put all our chains of nat anew, or to look at what
# stands. Both are tried once: they must do what they are measured for.
call() {
    local stem=$DIR/${#NAMES[@]} line
    LAB_CONFIG=$DIR/$3.toml
    NAMES+=("$1")
    BEFORE[$1]=$2
    OURS[$1]="$MH_HOOK -q --config $LAB_CONFIG ${*:5}"

    before "$2"
    rm -f "$stem".*
    mh_hook --dry-run "${@:5}" >"$stem.plan"
    case $4-$(head -n 1 "$stem.plan") in
        look-"$NOTHING") ;;
        look-* | *-"$NOTHING") lab_die "$1: the plan is $(cat "$stem.plan")" ;;
    esac
    LIMIT[$1]=$("limit_$4" "$stem")

    # shellcheck disable=SC2086 # a command and its arguments
    note calls "$BACKEND" "$FOREIGN" "$FORWARDS" "$1" processes 1 "$(processes ${OURS[$1]})"
    done_by "$1" "${@:5}"
    before "$2"
    note calls "$BACKEND" "$FOREIGN" "$FORWARDS" "$1" memory 1 "$(peak_memory "${OURS[$1]}")"
    [[ $4 != chains ]] || chains_as_they_stand >"$stem.restore"
    before "$2"
    while read -r line; do
        # shellcheck disable=SC2086 # a command and its arguments
        in_ns router $line >/dev/null
    done <<<"${LIMIT[$1]}"
    # Kernel parameters are no tool's to set.
    { grep '^echo ' "$stem.plan" || true; } | in_ns router sh -e
    done_by "$1, limit" "${@:5}"
}

NOTHING="# nothing to change"

# done_by WHAT ARGUMENT…: that nothing is left to do for the call with these arguments.
done_by() {
    local left
    left=$(mh_hook --dry-run "${@:2}")
    [[ $left == "$NOTHING" ]] || lab_die "$1, $FORWARDS forwards: left to do: $left"
}

# before SCRIPT: makes the state that a measurement begins with.
before() {
    printf '#!/bin/sh -e\nexec >/dev/null 2>&1\n%s\n' "$1" >"$DIR/before"
    chmod +x "$DIR/before"
    in_ns router "$DIR/before" || lab_die "failed: $1"
}

limit_look() { printf '%s\n' /usr/sbin/iptables-save "ip rule"; }

# limit_plan STEM: ready-made input of what STEM.plan says.
limit_plan() {
    sed -n 's/^ip //p' "$1.plan" >"$1.batch"
    sed -n "s/^iptables -t //; s/'/\"/g; /^[a-z]* -/p" "$1.plan" | awk '
        $1 != table { if (table) print "COMMIT"; table = $1; print "*" table }
        { sub(/^[a-z]+ /, ""); if ($1 == "-N") print ":" $2 " - [0:0]"; else print }
        END { if (table) print "COMMIT" }' >"$1.restore"
    [[ ! -s $1.batch ]] || echo "ip -4 -force -batch $1.batch"
    [[ ! -s $1.restore ]] || limit_chains "$1"
}

limit_chains() { echo "/usr/sbin/iptables-restore --noflush --wait 9 $1.restore"; }

# chains_as_they_stand: ready-made input that flushes our chains of nat, and puts their entries anew.
chains_as_they_stand() {
    echo '*nat'
    in_ns router /usr/sbin/iptables-save --table nat | grep -E '^(:|-A )mh-'
    echo COMMIT
}

foreign_rules() {
    {
        printf '%s\n' '*filter' ':theirs - [0:0]'
        seq -f '-A theirs -s 10.0.0.0/8 -p tcp -m tcp --dport %.0f -j DROP' "$FOREIGN_RULES"
        echo COMMIT
    } | in_ns router /usr/sbin/iptables-restore --noflush
}

## Other ways

# The recipe as people type it, with a check ahead of each command.
typed_recipe() {
    local flush="iptables -t nat -F; iptables -t mangle -F; ip rule flush table 10; ip route flush table 10 || :"
    local -a OF=(calls "$BACKEND" "$FOREIGN" "$FORWARDS" "first up")
    typed_commands >"$DIR/typed"
    RUNS=$((FORWARDS > 100 ? 2 : 5)) timed "typed recipe" "$flush" "sh $DIR/typed"
    destinations_are "$FORWARDS"
    before "$flush"
}

typed_commands() {
    local i
    entry() { echo "iptables -t $1 -C $2 2>/dev/null || iptables -t $1 -A $2"; }
    rule() { echo "ip rule list | grep -q '$1' || ip rule add $2"; }
    echo "ip route show table 10 2>/dev/null | grep -q default || ip route add default dev ppp0 table 10"
    rule "from 203.0.113.10 lookup 10" "from 203.0.113.10 table 10 pref 100"
    entry nat "POSTROUTING -s 192.168.0.0/24 -o ppp0 -j MASQUERADE"
    entry mangle "PREROUTING -j CONNMARK --restore-mark"
    entry mangle "PREROUTING -i ppp0 -j MARK --set-mark 10"
    entry mangle "PREROUTING -j CONNMARK --save-mark"
    rule "fwmark 0xa" "iif eth1 fwmark 10 table 10 pref 99"
    entry nat "PREROUTING -p tcp -i ppp0 --dport 80 -j DNAT --to 192.168.0.2:80"
    for ((i = 1; i < FORWARDS; i++)); do
        entry nat "PREROUTING -p tcp -i ppp0 --dport $((20000 + i)) -j DNAT --to 192.168.0.$((2 + i % 250))"
    done
}

# destinations_are NUMBER: at how many ports the destination is translated.
destinations_are() {
    local found
    found=$(in_ns router /usr/sbin/iptables-save --table nat | sed -n 's/.* --dport \([0-9]*\) .*-j DNAT .*/\1/p' |
        sort -u | wc -l)
    ((found == $1)) || lab_die "$found forwards instead of $1"
}

# Shorewall's reload for one forward changed: the same forwards at the same link, and its own way of bringing the
# replies back, in a lab of its own, where it is installed.
bench_shorewall() {
    # Its command alone is another package's, shorewall-core.
    [[ -d /etc/shorewall && -x $(type -P shorewall) ]] || return 0
    local port
    local -a OF=(calls "$BACKEND" 0 "$FORWARDS" "one forward changed")
    bench_new_lab
    shorewall_configuration
    in_ns router shorewall start >"$DIR/shorewall.log" 2>&1 || lab_die "$(cat "$DIR/shorewall.log")"
    # The last forward leads to either port in turn.
    RUNS=$((FORWARDS > 100 ? 3 : 5)) timed "shorewall reload" \
        "sed -i 's/2:80 /2:81 /; t; s/2:81 /2:80 /' /etc/shorewall/rules" "shorewall reload"
    destinations_are "$FORWARDS"
    port=$(sed -n 's/.*2:\(8[01]\) .*/\1/p' /etc/shorewall/rules)
    in_ns router /usr/sbin/iptables-save --table nat | grep -e " 192\.168\.0\.2:$port\$" >/dev/null ||
        lab_die "shorewall reload has left the forward as it was"
}

shorewall_configuration() {
    local folder i
    for folder in /etc/shorewall /var/lib/shorewall; do
        # Empty ones, in the lab's own mounts: the machine's stay as they are.
        mount -t tmpfs tmpfs "$folder" || lab_die "no room for Shorewall in $folder"
    done
    # Nothing outside the lab: no names of tables in /etc, no log.
    sed 's/^\(STARTUP_ENABLED\|KEEP_RT_TABLES\|CLAMPMSS\)=.*/\1=Yes/
        s/^\(ROUTE_FILTER\|LOG_MARTIANS\)=.*/\1=No/
        s/^STARTUP_LOG=.*/STARTUP_LOG=/' /usr/share/shorewall/configfiles/shorewall.conf >/etc/shorewall/shorewall.conf
    shorewall_file params
    shorewall_file conntrack
    # No modules to load.
    shorewall_file helpers
    shorewall_file zones 'fw firewall' 'net ipv4' 'loc ipv4'
    shorewall_file interfaces '?FORMAT 2' 'net ppp0' 'net ppp1' 'loc eth1'
    # shellcheck disable=SC2016 # Shorewall's variable
    shorewall_file policy 'loc net ACCEPT' '$FW all ACCEPT' 'net all DROP' 'all all REJECT'
    shorewall_file providers 'isp0 10 10 - ppp0 - track,fallback' 'isp1 11 11 - ppp1 - track,balance'
    shorewall_file snat 'MASQUERADE 192.168.0.0/24 ppp0' 'MASQUERADE 192.168.0.0/24 ppp1'
    for ((i = 1; i < FORWARDS; i++)); do
        echo "DNAT net:ppp0 loc:192.168.0.$((2 + i % 250)) tcp $((20000 + i))"
    done >/etc/shorewall/rules
    echo "DNAT net:ppp0 loc:192.168.0.2:80 tcp 80" >>/etc/shorewall/rules
}

# shorewall_file NAME LINE…
shorewall_file() { printf '%s\n' "${@:2}" >"/etc/shorewall/$1"; }

## Measuring

# timed SIDE BEFORE COMMAND…: each command's times in ms, from the state that the script BEFORE leaves, as results of
# that side of OF. A command that fails ends the bench.
timed() {
    local line
    before "$2"
    in_ns router hyperfine --shell=none --style=none --warmup 3 --runs "$RUNS" --prepare "$DIR/before" \
        --export-json "$DIR/times" "${@:3}" >/dev/null 2>"$DIR/hyperfine.log" ||
        lab_die "${OF[*]}, $1: $(cat "$DIR/hyperfine.log")"
    while read -r line; do
        note "${OF[@]}" "$1" "$line"
    done < <(/usr/bin/python3 - "$DIR/times" <<'END'
import json, sys
for number, result in enumerate(json.load(open(sys.argv[1]))["results"], 1):
    print(number, *(1000 * time for time in result["times"]), sep="\t")
END
    )
}

# peak_memory COMMAND: the most that the process itself has had, in MiB.
peak_memory() {
    # shellcheck disable=SC2086 # a command and its arguments
    in_ns router /usr/bin/python3 - $1 <<'END'
import re, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
peak = 0
while process.poll() is None:
    found = re.search(r"VmHWM:\s+(\d+)", open(f"/proc/{process.pid}/status").read())
    peak = max(peak, int(found.group(1)) if found else 0)
if process.returncode:
    sys.exit(f"{sys.argv[1:]}: exit status {process.returncode}")
print(peak / 1024)
END
}
