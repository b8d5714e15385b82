# shellcheck shell=bash
# The lab: a router with two links, its LAN, two ISPs and a client, each in a network namespace of its own.
# Source this file, then lab_isolate; nothing in here touches the machine it runs on.
#
#                                                                          ┌─ server  192.168.0.2
#            ┌─ isp0 ── ppp0 203.0.113.10  ─┐                              │
#   client ──┤                              ├── router ── eth1 ─── lan ────┤
#            └─ isp1 ── ppp1 198.51.100.20 ─┘          192.168.0.1         │
#   192.0.2.9                (default route)                               └─ lanhost 192.168.0.3
#   192.0.2.77
#
# lab_net builds everything but the links, lab_links plugs in ppp0 and ppp1, lab_serve starts the services.

LAB_REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LAB_NAMESPACES=(router isp0 isp1 client lan server lanhost)
# For how many seconds the lab waits for what is to come: no more than a guard, much longer than a busy machine takes.
LAB_WAIT=${LAB_WAIT:-60}

lab_die() {
    echo "lab: $*" >&2
    exit 2
}

in_ns() { ip netns exec "$@"; }

# A shell that su(1) started has no folders of administration in its PATH.
PATH=$PATH:/usr/sbin:/sbin

lab_need_root() {
    ((EUID == 0)) || lab_die "needs root, for network namespaces: sudo env PATH=\"\$PATH\" $0"
}

# What the lab itself needs.
# shellcheck disable=SC2034 # tests/run and the demo install them
LAB_PACKAGES=(bsdutils conntrack diffutils iproute2 iptables nftables procps python3-jsonschema python3-prometheus-client socat util-linux)

# lab_install PACKAGE…: those of them that are missing.
lab_install() {
    local package
    local -a missing=()
    for package; do
        [[ $(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
            missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    lab_need_root
    apt-get update --quiet=2
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends "${missing[@]}"
}

## The room: private namespaces and folders, gone with the script

# Restarts the calling script where it can do no harm. --kill-child: kill -9 of the script ends its every process.
lab_isolate() {
    local outside
    outside=$(readlink /proc/self/ns/net)
    if [[ ${LAB_OUTSIDE:-$outside} == "$outside" ]]; then
        lab_need_root
        export LAB_OUTSIDE=$outside
        exec unshare --mount --net --pid --fork --kill-child --mount-proc -- "$BASH" "$0" "$@"
    fi
    unset LAB_OUTSIDE
    # Init of a PID namespace ignores signals that it does not handle: pid_namespaces(7).
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # /run holds ip netns' names and the locks of iptables-legacy and mh-hook.
    mount -t tmpfs -o mode=0755 tmpfs /run
    # A log that others read is none of the lab's business; without it mh-hook speaks on stderr.
    if [[ -e /dev/log ]]; then mount --bind /dev/null /dev/log; fi
    LAB_DIR=/run/lab
    LAB_CONFIG=$LAB_DIR/mh-hook.toml
    mkdir -m 0755 /run/lock "$LAB_DIR"
}

# lab_backend nft|legacy: which one /usr/sbin/iptables and its kin are, by way of /etc/alternatives.
lab_backend() {
    local alternatives=$LAB_DIR/alternatives name
    if [[ ! -d $alternatives ]]; then
        cp -a /etc/alternatives "$alternatives"
        mount --bind "$alternatives" /etc/alternatives
    fi
    for name in {iptables,ip6tables}{,-save,-restore}; do
        ln -sfn "/usr/sbin/${name/tables/tables-$1}" "/etc/alternatives/$name"
    done
    case $1-$(/usr/sbin/iptables -V) in
        nft-*nf_tables* | legacy-*legacy*) ;;
        *) lab_die "/usr/sbin/iptables is not $1: $(/usr/sbin/iptables -V)" ;;
    esac
}

## The layout

lab_net() {
    local namespace
    [[ -n ${LAB_DIR-} ]] || lab_die "lab_isolate comes first"
    for namespace in "${LAB_NAMESPACES[@]}"; do
        ip netns add "$namespace"
        # Before any interface: `default` is what a new one takes over.
        lab_sysctl "$namespace" net.ipv4.conf.{all,default}.rp_filter=0 net.ipv6.conf.{all,default}.disable_ipv6=1
        ip -n "$namespace" link set lo up
    done
    for namespace in router isp0 isp1; do
        lab_sysctl "$namespace" net.ipv4.ip_forward=1
    done

    ip -n client -batch - <<EOF
address add 192.0.2.9/32 dev lo
address add 192.0.2.77/32 dev lo
EOF
    lab_isp isp0 203.0.113.0/24
    lab_isp isp1 198.51.100.0/24

    ip -n lan link add br0 type bridge
    ip -n lan link set br0 up
    lab_port router eth1 192.168.0.1/24
    lab_port server eth0 192.168.0.2/24
    lab_port lanhost eth0 192.168.0.3/24
    ip -n server route add default via 192.168.0.1
    ip -n lanhost route add default via 192.168.0.1
}

# lab_sysctl NAMESPACE KEY=VALUE…; keys that the kernel does not have, such as those of a missing IPv6, are left out.
lab_sysctl() {
    in_ns "$1" sysctl --quiet --ignore --write "${@:2}"
}

# lab_wire NAMESPACE INTERFACE NAMESPACE INTERFACE: a cable without ARP, as a PPP link is.
lab_wire() {
    # Without ARP a frame goes to the sender's own address, so both ends share one.
    local ethernet='address 02:00:00:00:00:01 arp off'
    ip -batch - <<EOF
link add $2 netns $1 $ethernet type veth peer $4 netns $3 $ethernet
EOF
    ip -n "$1" link set "$2" up
    ip -n "$3" link set "$4" up
}

# lab_isp ISP PREFIX: the ISP, and the client's way to the prefix of its customers.
lab_isp() {
    lab_wire "$1" client client "$1"
    ip -n "$1" route add 192.0.2.0/24 dev client
    ip -n client route add "$2" dev "$1" src 192.0.2.9
    lab_customer "$1"
}

# lab_customer ISP [ADDRESS]: the one source that the ISP lets pass from its customer, BCP 38. Counters start anew.
lab_customer() {
    in_ns "$1" /usr/sbin/iptables-restore <<EOF
*filter
${2:+-A FORWARD -s $2 -m comment --comment customer -j ACCEPT}
-A FORWARD ! -i client -m comment --comment foreign -j DROP
COMMIT
EOF
}

# isp_packets ISP customer|foreign: how many packets came from the customer with its own source, or were dropped.
isp_packets() {
    in_ns "$1" /usr/sbin/iptables-save --counters --table filter |
        awk -F '\\[|:' -v of="--comment $2 " 'index($0, of) { packets = $2 } END { print packets + 0 }'
}

# isp_zero: both ISPs count from here.
isp_zero() {
    in_ns isp0 /usr/sbin/iptables --zero
    in_ns isp1 /usr/sbin/iptables --zero
}

# lab_port NAMESPACE INTERFACE ADDRESS: a port of the LAN's switch.
lab_port() {
    ip link add "$2" netns "$1" type veth peer "$1" netns lan
    ip -n lan link set "$1" master br0 up
    ip -n "$1" address add "$3" dev "$2"
    ip -n "$1" link set "$2" up
}

## The links, as pppd sets them up: an address, the peer's address, and for ppp1 `defaultroute`

lab_links() {
    lab_link_up ppp0 203.0.113.10
    lab_link_up ppp1 198.51.100.20
}

# lab_link_up IF ADDRESS, where the link is down or missing.
lab_link_up() {
    local isp=isp${1#ppp} peer=203.0.113.1
    [[ $1 == ppp0 ]] || peer=198.51.100.1
    if [[ ! $(ip -n router link show "$1" 2>/dev/null) ]]; then
        lab_wire router "$1" "$isp" customer
    fi
    ip -n router address add "$2" peer "$peer/32" dev "$1"
    ip -n router link set "$1" up
    ip -n "$isp" address flush dev customer
    ip -n "$isp" address add "$peer" peer "$2/32" dev customer
    lab_customer "$isp" "$2"
    [[ $1 == ppp0 ]] || ip -n router route add default dev "$1"
}

lab_link_down() {
    ip -n router address flush dev "$1"
    ip -n router link set "$1" down
}

lab_link_delete() {
    ip -n router link delete "$1"
}

## The services: each answers a line with its name, the peer's address as it sees it, and the line

lab_serve() {
    cat >"$LAB_DIR/answer" <<'EOF'
#!/bin/sh
read -r line
echo "$1 $SOCAT_PEERADDR $line"
EOF
    chmod 0755 "$LAB_DIR/answer"
    lab_listen server tcp 22 80
    lab_listen server udp 27015 27022 27030 27031
    lab_listen router tcp 8080
    lab_listen client tcp 80
}

# lab_listen NAMESPACE tcp|udp PORT…; returns when the ports are open.
lab_listen() {
    local namespace=$1 proto=$2 port
    local -A listen=([tcp]=TCP4-LISTEN [udp]=UDP4-RECVFROM)
    for port in "${@:3}"; do
        lab_answer "$namespace" "${listen[$proto]}:$port,fork,reuseaddr" "$LAB_DIR/answer $namespace"
    done
    for port in "${@:3}"; do
        lab_wait in_ns "$namespace" ss -Hln "--$proto" "sport = :$port"
    done
}

# lab_answer NAMESPACE ADDRESS COMMAND: in the background, by socat. Once a question has ended it would wait for the
# command's answer for half a second only.
lab_answer() {
    in_ns "$1" socat -t "$LAB_WAIT" "$2" "EXEC:$3" &
}

# lab_wait COMMAND…: until it prints something.
lab_wait() {
    local deadline=$((SECONDS + LAB_WAIT))
    until [[ $("$@") ]]; do
        ((SECONDS < deadline)) || lab_die "waited in vain for: $*"
        sleep 0.02
    done
}

## Questions

# lab_ask SECONDS NAMESPACE ADDRESS LINE: the first line that comes back from socat's address in so many seconds. They
# count from when the line has left, however late a busy machine starts what sends it; for TCP the connection has as many.
lab_ask() {
    local address=$3 answer='' asker answers
    case $address in
        TCP4:*) address+=,connect-timeout=$1 ;;
        # Such a socket hears no more once it has been shut down.
        *) address+=,shut-none ;;
    esac
    exec {answers}< <(exec ip netns exec "$2" socat -t "$1" - "$address" <<<"$4" 2>/dev/null)
    asker=$!
    read -r answer <&"$answers" || true
    # The next one may want the same port, or count packets: TCP ends by itself, and UDP has no end.
    if [[ $answer && $address == TCP4:* ]]; then cat <&"$answers" >/dev/null; else kill "$asker" 2>/dev/null || true; fi
    exec {answers}<&-
    wait "$asker" 2>/dev/null || true
    echo "$answer"
}

# ask NAMESPACE tcp|udp ADDRESS PORT [--source ADDRESS[:PORT]]: prints the answer; fails when none comes in time.
ask() {
    local to=${2^^}4:$3:$4 line=$SRANDOM answer
    if [[ ${5-} == --source ]]; then to+=,bind=$6; fi
    answer=$(lab_ask "${LAB_PATIENCE:-1}" "$1" "$to" "$line")
    [[ $answer == *" $line" ]] || return 1
    echo "$answer"
}

# expect_answer "NAME PEER" followed by the arguments of ask: who must answer, and what peer it must have seen.
expect_answer() {
    local answer
    answer=$(LAB_PATIENCE=$LAB_WAIT ask "${@:2}") || { fail "no answer: ask ${*:2}"; return 1; }
    [[ ${answer% *} == "$1" ]] || fail "expected an answer from '$1', got '$answer': ask ${*:2}"
}

expect_silence() {
    local answer
    ! answer=$(ask "$@") || fail "expected no answer, got '$answer': ask $*"
}

# some_packets ISP customer|foreign: how many, once there are any. A busy kernel may still have them under way.
some_packets() {
    local packets=0 deadline=$((SECONDS + LAB_WAIT))
    while packets=$(isp_packets "$@"); ((packets == 0 && SECONDS < deadline)); do sleep 0.1; done
    echo "$packets"
}

# expect_packets ISP customer|foreign some|none: since isp_zero, or since the link came up.
expect_packets() {
    local packets
    case $3 in
        none)
            packets=$(isp_packets "$1" "$2")
            ((packets == 0)) || fail "expected no $2 packets at $1, but it counted $packets"
            ;;
        some)
            packets=$(some_packets "$1" "$2")
            ((packets > 0)) || fail "expected $2 packets at $1, but it counted none"
            ;;
    esac
}

# expect_equal WHAT EXPECTED FOUND
expect_equal() {
    [[ $2 == "$3" ]] || fail "$1:"$'\n'"$(diff --label expected --label found -u <(echo "$2") <(echo "$3"))"
}

# expect_schema NAME FILE: the file holds JSON as packaging/schema/NAME.schema.json has it.
expect_schema() {
    local said
    said=$(/usr/bin/python3 - "$LAB_REPOSITORY/packaging/schema/$1.schema.json" "$2" <<'EOF' 2>&1
import json, sys
from jsonschema import Draft202012Validator as Validator
schema, found = (json.load(open(path)) for path in sys.argv[1:])
Validator.check_schema(schema)
errors = [f"{error.json_path}: {error.message}" for error in Validator(schema).iter_errors(found)]
sys.exit("\n".join(errors) or None)
EOF
    ) || fail "$2 is not as the schema $1 has it: $said"
}

# field FILE PATH…: a value in a file of JSON, by keys and indices; a number or null as it is, a list line by line.
field() {
    /usr/bin/python3 - "$@" <<'EOF'
import json, sys
value = json.load(open(sys.argv[1]))
for key in sys.argv[2:]:
    value = value[int(key) if isinstance(value, list) else key]
for item in value if isinstance(value, list) else [value]:
    print(item if isinstance(item, str) else json.dumps(item))
EOF
}

# processes COMMAND…: how many it runs on the router, besides itself.
processes() {
    in_ns router strace -f -qq -e trace=execve -e signal=none -o "$LAB_DIR/execve" -- "$@" >/dev/null 2>&1
    grep -c ' = 0$' "$LAB_DIR/execve" | awk '{ print $1 - 1 }'
}

## Monitors

# monitor_start OBJECT…: from here on the router's changes are noted: of nft's tables, and of what `ip monitor` calls by
# these names, routes among them.
monitor_start() {
    in_ns router stdbuf -oL nft monitor >"$LAB_DIR/monitor.nft" 2>&1 &
    in_ns router stdbuf -oL ip monitor "$@" >"$LAB_DIR/monitor.ip" 2>&1 &
    lab_wait monitor_listens
    monitor_mark 1
}

# monitor_seen: what has been noted since.
monitor_seen() {
    # Silence of one that has died must not pass for silence.
    (monitor_mark "$(($(grep -c 'delete table ip mark' "$LAB_DIR/monitor.nft") + 2))") || { echo "a monitor has died"; return 1; }
    sed '1,/^delete table ip mark1$/d' "$LAB_DIR/monitor.nft" | grep -vE ' table ip mark|\(nft\)$' || true
    sed '1,/^Deleted 10\.99\.1\.0/d' "$LAB_DIR/monitor.ip" | grep -v '10\.99\.' || true
}

# monitor_mark NUMBER: until both have told of what nobody else does, and so of all before it.
monitor_mark() {
    mark_once "$1"
    lab_wait marked "$1"
}

mark_once() {
    in_ns router nft "add table ip mark$1"
    in_ns router nft "delete table ip mark$1"
    ip -n router route add "10.99.$1.0/24" dev eth1
    ip -n router route del "10.99.$1.0/24" dev eth1
}

marked() {
    if grep -q "^delete table ip mark$1\$" "$LAB_DIR/monitor.nft"; then grep "^Deleted 10\.99\.$1\.0/24 " "$LAB_DIR/monitor.ip" || true; fi
}

# Those who have only been started may miss a mark.
monitor_listens() {
    mark_once 0
    sleep 0.1
    marked 0
}

# fail MESSAGE…: says it, shows the router as it stands, and returns 1.
fail() {
    echo "failed: $*" >&2
    lab_show >&2
    return 1
}

lab_show() {
    local command
    for command in 'ip -4 address' 'ip rule' 'ip route show table all' '/usr/sbin/iptables-save -c' 'conntrack -L'; do
        echo "--- router: $command"
        # shellcheck disable=SC2086 # a command and its arguments
        in_ns router $command 2>&1 || true
    done
    echo "--- packets of its customer, and foreign ones dropped:" \
        "isp0 $(isp_packets isp0 customer), $(isp_packets isp0 foreign);" \
        "isp1 $(isp_packets isp1 customer), $(isp_packets isp1 foreign)"
}

# What must be the same before `up` and after `down`. Counters, comments and built-in chains at rest do not count.
lab_dump() {
    in_ns router ip -4 rule
    in_ns router ip -4 -N route show table all
    in_ns router /usr/sbin/iptables-save | awk '
        /^\*/ { table = substr($1, 2) }
        /^:/ && $2 == "-" { print table, $1 }
        /^:/ && $2 != "-" && $2 != "ACCEPT" { print table, $1, $2 }
        /^-/ { print table, $0 }'
}

## The program

lab_find_mh_hook() {
    local -a found
    mapfile -t found < <(cd "$LAB_REPOSITORY" && ls -dt \
        target/x86_64-unknown-linux-musl/release/mh-hook target/*/release/mh-hook target/release/mh-hook 2>/dev/null)
    [[ ${#found[@]} -gt 0 ]] || lab_die "no mh-hook in target/; build it first: packaging/build"
    echo "$LAB_REPOSITORY/${found[0]}"
}

# lab_config <<TOML: root's, and nobody else may write it, or mh-hook refuses it.
lab_config() {
    cat >"$LAB_CONFIG"
    chmod 0644 "$LAB_CONFIG"
}

# mh_hook ARGUMENT…: on the router. It promises to end within 30 s.
mh_hook() {
    [[ -n ${MH_HOOK-} ]] || MH_HOOK=$(lab_find_mh_hook)
    timeout 30 ip netns exec router "$MH_HOOK" --config "$LAB_CONFIG" "$@"
}

## The harness: functions named test_…, each in a lab of its own, on both backends

# What stands when a test begins; a file of tests may define its own.
lab_setup() {
    lab_net
    lab_links
    lab_serve
}

# lab_wants BACKEND NAME: whether to run a test; a file of tests may define its own.
lab_wants() { true; }

# run_tests [PART OF A NAME]
run_tests() {
    local passed=0 failed=0 backend name pid
    local -A running=()
    set -euo pipefail
    if [[ -n ${LAB_TEST-} ]]; then lab_isolate; lab_run_test; exit; fi

    MH_HOOK=${MH_HOOK:-$(lab_find_mh_hook)}
    export MH_HOOK
    lab_isolate "$@"
    for backend in nft legacy; do
        for name in $(compgen -A function test_); do
            [[ $name == *"${1-}"* ]] || continue
            lab_wants "$backend" "$name" || continue
            # Tests mostly wait, hence more of them than processors.
            ((${#running[@]} < ${LAB_JOBS:-4})) || lab_reap
            LAB_TEST="$backend $name" timeout --foreground --signal=KILL "${LAB_TIME_LIMIT:-600}" "$BASH" "$0" \
                >"$LAB_DIR/$backend.$name" 2>&1 &
            running[$!]="$backend $name"
        done
    done
    while ((${#running[@]})); do lab_reap; done
    echo "$passed passed, $failed failed"
    ((passed && !failed))
}

# Waits for one test and tells how it went.
lab_reap() {
    local status=0
    wait -n -p pid "${!running[@]}" || status=$?
    # shellcheck disable=SC2154 # pid is set by wait
    if ((status == 0)); then
        passed=$((passed + 1))
        echo "ok ${running[$pid]}"
        # What a test has counted or measured.
        sed -n 's/^figure: /    /p' "$LAB_DIR/${running[$pid]/ /.}"
    else
        failed=$((failed + 1))
        echo "FAIL ${running[$pid]} (exit status $status)"
        sed 's/^/    /' "$LAB_DIR/${running[$pid]/ /.}"
    fi
    unset "running[$pid]"
}

lab_run_test() {
    local backend name
    read -r backend name <<<"$LAB_TEST"
    unset LAB_TEST
    lab_backend "$backend"
    lab_setup
    set -E
    trap 'lab_trace "$BASH_COMMAND" >&2' ERR
    "$name"
}

# lab_trace COMMAND: how the script came to the command that failed.
lab_trace() {
    local i
    echo "--- failed: $1"
    for ((i = 1; i < ${#FUNCNAME[@]} - 1; i++)); do
        echo "${BASH_SOURCE[i]}:${BASH_LINENO[i - 1]}: ${FUNCNAME[i]}"
    done
}
