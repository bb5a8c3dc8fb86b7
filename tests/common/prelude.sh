# What every scenario of tests/ starts with. Set by common::World: LANLET (the binary), LAB (the
# staged lab), TMP (the scenario's directory, open to all).
set -u
cd "$TMP"

# lanlet as somebody without rights over the world.
lanlet() { "$LAB/as-user" "$LANLET" "$@"; }
user() { "$LAB/as-user" "$@"; }
outside() { "$LAB/in" outside "$@"; }
beyond() { "$LAB/in" beyond "$@"; }

# One line for the test: say key=value
say() { echo "@@LANLET $*"; }

fail() {
    echo "scenario: $*" >&2
    exit 90
}

# Runs CMD and tells its exit status: step NAME CMD...
step() {
    local name=$1 status=0
    shift
    "$@" || status=$?
    say "$name=$status"
    return "$status"
}

# Waits until FILE has a line that matches PATTERN: wait_for FILE PATTERN [SECONDS]
wait_for() {
    local end=$((SECONDS + ${3:-30}))
    until [ -e "$1" ] && grep -aqE -- "$2" "$1"; do
        [ $SECONDS -lt $end ] || fail "no '$2' in $1 within ${3:-30} s"
        sleep 0.05
    done
}

# Waits until something listens: listening tcp|udp PORT CMD-PREFIX...   (listening tcp 80 outside)
listening() {
    local kind=$1 port=$2
    shift 2
    for _ in $(seq 100); do
        [ -z "$("$@" ss -Hln "--$kind" "sport = :$port")" ] || return 0
        sleep 0.02
    done
    fail "nothing listens on $kind port $port"
}

# What the descriptors of a process are, a line "NUMBER PATH" each: fds_of PID. By pidfd_getfd(2), since the
# files below /proc/PID/fd of a process that is not dumpable are closed to the root of a user namespace.
fds_of() {
    python3 -c '
import ctypes, os, sys
SYS_pidfd_getfd = 438
process = os.pidfd_open(int(sys.argv[1]))
for number in range(256):
    fd = ctypes.CDLL(None).syscall(SYS_pidfd_getfd, process, number, 0)
    if fd >= 0:
        print(number, os.readlink(f"/proc/self/fd/{fd}"))
        os.close(fd)
' "$1"
}

# A network in the background, ready when this returns; its process is $NETWORK, its log up.log:
# network [OPTION of lanlet up...]
network() {
    "$LAB/as-user" "$LANLET" up "$@" >up.log 2>&1 &
    NETWORK=$!
    for _ in $(seq 100); do
        if lanlet status --json >/dev/null 2>&1; then return 0; fi
        kill -0 $NETWORK 2>/dev/null || fail "lanlet up ended: $(cat up.log)"
        sleep 0.05
    done
    fail "lanlet up is not ready after 5 s: $(cat up.log)"
}

# A QEMU guest in the background that runs SCRIPT (a file); its console is NAME.console, its process
# $GUEST, and tell NAME WORD writes to it: guest NAME SCRIPT [OPTION of lanlet qemu...]
# With GUEST_INITRD=initrd-tools.gz it has curl, dig, nmap and the like.
guest() {
    local name=$1 script=$2
    shift 2
    mkfifo "$name.in"
    "$LAB/as-user" "$LANLET" qemu "$@" -- -accel tcg -cpu max -m 256 -nographic -no-reboot \
        -kernel "$LAB/out/vmlinuz" -initrd "$LAB/out/${GUEST_INITRD:-initrd.gz}" \
        -append "$("$LAB/guest-image/append" lanlet.host="$name" ${GUEST_APPEND:-})" \
        -fw_cfg name=opt/lanlet/script,file="$script" -global virtio-net-pci.romfile= \
        <>"$name.in" >"$name.console" 2>&1 &
    GUEST=$!
}

tell() { echo "$2" >"$1.in"; }

# Waits for a marker on a guest's console; a guest that ended first is a failure:
# marker NAME KEY [SECONDS]
marker() {
    wait_for "$1.console" "@@LANLET (.* )?($2|exit)=" "${3:-30}"
    grep -aqE -- "@@LANLET (.* )?$2=" "$1.console" || fail "guest $1 ended without $2"
}

# The last value of a marker: value NAME KEY
value() { tr -d '\r' <"$1.console" | grep -a '@@LANLET ' | grep -ao "\<$2=[^ ]*" | tail -1 | cut -d= -f2-; }
