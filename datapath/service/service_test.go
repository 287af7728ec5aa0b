package service

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func backends(node string, addrs ...string) (out []Backend) {
	for _, a := range addrs {
		out = append(out, Backend{Addr: ap(a), Node: node})
	}
	return out
}

var self = Node{Name: "a", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}}

func web(bs ...Backend) Service {
	return Service{Name: "default/web:http", Proto: TCP, Frontends: []Frontend{{Addr: ap("10.96.0.20:80")}}, Backends: bs}
}

// resolve is what a client would find: per front end its flags and the sorted back ends in its slots.
func resolve(t testing.TB, e Entries) map[string]string {
	t.Helper()
	out := map[string]string{}
	for k, v := range e.Frontends {
		var bs []string
		for i := range v.Count {
			b, ok := e.Slots[SlotKey{v.Set, i}]
			if !ok {
				t.Fatalf("front end %v counts %d, but slot %d is empty", k, v.Count, i)
			}
			flags, ok := e.Members[MemberKey{Set: v.Set, IP: b.IP, Port: b.Port}]
			if !ok || flags != uint32(b.Flags) {
				t.Fatalf("%v of front end %v is no member or has other flags there", b.AddrPort(), k)
			}
			s := b.AddrPort().String()
			if b.Flags&FlagLocal != 0 {
				s += "*"
			}
			bs = append(bs, s)
		}
		slices.Sort(bs)
		if len(slices.Compact(slices.Clone(bs))) != len(bs) {
			t.Fatalf("front end %v has a back end twice: %v", k, bs)
		}
		out[fmt.Sprintf("%v ext=%d aff=%d", k, v.Flags&FlagExternal, v.AffinitySeconds)] = strings.Join(bs, " ")
	}
	return out
}

func TestTranslate(t *testing.T) {
	local, remote := backends("a", "10.1.0.1:80")[0], backends("b", "10.1.1.1:80")[0]
	for name, c := range map[string]struct {
		in   []Service
		want map[string]string
		err  string
	}{
		"plain": {[]Service{web(local, remote)}, map[string]string{"10.96.0.20:80/TCP ext=0 aff=0": "10.1.0.1:80* 10.1.1.1:80"}, ""},
		"none":  {[]Service{web()}, map[string]string{"10.96.0.20:80/TCP ext=0 aff=0": ""}, ""},
		"node port": {[]Service{{Name: "w", Proto: UDP, NodePort: 30080, Backends: []Backend{remote}, Affinity: 3 * time.Hour}}, map[string]string{
			"10.0.0.1:30080/UDP ext=1 aff=10800": "10.1.1.1:80", "10.0.0.2:30080/UDP ext=1 aff=10800": "10.1.1.1:80", "127.0.0.1:30080/UDP ext=0 aff=10800": "10.1.1.1:80"}, ""},
		"policies": {[]Service{{Name: "w", Proto: TCP, ExternalLocal: true, Backends: []Backend{local, remote},
			Frontends: []Frontend{{Addr: ap("10.96.0.20:80")}, {Addr: ap("192.0.2.1:80"), External: true}}}}, map[string]string{
			"10.96.0.20:80/TCP ext=0 aff=0": "10.1.0.1:80* 10.1.1.1:80", "192.0.2.1:80/TCP ext=1 aff=0": "10.1.0.1:80*"}, ""},
		"internal local": {[]Service{{Name: "w", Proto: TCP, InternalLocal: true, Backends: []Backend{remote}, Frontends: []Frontend{{Addr: ap("10.96.0.20:80")}}}},
			map[string]string{"10.96.0.20:80/TCP ext=0 aff=0": ""}, ""},
		"terminating beside ready": {[]Service{web(local, Backend{Addr: remote.Addr, Terminating: true})}, map[string]string{"10.96.0.20:80/TCP ext=0 aff=0": "10.1.0.1:80*"}, ""},
		"only terminating":         {[]Service{web(Backend{Addr: remote.Addr, Terminating: true})}, map[string]string{"10.96.0.20:80/TCP ext=0 aff=0": "10.1.1.1:80"}, ""},
		"duplicate back end":       {[]Service{web(local, local)}, map[string]string{"10.96.0.20:80/TCP ext=0 aff=0": "10.1.0.1:80*"}, ""},
		"IPv6 is left out": {[]Service{web(local, Backend{Addr: ap("[fd00::1]:80")})}, map[string]string{"10.96.0.20:80/TCP ext=0 aff=0": "10.1.0.1:80*"},
			"default/web:http: back end [fd00::1]:80 is not an IPv4 address"},
		"mapped IPv4": {[]Service{web(Backend{Addr: ap("[::ffff:10.1.1.1]:80")})}, map[string]string{"10.96.0.20:80/TCP ext=0 aff=0": "10.1.1.1:80"}, ""},
		"claimed twice": {[]Service{{Name: "z", Proto: TCP, Frontends: []Frontend{{Addr: ap("10.96.0.20:80")}}, Backends: []Backend{remote}}, web(local)},
			map[string]string{"10.96.0.20:80/TCP ext=0 aff=0": "10.1.0.1:80*"}, "service z: front end 10.96.0.20:80/TCP belongs to service default/web:http already"},
		"TCP beside UDP": {[]Service{web(local), {Name: "u", Proto: UDP, Frontends: []Frontend{{Addr: ap("10.96.0.20:80")}}, Backends: []Backend{remote}}},
			map[string]string{"10.96.0.20:80/TCP ext=0 aff=0": "10.1.0.1:80*", "10.96.0.20:80/UDP ext=0 aff=0": "10.1.1.1:80"}, ""},
		"SCTP": {[]Service{{Name: "s", Proto: 132}, web()}, map[string]string{"10.96.0.20:80/TCP ext=0 aff=0": ""}, "service s: protocol 132 cannot be balanced"},
	} {
		got, err := Translate(NewEntries(), c.in, self)
		if r := resolve(t, got); !maps.Equal(r, c.want) {
			t.Errorf("%s:\n%v\nwant\n%v", name, r, c.want)
		}
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: error %v, want %q", name, err, c.err)
		}
	}
}

// TestStability: a change of one service leaves the others' entries alone, and back ends stay in their places.
func TestStability(t *testing.T) {
	other := Service{Name: "a/other:x", Proto: TCP, Frontends: []Frontend{{Addr: ap("10.96.0.1:443")}}, Backends: backends("b", "10.9.0.1:1", "10.9.0.2:1")}
	have, _ := Translate(NewEntries(), []Service{web(backends("b", "10.1.0.1:80", "10.1.0.2:80", "10.1.0.3:80")...), other}, self)
	want, _ := Translate(have, []Service{web(backends("b", "10.1.0.3:80", "10.1.0.2:80")...), other, {Name: "new", Proto: UDP, NodePort: 30001}}, self)
	var changed []string
	for _, op := range Diff(have, want) {
		if op.Table == Frontends {
			continue
		}
		changed = append(changed, fmt.Sprint(op.Table, " delete=", op.Value == nil))
	}
	// 10.1.0.1 leaves its place to 10.1.0.3, whose own goes; nothing else moves
	if want := []string{"back ends delete=false", "back ends delete=true", "members delete=true"}; !slices.Equal(changed, want) {
		t.Errorf("steps %v, want %v", changed, want)
	}
	if again, _ := Translate(want, []Service{other, {Name: "new", Proto: UDP, NodePort: 30001}, web(backends("b", "10.1.0.2:80", "10.1.0.3:80")...)}, self); len(Diff(want, again)) != 0 {
		t.Errorf("not idempotent: %v", Diff(want, again))
	}
}

// TestDiffNeverBreaks: random changes of random services; after every single step each front end that has back ends before
// and after still reaches one that belongs to it before or after.
func TestDiffNeverBreaks(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	random := func() (out []Service) {
		for i := range 6 {
			if rnd.IntN(4) == 0 {
				continue
			}
			s := Service{Name: fmt.Sprint("s", i), Proto: TCP, InternalLocal: rnd.IntN(4) == 0, ExternalLocal: rnd.IntN(4) == 0, Affinity: time.Duration(rnd.IntN(2)) * time.Hour}
			for j := range 1 + rnd.IntN(2) { // addresses wander between services
				s.Frontends = append(s.Frontends, Frontend{Addr: ap(fmt.Sprintf("10.96.0.%d:80", 1+(i+j*rnd.IntN(3))%8)), External: rnd.IntN(2) == 0})
			}
			if rnd.IntN(2) == 0 {
				s.NodePort = uint16(30000 + rnd.IntN(8))
			}
			for j := range 6 {
				if rnd.IntN(2) == 0 {
					s.Backends = append(s.Backends, Backend{Addr: ap(fmt.Sprintf("10.1.%d.%d:80", i, j)), Node: string('a' + rune(rnd.IntN(2))), Terminating: rnd.IntN(5) == 0})
				}
			}
			out = append(out, s)
		}
		return out
	}
	have := NewEntries()
	for range 2000 {
		want, _ := Translate(have, random(), self)
		resolve(t, want)
		before, after := members(have), members(want)
		for _, op := range Diff(have, want) {
			have.Apply(op)
			for k, v := range have.Frontends {
				if len(before[k]) == 0 || len(after[k]) == 0 {
					continue
				}
				if v.Count == 0 {
					t.Fatalf("after %v: front end %v has no back end", op, k)
				}
				hits := 0
				for i := range v.Count {
					b, ok := have.Slots[SlotKey{v.Set, i}]
					if !ok { // pick.h tries another
						continue
					}
					hits++
					if !before[k][b.AddrPort()] && !after[k][b.AddrPort()] {
						t.Fatalf("after %v: front end %v reaches %v, never one of its back ends", op, k, b.AddrPort())
					}
				}
				if hits == 0 {
					t.Fatalf("after %v: front end %v reaches nobody", op, k)
				}
			}
		}
		if !reflect.DeepEqual(have, want) {
			t.Fatalf("the steps do not lead to what was wanted:\n%v\n%v", have, want)
		}
	}
}

func members(e Entries) map[FrontendKey]map[netip.AddrPort]bool {
	out := map[FrontendKey]map[netip.AddrPort]bool{}
	for k, v := range e.Frontends {
		out[k] = map[netip.AddrPort]bool{}
		for i := range v.Count {
			b := e.Slots[SlotKey{v.Set, i}]
			out[k][b.AddrPort()] = true
		}
	}
	return out
}

// BenchmarkChange is one endpoint's change among 1000 services with 10 back ends each.
func BenchmarkChange(b *testing.B) {
	var all []Service
	for i := range 1000 {
		s := Service{Name: fmt.Sprintf("ns/s%d:http", i), Proto: TCP, Frontends: []Frontend{{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}), 80)}}}
		for j := range 10 {
			s.Backends = append(s.Backends, Backend{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(j), byte(i >> 8), byte(i)}), 80), Node: "b"})
		}
		all = append(all, s)
	}
	have, _ := Translate(NewEntries(), all, self)
	all[500].Backends = all[500].Backends[1:]
	b.ReportAllocs()
	for b.Loop() {
		want, _ := Translate(have, all, self)
		if len(Diff(have, want)) == 0 {
			b.Fatal("no change")
		}
	}
}
