#compdef mh-hook
# Completion of mh-hook for zsh.

_mh_hook_interfaces() {
    local -a interfaces=(/sys/class/net/*(N:t))
    _describe interface interfaces
}

_mh_hook_uplinks() {
    local config=${opt_args[--config]:-/etc/mh-hook.toml}
    local -a uplinks=(${(f)"$(sed -nE 's/^[[:space:]]*\[uplink\.([a-z0-9_-]+)\].*/\1/p' $config 2>/dev/null)"})
    _describe uplink uplinks
}

_mh_hook_addresses() {
    local -a addresses=(${(f)"$(ip -4 -oneline address show scope global 2>/dev/null | awk '{ sub("/.*", "", $4); print $4 }')"})
    _describe address addresses
}

_mh_hook() {
    local context state state_descr line
    typeset -A opt_args
    local -a commands=(
        "up:bring the interface's uplink to its desired state"
        "down:remove that uplink's entries, and nothing else"
        "sync:bring every uplink to what its link's state asks for"
        "event:what pppd's hooks call"
        "status:each uplink, what stands, what it has seen"
        "check:what would keep this from working, and what mends it"
        "explain:where a request goes, and its reply"
        "help:the help of a command"
    )
    _arguments -C -s \
        '--config[the configuration]:file:_files' \
        '--dry-run[print the plan as commands, change nothing]' \
        "--local[the link's address, with up]:address:_mh_hook_addresses" \
        '--uplink[whose link it is, with up]:uplink:_mh_hook_uplinks' \
        '--prometheus[print metrics for Prometheus, with status]' \
        '--strict[exit status 1 for a warning, too, with check]' \
        '--json[print JSON, with status, check and explain]' \
        '--to[the uplink or address that is asked, with explain]:uplink:_mh_hook_uplinks' \
        "--from-lan[the LAN host whose own connection is meant, with explain]:host:" \
        '(-v --verbose)'{-v,--verbose}'[also log what was already there]' \
        '(-q --quiet)'{-q,--quiet}'[log errors only]' \
        '(- *)'{-h,--help}'[print the help]' \
        '(- *)'{-V,--version}'[print the version]' \
        '1: :->command' \
        '2: :->second' \
        '3: :->third' \
        '*: :' && return
    case $state-$line[1] in
        command-*) _describe command commands ;;
        second-(up|down) | third-event) _mh_hook_interfaces ;;
        second-status) _mh_hook_uplinks ;;
        second-help) _describe command commands ;;
        second-event) _values direction pre-up up down ;;
    esac
}

_mh_hook "$@"
