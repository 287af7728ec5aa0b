package membership

import (
	"fmt"
	"maps"
	"net/netip"
	"testing"
	"time"

	"github.com/hashicorp/serf/serf"

	"skein.io/skein/gossip/health"
)

// step is what happens at one second of a member's life: serf's status of it, or an answer (or none) to this node's probe.
type step struct {
	status    serf.MemberStatus // zero (StatusNone): serf says nothing new
	suspected bool
	answers   bool
	tag       string
	want      health.Verdict
	since     int  // the second since which the verdict holds
	changed   bool // subscribers are told
}

func TestView(t *testing.T) {
	const gone serf.MemberStatus = -1
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"joins and stays", []step{
			{status: serf.StatusAlive, want: health.Alive, since: 0, changed: true},
			{status: serf.StatusAlive, want: health.Alive, since: 0},
		}},
		{"re-tagged: told, but no new verdict", []step{
			{status: serf.StatusAlive, want: health.Alive, since: 0, changed: true},
			{status: serf.StatusAlive, tag: "x", want: health.Alive, since: 0, changed: true},
		}},
		{"suspected, then answers", []step{
			{status: serf.StatusAlive, want: health.Alive, since: 0, changed: true},
			{suspected: true, want: health.Suspect, since: 1, changed: true},
			{suspected: true, want: health.Suspect, since: 1},
			{status: serf.StatusAlive, want: health.Suspect, since: 1},
			{answers: true, want: health.Alive, since: 4, changed: true},
			{answers: true, want: health.Alive, since: 4},
		}},
		{"suspected, dead, back: the suspicion is over", []step{
			{status: serf.StatusAlive, want: health.Alive, since: 0, changed: true},
			{suspected: true, want: health.Suspect, since: 1, changed: true},
			{status: serf.StatusFailed, want: health.Dead, since: 2, changed: true},
			{suspected: true, want: health.Dead, since: 2},
			{answers: true, want: health.Dead, since: 2},
			{status: serf.StatusFailed, want: health.Dead, since: 2},
			{status: serf.StatusAlive, want: health.Alive, since: 6, changed: true},
		}},
		{"leaves and is forgotten", []step{
			{status: serf.StatusAlive, want: health.Alive, since: 0, changed: true},
			{status: serf.StatusLeaving, want: health.Left, since: 1, changed: true},
			{suspected: true, want: health.Left, since: 1},
			{status: serf.StatusLeft, want: health.Left, since: 1},
			{status: gone, changed: true},
			{suspected: true},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			start := time.Now()
			v := newView("me")
			v.observe(start, nil)
			for n, s := range c.steps {
				now, changed := start.Add(time.Duration(n)*time.Second), false
				switch {
				case s.suspected || s.answers:
					changed = len(v.suspect(now, "x", s.suspected)) > 0
				case s.status == gone:
					_, changed = v.observe(now, nil)
				default:
					_, changed = v.observe(now, []observed{{"x", netip.MustParseAddr("10.0.0.1"), 7946, map[string]string{"t": s.tag}, s.status}})
				}
				m, ok := v.members["x"]
				if ok != (s.want != health.Unknown) || m.Verdict != s.want || changed != s.changed {
					t.Fatalf("step %d: %s, known %t, changed %t; want %s, changed %t", n, m.Verdict, ok, changed, s.want, s.changed)
				}
				if since := start.Add(time.Duration(s.since) * time.Second); ok && !m.Since.Equal(since) {
					t.Fatalf("step %d: since second %v, want %d", n, m.Since.Sub(start).Seconds(), s.since)
				}
			}
		})
	}
}

func TestSuspicionIsNotOfOneself(t *testing.T) {
	v := newView("me")
	v.observe(time.Now(), []observed{{name: "me", status: serf.StatusAlive}})
	if v.suspect(time.Now(), "me", true) != nil || v.suspect(time.Now(), "nobody", true) != nil {
		t.Error("this node, or one that is not there, was suspected")
	}
	if !v.members["me"].Self {
		t.Error("this node does not know itself")
	}
}

func addr(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(n)}), 7946)
}

func member(n int, v health.Verdict) Member {
	return Member{Name: fmt.Sprintf("n%d", n), Addr: addr(n).Addr(), Port: 7946, Verdict: v}
}

func TestPeersUpdate(t *testing.T) {
	p := peers{"n2": addr(2), "n3": addr(3), "n9": addr(9)}
	self := member(1, health.Alive)
	self.Self = true
	moved := member(2, health.Alive)
	moved.Addr = addr(20).Addr()
	members := []Member{self, moved, member(3, health.Left), member(4, health.Dead), member(5, health.Suspect), member(6, health.Unknown)}
	if !p.update(members) {
		t.Error("no change was seen")
	}
	// n9, dead for so long that serf forgot it, stays.
	want := peers{"n2": addr(20), "n4": addr(4), "n5": addr(5), "n9": addr(9)}
	if !maps.Equal(p, want) {
		t.Errorf("peers %v, want %v", p, want)
	}
	if p.update(members) {
		t.Error("a change was seen where there is none")
	}
	for n := range 2 * maxPeers {
		p.update([]Member{{Name: fmt.Sprintf("m%d", n), Addr: addr(1).Addr(), Port: 1, Verdict: health.Alive}})
	}
	if len(p) != maxPeers {
		t.Errorf("%d peers are kept, the bound is %d", len(p), maxPeers)
	}
}

func TestRejoinTargets(t *testing.T) {
	seeds := []netip.AddrPort{addr(100), addr(2)}
	for _, c := range []struct {
		name    string
		peers   peers
		members []Member
		round   int
		want    []netip.AddrPort
	}{
		{"first start", nil, nil, 0, []netip.AddrPort{addr(2), addr(100)}},
		{"restart alone: peers and seeds", peers{"n2": addr(2), "n3": addr(3)}, nil, 0, []netip.AddrPort{addr(2), addr(3), addr(100)}},
		{"all dead from here", peers{"n3": addr(3)}, []Member{member(3, health.Dead)}, 0, []netip.AddrPort{addr(2), addr(3), addr(100)}},
		{"those who left are left alone", peers{"n3": addr(3)}, []Member{member(3, health.Left)}, 0, []netip.AddrPort{addr(2), addr(100)}},
		{"all are known", peers{"n2": addr(2), "n3": addr(3)}, []Member{member(2, health.Alive), member(3, health.Dead)}, 0, nil},
		{"suspect company is company", peers{"n2": addr(2)}, []Member{member(2, health.Suspect)}, 0, nil},
		{"a forgotten one, in company", peers{"n2": addr(2), "n7": addr(7)}, []Member{member(2, health.Alive)}, 5, []netip.AddrPort{addr(7)}},
		{"turns", peers{"n2": addr(2), "n7": addr(7), "n8": addr(8)}, []Member{member(2, health.Alive)}, 1, []netip.AddrPort{addr(8)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newView("me")
			for _, m := range c.members {
				v.members[m.Name] = m
			}
			got := c.peers.targets(v, seeds, c.round)
			if fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Errorf("targets %v, want %v", got, c.want)
			}
		})
	}
	// Taking turns reaches everyone.
	many, reached := peers{}, map[netip.AddrPort]bool{}
	for n := range 20 {
		many[fmt.Sprint(n)] = addr(n)
	}
	for round := range 20 {
		for _, a := range many.targets(newView("me"), nil, round) {
			reached[a] = true
		}
	}
	if len(reached) != 20 {
		t.Errorf("only %d of 20 peers were tried", len(reached))
	}
}

func FuzzDecodePeers(f *testing.F) {
	f.Add([]byte(`{"version":1,"peers":[{"name":"a","addr":"10.0.0.1:7946"}]}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		record, err := decodePeers(data)
		if err != nil {
			return
		}
		for _, p := range record.Peers {
			if p.Name == "" || !p.Addr.IsValid() || len(record.Peers) > maxPeers {
				t.Fatalf("accepted %+v", record)
			}
		}
	})
}

func FuzzDecodeTags(f *testing.F) {
	good, err := encodeTags(map[string]string{"a": "b", "id": ""})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte{tagMagic, 0xdf, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{tagMagic, 0xc0})
	f.Fuzz(func(t *testing.T, data []byte) {
		if tags := decodeTags(data); tags == nil {
			t.Fatal("nil tags")
		}
	})
}

func TestTagsRoundTrip(t *testing.T) {
	want := map[string]string{"id": "x", "z": "", "ä": "ö"}
	raw, err := encodeTags(want)
	if err != nil || !maps.Equal(decodeTags(raw), want) {
		t.Errorf("%v became %v, %v", want, decodeTags(raw), err)
	}
}
