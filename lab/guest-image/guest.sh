# Functions for the scripts that run in a guest; /init reads it too.

# One line for machines: say key=value [key=value...]
say() { echo "@@LANLET $*"; }

# The shell would take its own applet; commands that run others (timeout, xargs) find the right one.
nc() { nc.openbsd "$@"; }
# Where the image has the real ones (initrd-tools.gz).
[ -L /bin/ping ] || ping() { /bin/ping "$@"; }
[ -L /bin/traceroute ] || traceroute() { /bin/traceroute "$@"; }

uptime_secs() { cut -d' ' -f1 /proc/uptime; }

# Waits until the host writes WORD and a newline to the guest's serial line: await WORD
await() {
    while read -r line; do
        [ "$line" = "$1" ] && return 0
    done
    return 1
}

# Waits until something listens on a TCP port: listening PORT
listening() { until netstat -ltn | grep -q ":$1 "; do sleep 0.1; done; }

# Runs a command, says how it went and in how many milliseconds: step NAME CMD...
step() {
    local name=$1 begin end status
    shift
    begin=$(uptime_secs)
    "$@"
    status=$?
    end=$(uptime_secs)
    say "$name=$status ${name}_ms=$(((${end%.*}${end#*.} - ${begin%.*}${begin#*.}) * 10))"
    return $status
}

# COUNT bytes, the same on every machine (see lab/pattern): pattern COUNT
pattern() {
    local millions=$(($1 / 1000000)) block=/share/pattern ten
    ten="$block $block $block $block $block $block $block $block $block $block"
    while [ $millions -ge 10 ]; do cat $ten && millions=$((millions - 10)) || return; done
    while [ $millions -ge 1 ]; do cat $block && millions=$((millions - 1)) || return; done
    head -c $(($1 % 1000000)) $block
}
