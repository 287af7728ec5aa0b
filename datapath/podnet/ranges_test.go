package podnet

import (
	"math/rand/v2"
	"net/netip"
	"testing"
)

// The answer is that of comparing with each.
func TestRangesOverlap(t *testing.T) {
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	some := func() netip.Prefix {
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(rnd.IntN(4)), byte(rnd.IntN(8)), byte(rnd.IntN(256))}), []int{24, 24, 24, 16, 22, 27}[rnd.IntN(6)])
	}
	found := 0
	for range 300 {
		own := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(rnd.IntN(4)), byte(rnd.IntN(8)), 0}), 20+rnd.IntN(8))
		peers := make([]Peer, 1+rnd.IntN(12))
		for i := range peers {
			peers[i].PodCIDR = some()
		}
		peers = append(peers, Peer{}) // one without a range
		s := newRanges(peers)
		s.add(own, "own")
		all := []netip.Prefix{own}
		for _, p := range peers {
			if !p.PodCIDR.IsValid() {
				continue
			}
			want := false
			for _, r := range all {
				want = want || r.Overlaps(p.PodCIDR)
			}
			r, node, got := s.overlap(p.PodCIDR)
			if got != want || got && (!r.Overlaps(p.PodCIDR) || node == "") {
				t.Fatalf("seed %d: %s among %v: %v (%s of %q), want %v", seed, p.PodCIDR, all, got, r, node, want)
			}
			if got {
				found++
				continue
			}
			s.add(p.PodCIDR, "peer")
			all = append(all, p.PodCIDR)
		}
	}
	if found < 100 {
		t.Errorf("seed %d: only %d overlaps were tried", seed, found)
	}
}
