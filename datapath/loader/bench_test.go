package loader

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"skein.io/skein/datapath/internal/testnet"
	"skein.io/skein/datapath/service"
)

// BenchmarkConnect measures TCP connects, one after the other, from a pod to a pod of the same node: at its own address,
// through a ClusterIP with few and with 5000 other Services, and outside the cgroup (no programs at all).
func BenchmarkConnect(b *testing.B) {
	a, _, _ := twoNodes(b)
	pod, _ := a.pod("client")
	_, be := a.pod("web")
	svc := clusterIP("default/web:http", vip, service.TCP, be)
	many := []service.Service{svc}
	for i := range 5000 {
		addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)}), 80)
		many = append(many, clusterIP(fmt.Sprint("default/s", i), addr.String(), service.TCP, be))
	}
	for _, c := range []struct {
		name, cgroup, addr string
		services           []service.Service
	}{
		{"no programs", "", be.Addr.String(), nil},
		{"direct", a.cgroup, be.Addr.String(), []service.Service{svc}},
		{"service", a.cgroup, vip, []service.Service{svc}},
		{"service of 5000", a.cgroup, vip, many},
	} {
		b.Run(c.name, func(b *testing.B) {
			a.apply(c.services...)
			p := testnet.NewProbe(pod, c.cgroup)
			b.ResetTimer()
			r := p.Do(testnet.Request{Op: "count", Network: "tcp4", Addr: c.addr, N: b.N})
			if r.Err != "" {
				b.Fatal(r.Err)
			}
			b.ReportMetric(float64(b.N)/r.Took.Seconds(), "connects/s")
		})
	}
}

// BenchmarkApply measures one endpoint's change among 5000 Services, tables in the kernel.
func BenchmarkApply(b *testing.B) {
	a, _, _ := twoNodes(b)
	var all []service.Service
	for i := range 5000 {
		addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)}), 80)
		bs := []service.Backend{{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 80)}}
		all = append(all, clusterIP(fmt.Sprint("default/s", i), addr.String(), service.TCP, bs...))
	}
	start := time.Now()
	a.apply(all...)
	b.ReportMetric(float64(time.Since(start).Milliseconds()), "first-ms")
	i := 0
	for b.Loop() {
		all[100].Backends = []service.Backend{{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 2, 0, byte(i)}), 80)}}
		a.apply(all...)
		i++
	}
}
