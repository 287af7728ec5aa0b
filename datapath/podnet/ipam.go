package podnet

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoAddress means that a node's range of pod addresses is used up.
var ErrNoAddress = errors.New("podnet: no pod address is free")

// A symbolic link per address, named by it and pointing to its owner "container/interface", is made in one step with its
// content: no crash leaves half an entry. The lock file keeps allocation and collection apart.
type addresses struct{ dir string }

const (
	lockName = "lock"
	lastName = "last" // where the last search ended: freed addresses rest as long as possible
)

func (a addresses) locked(f func() error) error {
	if err := os.MkdirAll(a.dir, 0o700); err != nil {
		return fmt.Errorf("podnet: %w", err)
	}
	l, err := os.OpenFile(filepath.Join(a.dir, lockName), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("podnet: %w", err)
	}
	defer l.Close() // gives the lock back
	if err := unix.Flock(int(l.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("podnet: lock %s: %w", l.Name(), err)
	}
	return f()
}

// owners lists who has which address.
func (a addresses) owners() (map[netip.Addr]string, error) {
	entries, err := os.ReadDir(a.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("podnet: %w", err)
	}
	out := map[netip.Addr]string{}
	for _, e := range entries {
		ip, err := netip.ParseAddr(e.Name())
		if err != nil {
			continue
		}
		if owner, err := os.Readlink(filepath.Join(a.dir, e.Name())); err == nil {
			out[ip] = owner
		}
	}
	return out, nil
}

// allocate gives owner an address of r, the one that it has already if it asks again; or else the one that an earlier sandbox of
// the same pod had, if nobody has it now: after a reboot without the API the other nodes' and this node's own tables still name that
// address, and nobody could tell them another. pod is the pod's UID; empty = not known. The first two addresses (network, node) and the
// last (broadcast) are never given.
func (a addresses) allocate(r netip.Prefix, owner, pod string) (ip netip.Addr, err error) {
	err = a.locked(func() error {
		have, err := a.owners()
		if err != nil {
			return err
		}
		for k, o := range have {
			if o == owner && r.Contains(k) {
				ip = k
				return nil
			}
		}
		if old, ok := a.former(owner, pod, have); ok && r.Contains(old) {
			ip = old
			return a.take(ip, owner, pod)
		}
		last, _ := os.Readlink(filepath.Join(a.dir, lastName))
		from, _ := netip.ParseAddr(last) // none yet: the zero Addr begins at the start
		var ok bool
		if ip, ok = next(r, from, func(k netip.Addr) bool { _, used := have[k]; return used }); !ok {
			return fmt.Errorf("%w: all %d of %s are in use", ErrNoAddress, len(have), r)
		}
		if err := a.take(ip, owner, pod); err != nil {
			return err
		}
		return link(ip.String(), filepath.Join(a.dir, lastName))
	})
	return ip, err
}

// podsName is the directory that remembers, for each address, the pod that had it last and the owner that it was given to. It never
// holds more than a link per address.
const podsName = "pods"

// take notes that owner has the address, and for which pod.
func (a addresses) take(ip netip.Addr, owner, pod string) error {
	// The memory first: with an owner that has nothing it means nothing.
	if pod != "" && !strings.ContainsAny(pod, " /") {
		if err := os.MkdirAll(filepath.Join(a.dir, podsName), 0o700); err != nil {
			return fmt.Errorf("podnet: %w", err)
		}
		if err := link(pod+" "+owner, filepath.Join(a.dir, podsName, ip.String())); err != nil {
			return err
		}
	}
	return link(owner, filepath.Join(a.dir, ip.String()))
}

// former is the address that the same interface of an earlier sandbox of the pod had, if it is free or that sandbox is still noted for it.
func (a addresses) former(owner, pod string, have map[netip.Addr]string) (netip.Addr, bool) {
	if pod == "" {
		return netip.Addr{}, false
	}
	memories, err := addresses{filepath.Join(a.dir, podsName)}.owners()
	if err != nil {
		return netip.Addr{}, false
	}
	_, ifName, _ := strings.Cut(owner, "/")
	for ip, m := range memories {
		uid, old, _ := strings.Cut(m, " ")
		if now, used := have[ip]; uid == pod && strings.HasSuffix(old, "/"+ifName) && (!used || now == old) {
			return ip, true
		}
	}
	return netip.Addr{}, false
}

// link makes or replaces a symbolic link in one step.
func link(content, path string) error {
	tmp := path + ".new"
	_ = os.Remove(tmp) // left by a crash
	if err := os.Symlink(content, tmp); err != nil {
		return fmt.Errorf("podnet: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("podnet: %w", err)
	}
	return nil
}

// next is the first free address of r after from, going round.
func next(r netip.Prefix, from netip.Addr, used func(netip.Addr) bool) (netip.Addr, bool) {
	first := NodeAddr(r).Next()
	if !r.Contains(from) || from.Less(first) {
		from = first.Prev()
	}
	for ip, wrapped := from.Next(), false; ; ip = ip.Next() {
		if !r.Contains(ip) || !r.Contains(ip.Next()) { // the last one is broadcast
			if wrapped {
				return netip.Addr{}, false
			}
			ip, wrapped = first, true
			if !r.Contains(ip) || !r.Contains(ip.Next()) {
				return netip.Addr{}, false
			}
		}
		if !used(ip) {
			return ip, true
		}
		if wrapped && ip == from {
			return netip.Addr{}, false
		}
	}
}

// release frees what owner has; nothing is fine.
func (a addresses) release(owner string) error {
	_, err := a.free(func(_ netip.Addr, o string) bool { return o == owner })
	return err
}

// free removes the entries that drop chooses and returns their owners.
func (a addresses) free(drop func(netip.Addr, string) bool) ([]string, error) {
	var gone []string
	err := a.locked(func() error {
		have, err := a.owners()
		if err != nil {
			return err
		}
		var errs []error
		for ip, o := range have {
			if !drop(ip, o) {
				continue
			}
			if err := os.Remove(filepath.Join(a.dir, ip.String())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("podnet: free address: %w", err))
				continue
			}
			gone = append(gone, o)
		}
		return errors.Join(errs...)
	})
	return gone, err
}

// Addresses tells which sandbox (container ID) has which address.
func Addresses(dataDir string) (map[string]netip.Addr, error) {
	have, err := addresses{dataDir}.owners()
	if err != nil {
		return nil, err
	}
	out := map[string]netip.Addr{}
	for ip, o := range have {
		id, _, _ := strings.Cut(o, "/")
		out[id] = ip
	}
	return out, nil
}

// GC frees the addresses and removes the links of all sandboxes that are not in live. listedAt is when the caller began to
// list them, by this machine's clock: what was given out later is left alone. It returns how many were freed.
func GC(dataDir string, live []string, listedAt time.Time) (int, error) {
	keep := map[string]bool{}
	for _, id := range live {
		keep[id] = true
	}
	a := addresses{dataDir}
	gone, err := a.free(func(ip netip.Addr, o string) bool {
		id, _, _ := strings.Cut(o, "/")
		if keep[id] {
			return false
		}
		st, err := os.Lstat(filepath.Join(dataDir, ip.String()))
		return err == nil && st.ModTime().Before(listedAt)
	})
	errs := []error{err}
	for _, o := range gone {
		id, ifName, _ := strings.Cut(o, "/")
		errs = append(errs, removeLink(HostLink(id, ifName)))
	}
	return len(gone), errors.Join(errs...)
}
