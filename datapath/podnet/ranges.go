package podnet

import "net/netip"

// ranges finds out whether a range overlaps with one of many, in a time that grows with how many lengths of prefix there are, which
// is mostly one, and not with the ranges.
type ranges struct {
	lengths map[int]bool
	exact   map[netip.Prefix]taken // the ranges themselves
	within  map[netip.Prefix]taken // of each of the lengths: a range that is in it
}

type taken struct {
	r    netip.Prefix
	node string
}

// newRanges is for ranges as long as those of the peers.
func newRanges(peers []Peer) *ranges {
	out := &ranges{lengths: map[int]bool{}, exact: make(map[netip.Prefix]taken, len(peers)+1), within: make(map[netip.Prefix]taken, len(peers)+1)}
	for _, p := range peers {
		out.lengths[p.PodCIDR.Bits()] = true
	}
	return out
}

func (s *ranges) add(p netip.Prefix, node string) {
	p = p.Masked()
	if !s.lengths[p.Bits()] {
		s.lengths[p.Bits()] = true // this node's: it is added before all others
	}
	t := taken{p, node}
	s.exact[p] = t
	for bits := range s.lengths {
		if bits < 0 || bits > p.Bits() {
			continue
		}
		around := netip.PrefixFrom(p.Addr(), bits).Masked()
		if _, known := s.within[around]; !known {
			s.within[around] = t
		}
	}
}

// overlap finds one of the ranges that overlaps with p.
func (s *ranges) overlap(p netip.Prefix) (r netip.Prefix, node string, found bool) {
	p = p.Masked()
	if t, ok := s.within[p]; ok { // p is this range, or around it
		return t.r, t.node, true
	}
	for bits := range s.lengths {
		if bits < 0 || bits >= p.Bits() {
			continue
		}
		if t, ok := s.exact[netip.PrefixFrom(p.Addr(), bits).Masked()]; ok { // p is in this range
			return t.r, t.node, true
		}
	}
	return netip.Prefix{}, "", false
}
