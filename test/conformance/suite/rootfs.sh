#!/bin/bash
# rootfs.sh DIR PACKAGE...: unpacks Debian packages and all that they need into DIR: no dpkg database, no maintainer scripts.
set -euo pipefail
D=$1; shift; C=$D.debs
rm -rf "$D"; mkdir -p "$D" "$C/partial"
apt-get -o Dir::State::status=/dev/null -o Dir::Cache::archives="$C" -o Debug::NoLocking=1 --no-install-recommends -y -qq -d install "$@" >/dev/null
mkdir -p "$D"/usr/{bin,sbin,lib,lib64} "$D"/{dev,proc,sys,run,root,etc,var,home}; mkdir -p -m 1777 "$D/tmp" "$D/var/tmp"
for l in bin sbin lib lib64; do ln -s usr/$l "$D/$l"; done
skip='^(dpkg|apt|perl-base|e2fsprogs|tzdata|login|passwd|mount|util-linux|util-linux-extra|sysvinit-utils|debconf|debconf-2.0|gcc-12-base|openssl|libdb5.3|tar|init-system-helpers|adduser)_'
for p in "$C"/*.deb; do
  [[ $(basename "$p") =~ $skip ]] && continue
  dpkg-deb --fsys-tarfile "$p" | tar --keep-directory-symlink -C "$D" -xf - --exclude=./usr/share/doc --exclude=./usr/share/man --exclude=./usr/share/locale --exclude=./usr/share/info --exclude=./usr/lib/x86_64-linux-gnu/gconv --exclude=./usr/share/i18n
done
ln -sf dash "$D/usr/bin/sh"
cat > "$D/etc/passwd" <<P
root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh
P
cat > "$D/etc/group" <<P
root:x:0:
adm:x:4:
www-data:x:33:
nogroup:x:65534:
user-defined-in-image:x:1000:
group-defined-in-image:x:50000:user-defined-in-image
P
printf 'hosts: files dns\npasswd: files\ngroup: files\n' > "$D/etc/nsswitch.conf"
if [ -d "$D/usr/share/ca-certificates" ]; then mkdir -p "$D/etc/ssl/certs"; find "$D/usr/share/ca-certificates" -name '*.crt' -exec cat {} + > "$D/etc/ssl/certs/ca-certificates.crt"; fi
[ ! -e "$D/usr/bin/nc.openbsd" ] || ln -sf nc.openbsd "$D/usr/bin/nc"
[ ! -e "$D/usr/bin/gawk" ] || ln -sf gawk "$D/usr/bin/awk"
ldconfig -r "$D"; rm -rf "$C"
