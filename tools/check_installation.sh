#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
#
# In a minimal Debian without systemd as process 1, which has what the package depends on or recommends: install
# /root/nbdnfs.deb, try it, remove it, purge it.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt="apt-get -q -y -o Dpkg::Use-Pty=0"

fail() {
    echo "check_installation: $*" >&2
    exit 1
}

# All files but those that belong to a running system, to dpkg and to apt.
files() {
    find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /root \
        -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/cache -o -path /var/log \) -prune -o -print | sort
}

files >/tmp/before

$apt install /root/nbdnfs.deb >/dev/null
[ "$(nbdnfs --version)" = "nbdnfs $(dpkg-query -W -f '${Version}' nbdnfs | sed 's/+deb.*//')" ] || fail "--version"
for page in nbdnfs.8 nbdnfs.toml.5 nbdnfs-generator.8 nbdnfs.7; do
    MANWIDTH=80 man --warnings "${page##*.}" "${page%.*}" >/tmp/page 2>/tmp/warnings || fail "man $page"
    [ ! -s /tmp/warnings ] || fail "man $page: $(cat /tmp/warnings)"
    grep -q nbdnfs /tmp/page || fail "man $page is empty"
done
# In a container much is missing: what counts is that doctor says so.
status=0
nbdnfs doctor >/tmp/doctor 2>&1 || status=$?
[ "$status" = 78 ] || [ "$status" = 0 ] || fail "doctor: status $status: $(cat /tmp/doctor)"
grep -q "^ok " /tmp/doctor || fail "doctor: $(cat /tmp/doctor)"
nbdkit python /usr/lib/python3/dist-packages/nbdnfs/plugin/nbdnfs_plugin.py --help >/tmp/plugin ||
    fail "nbdkit does not load the plugin"
status=0
nbdnfs install-units 2>/tmp/refused || status=$?
[ "$status" = 78 ] || fail "install-units: status $status"
for path in /usr/lib/systemd/system/nbdnfs@.service /usr/lib/systemd/system-generators/nbdnfs-generator \
    /usr/lib/udev/rules.d/59-nbdnfs.rules /usr/lib/nbdnfs/reserve; do
    [ -e "$path" ] || [ -e "${path#/usr}" ] || fail "$path is missing"
    ! grep -q /usr/local "$path" || fail "$path names /usr/local"
done
systemd-analyze --man=yes verify nbdnfs@swap0.service 2>/tmp/verify || fail "verify: $(cat /tmp/verify)"
# what `systemctl enable`, `systemctl edit` and an administrator leave behind
echo 'url = "nfs://nas.example/export/swap"' >/etc/nbdnfs/swap0.toml
mkdir -p /etc/nbdnfs/swap0.toml.d /etc/systemd/system/multi-user.target.wants /etc/systemd/system/nbdnfs@swap0.service.d
touch /etc/nbdnfs/swap0.toml.d/50-size.toml /etc/systemd/system/nbdnfs@swap0.service.d/override.conf
ln -s /usr/lib/systemd/system/nbdnfs@.service /etc/systemd/system/multi-user.target.wants/nbdnfs@swap0.service
mkdir -p /etc/systemd/system/timers.target.wants
ln -s /usr/lib/systemd/system/nbdnfs-metrics.timer /etc/systemd/system/timers.target.wants/nbdnfs-metrics.timer

$apt remove nbdnfs >/dev/null
[ -e /etc/nbdnfs/swap0.toml ] || fail "remove takes the configuration along"
[ ! -e /usr/bin/nbdnfs ] || fail "remove leaves the program"
$apt purge nbdnfs >/dev/null
files >/tmp/after
diff /tmp/before /tmp/after || fail "purge leaves files, or removes others (see above)"
