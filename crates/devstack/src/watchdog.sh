# Outlives the process that owns the stack: reads the ids of its servers from a pipe, and when the pipe closes, however
# that process ended, kills them and removes the directory given as $1.
trap '' HUP INT QUIT TERM
directory=$1
servers=
while read -r verb server; do
    case $verb in
    add) servers="$servers $server" ;;
    remove)
        rest=
        for other in $servers; do
            [ "$other" = "$server" ] || rest="$rest $other"
        done
        servers=$rest
        ;;
    keep) exit 0 ;;
    esac
done

children_of() {
    if [ -d /proc/self ]; then
        tab=$(printf '\t')
        grep -lx "PPid:$tab$1" /proc/[0-9]*/status 2>/dev/null | while IFS=/ read -r _ _ child _; do
            echo "$child"
        done
    else
        pgrep -P "$1"
    fi
}

# Postgres backends are sessions of their own, so no process group has them all; a stopped parent starts no new ones.
doomed=
gather() {
    kill -s STOP "$1" 2>/dev/null || return
    doomed="$doomed $1"
    for child in $(children_of "$1"); do
        gather "$child"
    done
}
for server in $servers; do
    gather "$server"
done
[ -z "$doomed" ] || kill -s KILL $doomed 2>/dev/null

# A killed Postgres leaves its System V shared memory segment; the seventh line of its pid file is "key id".
for pid_file in "$directory"/*/data/postmaster.pid; do
    [ -e "$pid_file" ] || continue
    segment=$(sed -n '7{s/.* //;p;}' "$pid_file")
    [ -z "$segment" ] || ipcrm -m "$segment" 2>/dev/null
done

# A process that is still dying can create a file behind rm's back.
attempt=0
until rm -rf "$directory" 2>/dev/null && [ ! -e "$directory" ]; do
    attempt=$((attempt + 1))
    [ "$attempt" -lt 100 ] || exit 1
    sleep 0.05
done
