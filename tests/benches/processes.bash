# shellcheck shell=bash
# What the program costs: whole processes beside the tools with ready-made input. Sourced by tests/bench.

# At more forwards than this the typed recipe takes minutes.
TYPED_AT_MOST=1000

## Configurations, and ready-made input

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

# ready_made NAME COMMAND…: what the command would do, as NAME.batch for ip and NAME.restore for iptables-restore.
ready_made() {
    local plan=$DIR/$1.plan
    mh_hook --dry-run "${@:2}" >"$plan"
    sed -n 's/^ip //p' "$plan" >"$DIR/$1.batch"
    sed -n "s/^iptables -t //; s/'/\"/g; /^[a-z]* -/p" "$plan" | awk '
        $1 != table { if (table) print "COMMIT"; table = $1; print "*" table }
        { sub(/^[a-z]+ /, ""); if ($1 == "-N") print ":" $2 " - [0:0]"; else print }
        END { if (table) print "COMMIT" }' >"$DIR/$1.restore"
}

# typed FORWARDS: the recipe as people type it, with a check ahead of each command.
typed() {
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
    for ((i = 1; i < $1; i++)); do
        entry nat "PREROUTING -p tcp -i ppp0 --dport $((20000 + i)) -j DNAT --to 192.168.0.$((2 + i % 250))"
    done
}

## Measuring

# result NAME VALUE
result() { note processes "$BACKEND" "$FORWARDS" "$1" "$2"; }

# measure NAME PREPARE COMMAND…: the median in ms, each run after PREPARE, a script; of several commands the sum.
measure() {
    local name=$1
    printf '#!/bin/sh\nexec >/dev/null 2>&1\n%s\n:\n' "$2" >"$DIR/prepare"
    chmod +x "$DIR/prepare"
    in_ns router hyperfine --shell=none --style=none --warmup 1 --runs "$RUNS" --prepare "$DIR/prepare" \
        --export-json "$DIR/result.json" "${@:3}" >/dev/null 2>"$DIR/hyperfine.log" ||
        lab_die "$name: $(cat "$DIR/hyperfine.log")"
    result "$name" "$(/usr/bin/python3 -c '
import json, sys
print(1000 * sum(r["median"] for r in json.load(open(sys.argv[1]))["results"]))' "$DIR/result.json")"
}

# limit NAME PREPARE: the tools alone, with the ready-made input of that name.
limit() {
    local -a commands=()
    [[ ! -s $DIR/$1.batch ]] || commands+=("ip -4 -force -batch '$DIR/$1.batch'")
    [[ ! -s $DIR/$1.restore ]] || commands+=("/usr/sbin/iptables-restore --noflush --wait 9 '$DIR/$1.restore'")
    measure "$1: limit" "$2" "${commands[@]}"
}

bench_forwards() {
    local mh="$MH_HOOK -q --config $DIR/one.toml" changed="$MH_HOOK -q --config $DIR/changed.toml"
    local other="ip address flush dev ppp0; ip address add 203.0.113.99 peer 203.0.113.1/32 dev ppp0"
    local same="ip address flush dev ppp0; ip address add 203.0.113.10 peer 203.0.113.1/32 dev ppp0"
    local down="$same; $mh down ppp0" up="$same; $mh up ppp0"
    local flush="iptables -t nat -F; iptables -t mangle -F; ip rule flush table 10; ip route flush table 10"
    configuration "$FORWARDS" >"$DIR/one.toml"
    configuration "$FORWARDS" 8080 >"$DIR/changed.toml"
    LAB_CONFIG=$DIR/one.toml
    ready_made "first up" up ppp0
    mh_hook -q up ppp0
    LAB_CONFIG=$DIR/changed.toml ready_made "one forward changed" up ppp0
    ready_made "down" down ppp0
    in_ns router sh -c "$other"
    ready_made "new address" up ppp0
    in_ns router sh -c "$same"

    measure "first up" "$down" "$mh up ppp0"
    limit "first up" "$down"
    measure "up, nothing to do" "$up" "$mh up ppp0"
    measure "up, nothing to do: limit" "$up" "/usr/sbin/iptables-save" "ip rule"
    measure "one forward changed" "$up" "$changed up ppp0"
    limit "one forward changed" "$up"
    measure "new address" "$up; $other" "$mh up ppp0"
    limit "new address" "$up; $other"
    measure "down" "$up" "$mh down ppp0"
    limit "down" "$up"
    measure "sync, nothing to do" "$up" "$mh sync"
    measure "sync, nothing to do: limit" "$up" "/usr/sbin/iptables-save" "ip rule"
    in_ns router sh -c "$down"
    if ((FORWARDS <= TYPED_AT_MOST)); then
        typed "$FORWARDS" >"$DIR/typed"
        RUNS=$((FORWARDS > 100 ? 2 : 5)) measure "typed recipe" "$flush" "sh $DIR/typed"
        in_ns router sh -c "$flush"
    fi
}

# The most memory that mh-hook itself has had, in MiB.
peak_memory() {
    in_ns router /usr/bin/python3 - "$MH_HOOK" "$DIR/one.toml" <<'END'
import re, subprocess, sys
process = subprocess.Popen([sys.argv[1], "-q", "--config", sys.argv[2], "up", "ppp0"])
peak = 0
while process.poll() is None:
    status = open(f"/proc/{process.pid}/status").read()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    peak = max(peak, int(found.group(1)) if found else 0)
print(peak / 1024)
END
}

foreign_rules() {
    {
        printf '%s\n' '*filter' ':theirs - [0:0]'
        seq -f '-A theirs -s 10.0.0.0/8 -p tcp -m tcp --dport %.0f -j DROP' 10000
        echo COMMIT
    } >"$DIR/foreign"
    in_ns router /usr/sbin/iptables-restore --noflush "$DIR/foreign"
}


# bench_processes BACKEND FORWARDS…
bench_processes() {
    local -a numbers=("${@:2}")
    DIR=$LAB_DIR/bench
    mkdir -p "$DIR"
    if [[ ! -e /run/netns/router ]]; then lab_net; lab_links; fi
    BACKEND=$1
    for FORWARDS in "${numbers[@]}"; do
        RUNS=$((FORWARDS > 1000 ? 5 : FORWARDS > 100 ? 15 : 40))
        bench_forwards
    done
    result "peak memory" "$(peak_memory)"
    mh_hook -q down ppp0
    foreign_rules
    BACKEND="$1, 10,000 foreign rules" FORWARDS=1 RUNS=10
    bench_forwards
    in_ns router /usr/sbin/iptables -F
    in_ns router /usr/sbin/iptables -X
}
