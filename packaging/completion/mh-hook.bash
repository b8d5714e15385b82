# shellcheck shell=bash
# Completion of mh-hook for bash.

# _mh_hook_uplinks CONFIG
_mh_hook_uplinks() {
    sed -nE 's/^[[:space:]]*\[uplink\.([a-z0-9_-]+)\].*/\1/p' "$1" 2>/dev/null
}

_mh_hook() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} i
    local options='--config --dry-run --local --uplink --json --prometheus --strict --to --from-lan --verbose --quiet --help --version -v -q -h -V'
    local config=/etc/mh-hook.toml candidates='' words=()
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            --config) config=${COMP_WORDS[++i]} ;;
            --local | --uplink | --to | --from-lan) ((++i)) ;;
            -*) ;;
            *) words+=("${COMP_WORDS[i]}") ;;
        esac
    done
    case $before in
        --config)
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$word")
            return
            ;;
        --local) candidates=$(ip -4 -oneline address show scope global 2>/dev/null | awk '{ sub("/.*", "", $4); print $4 }') ;;
        --uplink | --to) candidates=$(_mh_hook_uplinks "$config") ;;
        --from-lan) ;;
        *)
            case $word,${words[*]} in
                -*) candidates=$options ;;
                *,) candidates='up down sync event status check explain help' ;;
                *,status) candidates=$(_mh_hook_uplinks "$config") ;;
                *,event) candidates='pre-up up down' ;;
                *,help) candidates='up down sync event status check explain' ;;
                *,up | *,down | *,event\ pre-up | *,event\ up | *,event\ down)
                    candidates=$(cd /sys/class/net 2>/dev/null && echo *)
                    ;;
            esac
            ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$candidates" -- "$word")
}

complete -F _mh_hook mh-hook
