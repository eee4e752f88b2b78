#!/bin/sh
# The lab guest's init. It keeps a chained journal on every disk it is given and says on the serial console what it
# found, what is durable, and what the last record was. Lines and kernel parameters: tests/lab/README.md.

export PATH=/bin
/bin/busybox mount -t devtmpfs dev /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
busybox stty -F /dev/ttyS0 -opost 2>/dev/null
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys

SLOTS=16
SLOT_SECTORS=8
role=idle disks='' acpi=obey rate=2
for word in $(busybox cat /proc/cmdline); do
    case $word in
    failback.role=*) role=${word#*=} ;;
    failback.disks=*) disks=$(echo "${word#*=}" | busybox tr ',' ' ') ;;
    failback.acpi=*) acpi=${word#*=} ;;
    failback.rate=*) rate=${word#*=} ;;
    esac
done

say() { echo "FAILBACK $*"; }
md5() { busybox md5sum | busybox cut -c1-32; }

for module in $(busybox cat /modules/order); do
    case $acpi:$module in
    ignore:button* | ignore:evdev*) ;; # nobody listens: a shutdown request goes unheard
    *) busybox insmod "/modules/$module" || say "FAIL module $module" ;;
    esac
done

stopping=''
trap 'stopping=1' USR1
if [ "$acpi" != ignore ]; then
    tries=0
    until [ -e /dev/input/event0 ] || [ $tries -ge 50 ]; do
        tries=$((tries + 1))
        busybox sleep 0.1
    done
    busybox acpid -f -c /etc/acpi -l /dev/null &
    # acpid opens every event device at its start; READY below must mean that a shutdown request is heard.
    tries=0
    until busybox ls -l "/proc/$!/fd" 2>/dev/null | busybox grep -q /dev/input/event || [ $tries -ge 50 ]; do
        tries=$((tries + 1))
        busybox sleep 0.1
    done
fi

# A guest agent, where the host gives the guest its channel: what libvirt asks of qemu-guest-agent to shut down, freeze
# and thaw. Frozen file systems are those on disks.
agent() { # device
    exec 3<>"$1"
    while :; do
        # Nothing but an end comes from the channel until the host has opened its side.
        read -r request <&3 || { busybox sleep 0.1; continue; }
        case $request in
        *guest-sync*) echo "{\"return\": $(echo "$request" | busybox sed 's/.*"id": *\([0-9]*\).*/\1/')}" >&3 ;;
        *guest-shutdown*)
            say "AGENT shutdown"
            kill -USR1 1
            ;;
        *guest-fsfreeze-freeze*) freeze --freeze && say "AGENT frozen" && echo '{"return": 1}' >&3 ;;
        *guest-fsfreeze-thaw*) freeze --unfreeze && say "AGENT thawed" && echo '{"return": 1}' >&3 ;;
        *) echo '{"error": {"class": "CommandNotFound", "desc": "not known here"}}' >&3 ;;
        esac
    done
}
freeze() { # --freeze or --unfreeze; thawing what is not frozen is no error, as in qemu-guest-agent
    for disk in $usable; do
        [ "${disk#*:}" = raw ] || busybox fsfreeze "$1" "/mnt/${disk%%:*}" 2>/dev/null || [ "$1" = --unfreeze ] || return 1
    done
}

# Content of every slot written in this boot: random, so that it neither compresses away nor equals another boot's.
pad=$(busybox dd if=/dev/urandom bs=2904 count=1 2>/dev/null | busybox base64 | busybox tr -d '\n')
pad_sum=$(echo "$pad" | md5)

# Sector of raw slot $2 on disk $1. Slots are spread over the whole disk; the last one ends with the disk's last sector.
slot_sector() {
    size=$(busybox cat "/sys/block/$1/size")
    echo $((16 + $2 * (size - 16 - SLOT_SECTORS) / (SLOTS - 1)))
}

read_slot() { # disk, file system, slot -> its text
    if [ "$2" = raw ]; then
        busybox dd if="/dev/$1" bs=512 skip="$(slot_sector "$1" "$3")" count=$SLOT_SECTORS 2>/dev/null | busybox tr -d '\0'
    else
        busybox cat "/mnt/$1/slots/$3" 2>/dev/null
    fi
}

read_record() { # disk, file system -> "sequence checksum check", empty when there is none
    if [ "$2" = raw ]; then
        busybox dd if="/dev/$1" bs=512 count=1 2>/dev/null | busybox tr -d '\0' | busybox head -n 1
    else
        busybox tail -n 1 "/mnt/$1/journal" 2>/dev/null
    fi
}

# A record must carry its own checksum, and each slot that the last records wrote must hold what they say.
found() { # disk, file system
    set -- "$1" "$2" $(read_record "$1" "$2")
    eval "seq_$1=0 sum_$1=-"
    [ $# -ge 3 ] || { say "FOUND $1 0 -"; return; }
    if [ "$(echo "$3 $4" | md5)" != "$5" ]; then
        say "FOUND $1 0 corrupt-record"
        return
    fi
    eval "seq_$1=$3 sum_$1=$4"
    number=$3
    while [ "$number" -gt 0 ] && [ "$number" -gt $(($3 - SLOTS)) ]; do
        slot=$(read_slot "$1" "$2" $((number % SLOTS)))
        slot_rest=${slot#* }
        slot_pad=${slot_rest#* }
        # With the writer killed between slot and record, a slot may be one round newer than the record says.
        if { [ "${slot%% *}" != "$number" ] && [ "${slot%% *}" != $(($3 + 1)) ]; } ||
            [ "$(echo "$slot_pad" | md5)" != "${slot_rest%% *}" ]; then
            say "FOUND $1 $3 corrupt-slot-$((number % SLOTS))"
            return
        fi
        number=$((number - 1))
    done
    say "FOUND $1 $3 $4"
}

write() { # disk, file system: one slot, then the record, each flushed
    eval "seq=\$((seq_$1 + 1)) sum=\$sum_$1"
    sum=$(echo "$sum $1 $seq $pad_sum" | md5)
    record="$seq $sum $(echo "$seq $sum" | md5)"
    slot=$((seq % SLOTS))
    if [ "$2" = raw ]; then
        printf '%s' "$seq $pad_sum $pad" |
            busybox dd of="/dev/$1" bs=512 seek="$(slot_sector "$1" $slot)" conv=notrunc,sync,fsync 2>/dev/null &&
            echo "$record" | busybox dd of="/dev/$1" bs=512 conv=notrunc,sync,fsync 2>/dev/null
    else
        echo "$seq $pad_sum $pad" | busybox dd of="/mnt/$1/slots/$slot" bs=4k conv=fsync 2>/dev/null &&
            echo "$record" | busybox dd of="/mnt/$1/journal" bs=512 oflag=append conv=notrunc,fsync 2>/dev/null
    fi || { say "FAIL $1 write $seq"; return; }
    eval "seq_$1=$seq sum_$1=$sum"
    say "WROTE $1 $seq"
}

usable=''
for disk in $disks; do
    name=${disk%%:*} kind=${disk#*:}
    if [ "$kind" != raw ]; then
        busybox mkdir -p "/mnt/$name"
        if ! busybox mount -t "$kind" "/dev/$name" "/mnt/$name"; then
            say "FAIL $name mount"
            continue
        fi
        busybox mkdir -p "/mnt/$name/slots"
    elif [ ! -b "/dev/$name" ]; then
        say "FAIL $name missing"
        continue
    fi
    found "$name" "$kind"
    usable="$usable $disk"
done
for port in /sys/class/virtio-ports/*; do
    if [ "$(busybox cat "$port/name" 2>/dev/null)" = org.qemu.guest_agent.0 ]; then
        agent "/dev/${port##*/}" &
    fi
done
say READY

pause=$(busybox awk -v rate="$rate" 'BEGIN { print (rate == "max") ? 0 : 1 / rate }')
if [ "$role" = writer ]; then
    while [ -z "$stopping" ]; do
        for disk in $usable; do
            write "${disk%%:*}" "${disk#*:}"
        done
        [ "$pause" = 0 ] || busybox sleep "$pause"
    done
elif [ "$role" = filler ]; then
    # Every block of every raw disk, from front to back, again and again: as fast as it goes, or half a MiB at a time.
    while [ -z "$stopping" ]; do
        for disk in $usable; do
            device=/dev/${disk%%:*}
            if [ "$rate" = max ]; then
                busybox dd if=/dev/urandom of="$device" bs=64k conv=fsync 2>/dev/null
            else
                chunk=0 chunks=$(($(busybox cat "/sys/block/${disk%%:*}/size") / 1024))
                while [ -z "$stopping" ] && [ $chunk -lt $chunks ]; do
                    busybox dd if=/dev/urandom of="$device" bs=64k count=8 seek=$((chunk * 8)) conv=notrunc,fsync 2>/dev/null
                    chunk=$((chunk + 1))
                    busybox sleep "$pause"
                done
            fi
            say "FILLED ${disk%%:*}"
        done
    done
else
    while [ -z "$stopping" ]; do
        busybox sleep 3600 &
        wait $! # returns at once when the trap ran
    done
fi

for disk in $usable; do
    eval "say LAST ${disk%%:*} \$seq_${disk%%:*} \$sum_${disk%%:*}"
done
busybox sync
for disk in $usable; do
    [ "${disk#*:}" = raw ] || busybox umount "/mnt/${disk%%:*}" || say "FAIL ${disk%%:*} unmount"
done
busybox poweroff -f
