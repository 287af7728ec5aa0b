package service

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
)

// The entries as they lie in the kernel's tables: the mirror of fe_*, be_* and mb_* in datapath/bpf/maps.h. Addresses and
// ports are in network byte order, so they are byte arrays; numbers are in the machine's.
type (
	// FrontendKey names a front end.
	FrontendKey struct {
		IP    [4]byte
		Port  [2]byte
		Proto uint8
		Pad   uint8
	}
	// FrontendVal says which set of back ends serves it.
	FrontendVal struct {
		Set, Count, AffinitySeconds, Flags uint32
	}
	// SlotKey is one place in a set; the places 0..Count-1 are filled.
	SlotKey struct{ Set, Slot uint32 }
	// BackendVal is one back end.
	BackendVal struct {
		IP    [4]byte
		Port  [2]byte
		Flags uint16
	}
	// MemberKey says that an address belongs to a set; its value holds the flags of BackendVal.
	MemberKey struct {
		Set  uint32
		IP   [4]byte
		Port [2]byte
		Pad  uint16
	}
)

// Flags of FrontendVal and of BackendVal (FE_*, BE_* in maps.h).
const (
	FlagExternal uint32 = 1
	FlagLocal    uint16 = 1
)

// Entries is the content of the tables.
type Entries struct {
	Frontends map[FrontendKey]FrontendVal
	Slots     map[SlotKey]BackendVal
	Members   map[MemberKey]uint32
}

// NewEntries returns empty tables.
func NewEntries() Entries {
	return Entries{map[FrontendKey]FrontendVal{}, map[SlotKey]BackendVal{}, map[MemberKey]uint32{}}
}

func (k FrontendKey) String() string {
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(netip.AddrFrom4(k.IP), binary.BigEndian.Uint16(k.Port[:])), Proto(k.Proto))
}

// AddrPort is the back end's address.
func (b BackendVal) AddrPort() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(b.IP), binary.BigEndian.Uint16(b.Port[:]))
}

// set is the back ends of a service for one traffic policy, with the front ends that lead there.
type set struct {
	fronts   map[FrontendKey]uint32 // -> flags
	backends []BackendVal           // sorted, no duplicates
	affinity uint32
	id       uint32
}

// Translate computes the tables for the wanted services on the node self. Numbers of sets and places in them are kept
// from have where possible, so that Diff finds little to do and UDP flows and affinities stay with their back ends.
// The error joins everything that had to be left out (addresses that are not IPv4, front ends claimed twice: the
// service whose name sorts first keeps it); the rest is translated all the same.
func Translate(have Entries, want []Service, self Node) (Entries, error) {
	sorted := slices.Clone(want)
	slices.SortStableFunc(sorted, func(a, b Service) int { return cmp.Compare(a.Name, b.Name) })
	var sets []*set
	var errs []error
	owner := map[FrontendKey]string{}
	for i := range sorted {
		ss, err := setsOf(&sorted[i], self, owner)
		if err != nil {
			errs = append(errs, err)
		}
		sets = append(sets, ss...)
	}
	number(have, sets)
	old := map[uint32][]BackendVal{}
	for k, v := range have.Slots {
		s := old[k.Set]
		for uint32(len(s)) <= k.Slot {
			s = append(s, BackendVal{})
		}
		s[k.Slot] = v
		old[k.Set] = s
	}
	out := NewEntries()
	for _, s := range sets {
		for i, b := range place(old[s.id], s.backends) {
			out.Slots[SlotKey{s.id, uint32(i)}] = b
			out.Members[MemberKey{Set: s.id, IP: b.IP, Port: b.Port}] = uint32(b.Flags)
		}
		for k, flags := range s.fronts {
			out.Frontends[k] = FrontendVal{Set: s.id, Count: uint32(len(s.backends)), AffinitySeconds: s.affinity, Flags: flags}
		}
	}
	return out, errors.Join(errs...)
}

// setsOf gives one set, or two when internal and external clients have different policies.
func setsOf(s *Service, self Node, owner map[FrontendKey]string) ([]*set, error) {
	if s.Proto != TCP && s.Proto != UDP {
		return nil, fmt.Errorf("service %s: %s cannot be balanced, only TCP and UDP", s.Name, s.Proto)
	}
	var errs []error
	byPolicy := map[bool]*set{}
	add := func(addr netip.AddrPort, external, local bool, flags uint32) {
		ip := addr.Addr().Unmap()
		if !ip.Is4() || addr.Port() == 0 {
			errs = append(errs, fmt.Errorf("service %s: front end %s is not an IPv4 address with a port", s.Name, addr))
			return
		}
		k := FrontendKey{IP: ip.As4(), Port: port(addr.Port()), Proto: uint8(s.Proto)}
		if o, taken := owner[k]; taken {
			if o != s.Name {
				errs = append(errs, fmt.Errorf("service %s: front end %s belongs to service %s already", s.Name, k, o))
			}
			return
		}
		owner[k] = s.Name
		if byPolicy[local] == nil {
			byPolicy[local] = &set{fronts: map[FrontendKey]uint32{}, affinity: seconds(s)}
		}
		byPolicy[local].fronts[k] = flags
	}
	for _, f := range s.Frontends {
		if f.External {
			add(f.Addr, true, s.ExternalLocal, FlagExternal)
		} else {
			add(f.Addr, false, s.InternalLocal, 0)
		}
	}
	if s.NodePort != 0 {
		for _, a := range self.Addrs {
			add(netip.AddrPortFrom(a, s.NodePort), true, s.ExternalLocal, FlagExternal)
		}
		// only for processes of the node itself; see sock.h
		add(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), s.NodePort), true, s.ExternalLocal, 0)
	}
	var out []*set
	for _, local := range []bool{false, true} {
		if t := byPolicy[local]; t != nil {
			var err error
			if t.backends, err = backendsOf(s, self, local); err != nil {
				errs = append(errs, err)
			}
			out = append(out, t)
		}
	}
	return out, errors.Join(errs...)
}

func seconds(s *Service) uint32 {
	if s.Affinity <= 0 {
		return 0
	}
	return max(1, uint32(s.Affinity.Seconds()))
}

// backendsOf chooses and sorts the back ends: those of this node only if local, terminating ones only if no other is left.
func backendsOf(s *Service, self Node, local bool) ([]BackendVal, error) {
	var errs []error
	var ready, ending []BackendVal
	seen := map[netip.AddrPort]bool{}
	for _, b := range s.Backends {
		here := b.Node != "" && b.Node == self.Name
		if local && !here {
			continue
		}
		ip := b.Addr.Addr().Unmap()
		if !ip.Is4() || b.Addr.Port() == 0 {
			errs = append(errs, fmt.Errorf("service %s: back end %s is not an IPv4 address with a port", s.Name, b.Addr))
			continue
		}
		if seen[b.Addr] {
			continue
		}
		seen[b.Addr] = true
		v := BackendVal{IP: ip.As4(), Port: port(b.Addr.Port())}
		if here {
			v.Flags |= FlagLocal
		}
		if b.Terminating {
			ending = append(ending, v)
		} else {
			ready = append(ready, v)
		}
	}
	if len(ready) == 0 {
		ready = ending
	}
	slices.SortFunc(ready, compareBackend)
	return ready, errors.Join(errs...)
}

// number gives each set the number that its front ends have now, or a fresh one. A number that is in use anywhere in
// have never goes to a set that shares it with another, nor to a new one: its old slots may still be read.
func number(have Entries, sets []*set) {
	used := map[uint32]bool{0: true}
	for k := range have.Slots {
		used[k.Set] = true
	}
	for k := range have.Members {
		used[k.Set] = true
	}
	heir := map[FrontendKey]*set{}
	for _, s := range sets {
		for k := range s.fronts {
			heir[k] = s
		}
	}
	heirs := map[uint32]*set{} // who the front ends of a number belong to now; nil = to several
	for k, v := range have.Frontends {
		used[v.Set] = true
		s := heir[k]
		if s == nil {
			continue // deleted before anything else changes
		}
		if other, seen := heirs[v.Set]; seen && other != s {
			s = nil
		}
		heirs[v.Set] = s
	}
	for _, id := range slices.Sorted(maps.Keys(heirs)) {
		if s := heirs[id]; s != nil && s.id == 0 {
			s.id = id
		}
	}
	next := uint32(1)
	for _, s := range sets {
		if s.id != 0 {
			continue
		}
		for used[next] {
			next++
		}
		s.id, used[next] = next, true
	}
}

// place puts want (sorted) into slots: who is in old stays where it is, newcomers fill the holes, then the last ones do.
func place(old, want []BackendVal) []BackendVal {
	out := make([]BackendVal, len(want))
	filled := make([]bool, len(want))
	slot := map[MemberKey]int{}
	for i, b := range old {
		slot[MemberKey{IP: b.IP, Port: b.Port}] = i
	}
	var rest []BackendVal
	for _, b := range want {
		i, ok := slot[MemberKey{IP: b.IP, Port: b.Port}]
		if ok && i < len(out) && !filled[i] {
			out[i], filled[i] = b, true
		} else {
			rest = append(rest, b)
		}
	}
	for i := range out {
		if !filled[i] {
			out[i], rest = rest[0], rest[1:]
		}
	}
	return out
}

func port(p uint16) (b [2]byte) {
	binary.BigEndian.PutUint16(b[:], p)
	return b
}

func compareBackend(a, b BackendVal) int {
	return cmp.Or(slices.Compare(a.IP[:], b.IP[:]), slices.Compare(a.Port[:], b.Port[:]))
}

func compareFront(a, b FrontendKey) int {
	return cmp.Or(slices.Compare(a.IP[:], b.IP[:]), slices.Compare(a.Port[:], b.Port[:]), cmp.Compare(a.Proto, b.Proto))
}
